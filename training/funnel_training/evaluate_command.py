"""The command `funnel evaluate`. It imports late what takes long to import: `funnel --help` loads this file."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.config import ATTENTIONS, FunnelConfig
from funnel_engine.heads import POOLINGS
from funnel_engine.output_files import check_writable, write_text
from funnel_engine.weights import DTYPES
from funnel_kernels import BACKENDS
from funnel_kernels.errors import ConfigError

if TYPE_CHECKING:
    from funnel_training.evaluate import Evaluation
    from funnel_training.tasks.task import Task

WIDE = 160  # columns of a table where standard output is not a terminal
PATH = click.Path(path_type=Path)


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option(
    "--funnel",
    "funnels",
    type=FunnelConfig.parse,
    multiple=True,
    metavar="LAYER:STRIDE[/OPTION]",
    help="A funnel to score, e.g. 6:2/mean; may be given again. Default: that of the checkpoint.",
)
@click.option("--texts", type=PATH, help="A text in each line: agreement with the unfunneled model.")
@click.option(
    "--pairs",
    type=PATH,
    help="CSV, TSV or JSONL of sentence1, sentence2, score: Spearman correlation. Of query, document: retrieval.",
)
@click.option("--beir", type=PATH, help="Folder with corpus.jsonl, queries.jsonl and qrels: nDCG@10, recall@100.")
@click.option("--labels", type=PATH, help="CSV, TSV or JSONL of text, label: accuracy and macro F1.")
@click.option("--tags", type=PATH, help="CoNLL columns, a word first and its tag last: F1 of spans.")
@click.option(
    "--baseline",
    type=PATH,
    help="Checkpoint that runs unfunneled. Default: CHECKPOINT, if it was not trained for a funnel.",
)
@click.option("--attention", type=click.Choice(ATTENTIONS), help="Kind of attention. Default: that of the checkpoint.")
@click.option("--pooling", type=click.Choice(POOLINGS), help="How rows become a vector. Default: the checkpoint's.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of weights and activations. Default: the checkpoint's.")
@click.option("--backend", default="auto", show_default=True, help=f"One of auto, {', '.join(BACKENDS)}.")
@click.option("--truncate", is_flag=True, help="Cut off the end of texts that are too long, instead of stopping.")
@click.option("--json", "output", type=click.Path(path_type=Path, dir_okay=False), help="File to write: .json")
def evaluate(
    checkpoint: Path,
    funnels: tuple[FunnelConfig, ...],
    texts: Path | None,
    pairs: Path | None,
    beir: Path | None,
    labels: Path | None,
    tags: Path | None,
    baseline: Path | None,
    attention: str | None,
    pooling: str | None,
    dtype: str | None,
    backend: str,
    truncate: bool,
    output: Path | None,
) -> None:
    """Show what funnels cost a CHECKPOINT in quality, on your own data.

    One of --texts, --pairs, --beir, --labels and --tags gives the data. The table starts with the model without a
    funnel. It shows each funnel's scores, times 100; the ratio of the first score to the unfunneled one, with its 95 %
    interval (paired bootstrap); and the ideal latency on these texts, relative to no funnel.

    Example: funnel evaluate my-gemma --pairs sts.csv --funnel 6:2/mean --funnel 2:2
    """
    given = {"texts": texts, "pairs": pairs, "beir": beir, "labels": labels, "tags": tags}
    if sum(path is not None for path in given.values()) != 1:
        names = " ".join(f"--{name}" for name, path in given.items() if path is not None)
        raise ConfigError(f"the data are given by {names or 'no option'}; give one of --{', --'.join(given)}")
    if output is not None:
        check_writable(output, (".json",))
    require_packages()
    from funnel_training import evaluate as evaluation

    ((form, path),) = ((form, path) for form, path in given.items() if path is not None)
    result = evaluation.evaluate(
        checkpoint,
        list(dict.fromkeys(funnels)),
        read_task(form, path, checkpoint),
        baseline=baseline,
        attention=attention,
        pooling=pooling,
        dtype=dtype,
        backend=backend,
        truncate=truncate,
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    console.print(describe(result), highlight=False, markup=False, soft_wrap=True)
    console.print(table(result))
    if output is not None:
        write_text(output, json.dumps(dataclasses.asdict(result), indent=2, allow_nan=False) + "\n")
        click.echo(f"Wrote {output}")


def require_packages() -> None:
    """Raises `ConfigError` if the packages of the extra `train` are not installed."""
    for module, package in (("scipy", "scipy"), ("sklearn", "scikit-learn"), ("optax", "optax")):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{package} is not installed; run: pip install 'funnel-engine[train]'")


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


def describe(result: "Evaluation") -> str:
    """The data and the options, in words."""
    data, options = result.data, result.options
    parts = [f"{data['units']:,} {data['unit']}"]
    parts += [f"{count:,} {name}" for name, count in data["texts"].items() if name != data["unit"]]
    if data["duplicates"]:
        parts.append(f"{data['duplicates']:,} left out as duplicates")
    parts += [f"prompt {prompt} for {name}" for name, prompt in data["prompts"].items() if prompt]
    model = f"{options['attention']} attention, pooling {options['pooling']}, {options['dtype']}"
    lines = [
        f"{result.checkpoint['name']}: {model}",
        f"{', '.join(data['files'])}: {', '.join(parts)}",
    ]
    if result.baseline != result.checkpoint:
        lines.insert(1, f"baseline: {result.baseline['name']}")
    return "\n".join(lines)


def table(result: "Evaluation") -> Table:
    """The lines of an evaluation; the ratio is that of the first score."""
    names, has_sides = list(result.lines[0].scores), len(result.data["texts"]) == 2
    shown = Table("funnel", *["funneled texts"] * has_sides)
    for title in ("ideal latency", names[0], "ratio", "95 % interval", *names[1:]):
        shown.add_column(title, justify="right")
    for line in result.lines:
        first, *others = (f"{100 * line.scores[name]:.2f}" for name in names)
        ratio = line.ratios[names[0]]
        sure = ("", "") if ratio is None else (f"{ratio.value:.3f}", f"{ratio.low:.3f} - {ratio.high:.3f}")
        texts = [line.funneled] * has_sides
        shown.add_row(escape(line.funnel), *texts, f"{line.ideal_latency:.3f}", first, *sure, *others)
    return shown
