"""The command `funnel evaluate`. It imports late what takes long to import: `funnel --help` loads this file."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from funnel_engine.config import Funnel, parse_funnel
from funnel_engine.output_files import check_writable, write_text
from funnel_training.command_options import (
    PATH,
    data_options,
    given_data,
    model_options,
    output_console,
    read_task,
    require_packages,
)

if TYPE_CHECKING:
    from funnel_training.evaluate import Evaluation


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option(
    "--funnel",
    "funnels",
    type=parse_funnel,
    multiple=True,
    metavar="LAYER:STRIDE[/OPTION]",
    help="A funnel to score, e.g. 6:2/mean, or 0=none+64=6:2/mean by length; may be given again. Default: that of the "
    "checkpoint.",
)
@data_options
@click.option(
    "--baseline",
    type=PATH,
    help="Checkpoint that runs unfunneled. Default: CHECKPOINT, if it was not trained for a funnel.",
)
@model_options
@click.option("--json", "output", type=click.Path(path_type=Path, dir_okay=False), help="File to write: .json")
def evaluate(
    checkpoint: Path,
    funnels: tuple[Funnel, ...],
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
    form, path = given_data(texts=texts, pairs=pairs, beir=beir, labels=labels, tags=tags)
    if output is not None:
        check_writable(output, (".json",))
    require_packages()
    from funnel_training import evaluate as evaluation

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
    console = output_console()
    console.print(describe(result), highlight=False, markup=False, soft_wrap=True)
    console.print(table(result))
    if output is not None:
        write_text(output, json.dumps(dataclasses.asdict(result), indent=2, allow_nan=False) + "\n")
        click.echo(f"Wrote {output}")


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
