"""Options that several commands have, and what they are read into."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console

from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.config import ATTENTIONS
from funnel_engine.heads import POOLINGS
from funnel_engine.weights import ACTIVATIONS, DTYPES
from funnel_kernels import BACKENDS
from funnel_kernels.errors import ConfigError

if TYPE_CHECKING:
    from funnel_training.tasks.task import Task

WIDE = 160  # columns of a table where standard output is not a terminal
PATH = click.Path(path_type=Path)
Command = TypeVar("Command", bound=Callable[..., Any])


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator for several options, in the order of the help."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


data_options = options(
    click.option("--texts", type=PATH, help="A text in each line: agreement with the unfunneled model."),
    click.option(
        "--pairs",
        type=PATH,
        help="CSV, TSV or JSONL of sentence1, sentence2, score: Spearman correlation. Of query, document: retrieval.",
    ),
    click.option("--beir", type=PATH, help="Folder with corpus.jsonl, queries.jsonl and qrels: nDCG@10, recall@100."),
    click.option("--labels", type=PATH, help="CSV, TSV or JSONL of text, label: accuracy and macro F1."),
    click.option("--tags", type=PATH, help="CoNLL columns, a word first and its tag last: F1 of spans."),
)

vector_options = options(
    click.option(
        "--attention", type=click.Choice(ATTENTIONS), help="Kind of attention. Default: that of the checkpoint."
    ),
    click.option("--pooling", type=click.Choice(POOLINGS), help="How rows become a vector. Default: the checkpoint's."),
    click.option("--truncate", is_flag=True, help="Cut off the end of texts that are too long, instead of stopping."),
)

model_options = options(
    vector_options,
    click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of weights. Default: the checkpoint's."),
    click.option("--backend", default="auto", show_default=True, help=f"One of auto, {', '.join(BACKENDS)}."),
)


def training_options(train: str, learning_rate: float) -> Callable[[Command], Command]:
    """The fields of `Settings`, with these defaults."""
    return options(
        click.option("--steps", type=int, default=300, show_default=True, help="Number of optimizer steps."),
        click.option(
            "--train",
            default=train,
            show_default=True,
            help="Which weights move: all, after (the layers after the funnel), or lora:RANK (on these layers).",
        ),
        click.option(
            "--learning-rate", type=float, default=learning_rate, show_default=True, help="The highest learning rate."
        ),
        click.option("--rows", type=int, default=1024, show_default=True, help="Tokens that are computed at once."),
        click.option("--packs", type=int, default=1, show_default=True, help="Packs of --rows tokens in a step."),
        click.option("--every", type=int, default=50, show_default=True, help="Steps from one evaluation to the next."),
        click.option(
            "--patience", type=int, default=5, show_default=True, help="Evaluations without a gain before the end."
        ),
        click.option(
            "--dtype", type=click.Choice(ACTIVATIONS), default="float32", show_default=True, help="Of activations."
        ),
        click.option(
            "--recompute", is_flag=True, help="Compute each layer again for its derivative: less memory, more time."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of everything random."),
    )


def given_data(**paths: Path | None) -> tuple[str, Path]:
    """The option of `data_options` that is given, and its path.

    Raises:
        ConfigError: none is given, or several are.
    """
    given = [(form, path) for form, path in paths.items() if path is not None]
    if len(given) != 1:
        names = " ".join(f"--{form}" for form, _ in given)
        raise ConfigError(f"the data are given by {names or 'no option'}; give one of --{', --'.join(paths)}")
    return given[0]


def require_packages() -> None:
    """Raises `ConfigError` if the packages of the extra `train` are not installed."""
    packages = {"matplotlib": "matplotlib", "optax": "optax", "scipy": "scipy", "sklearn": "scikit-learn"}
    for module, package in packages.items():
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{package} is not installed; run: pip install 'funnel-engine[train]'")


def output_console() -> Console:
    """Standard output, wide enough for a table where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def read_task(form: str, path: Path, checkpoint: Path) -> "Task":
    """Reads the data of one of the options."""
    from funnel_training.tasks.labels import read_labels
    from funnel_training.tasks.pairs import read_pairs
    from funnel_training.tasks.retrieval import read_beir
    from funnel_training.tasks.tags import read_tags
    from funnel_training.tasks.texts import read_texts

    readers = {"texts": read_texts, "pairs": read_pairs, "beir": read_beir}
    if form in readers:
        return readers[form](path)
    head = read_checkpoint(checkpoint).head
    if form == "labels":
        return read_labels(path, head.labels if head.task == "classify" else ())
    if head.task != "tag":
        raise ConfigError(
            f"--tags needs a token classifier, but this checkpoint's task is {head.task or 'none'}; "
            "convert a ForTokenClassification checkpoint"
        )
    return read_tags(path, head.labels)
