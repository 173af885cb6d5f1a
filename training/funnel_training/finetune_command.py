"""The command `funnel finetune`. It imports late what takes long to import: `funnel --help` loads this file."""

from pathlib import Path
from typing import Any

import click

from funnel_engine.cli import funnel_option
from funnel_engine.config import Funnel
from funnel_training.command_options import PATH, given_data, require_packages, training_options, vector_options


@click.command()
@click.option("--checkpoint", type=PATH, required=True, help="Folder that `funnel convert` wrote.")
@funnel_option("that of the checkpoint")
@click.option("--labels", type=PATH, help="CSV, TSV or JSONL of text, label: trains a classifier of texts.")
@click.option("--tags", type=PATH, help="CoNLL columns, a word first and its tag last: trains a classifier of tokens.")
@click.option(
    "--pairs",
    type=PATH,
    help="CSV, TSV or JSONL of sentence1, sentence2, score, or of query, document: trains vectors.",
)
@click.option("--output", "-o", type=PATH, required=True, help="Folder of the new checkpoint.")
@training_options(train="all", learning_rate=3e-5)
@vector_options
@click.option("--resume", is_flag=True, help="Continue a run that was stopped.")
def finetune(
    checkpoint: Path,
    funnel: Funnel | None,
    labels: Path | None,
    tags: Path | None,
    pairs: Path | None,
    output: Path,
    attention: str | None,
    pooling: str | None,
    truncate: bool,
    resume: bool,
    **settings: Any,
) -> None:
    """Train a checkpoint on labelled data, through a funnel or without one.

    A tenth of the data is held out to measure how good it is. OUTPUT.training has the log, a plot, and what --resume
    continues from.

    Example: funnel finetune --checkpoint my-gemma --attention bidirectional --pooling attention --funnel 6:2 --labels
    labels.csv -o my-classifier
    """
    require_packages()
    from funnel_training.finetune import finetune as run
    from funnel_training.trainer import Settings

    form, data = given_data(labels=labels, tags=tags, pairs=pairs)
    figures = run(
        checkpoint,
        form,
        data,
        output,
        Settings(**settings),
        funnel=funnel,
        attention=attention,
        pooling=pooling,
        truncate=truncate,
        resume=resume,
        report=click.echo,
    )
    measured = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    click.echo(f"Wrote {output}: {measured} on held-out data")
