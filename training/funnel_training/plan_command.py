"""The command `funnel plan`. It imports late what takes long to import: `funnel --help` loads this file."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from funnel_engine.config import parse_funnel
from funnel_engine.output_files import write_bytes, write_text
from funnel_training.command_options import (
    PATH,
    data_options,
    given_data,
    model_options,
    output_console,
    read_task,
    require_packages,
)
from funnel_training.web_page import code, heading, image, page, paragraphs, table

if TYPE_CHECKING:
    from funnel_training.plan import Plan
    from funnel_training.statistics import Ratio


@click.command()
@click.option("--checkpoint", type=PATH, required=True, help="A folder that `funnel convert` wrote.")
@data_options
@click.option(
    "--max-loss", type=float, required=True, help="The part of the first score that may be lost: 0.05 is five per cent."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("funnel-plan"),
    show_default=True,
    help="Folder to write: plan.json, plan.png, plan.html, and what --resume needs.",
)
@click.option("--resume", is_flag=True, help="Continue the run in the output folder after it was interrupted.")
@model_options
def plan(
    checkpoint: Path,
    texts: Path | None,
    pairs: Path | None,
    beir: Path | None,
    labels: Path | None,
    tags: Path | None,
    max_loss: float,
    output: Path,
    resume: bool,
    attention: str | None,
    pooling: str | None,
    dtype: str | None,
    backend: str,
    truncate: bool,
) -> None:
    """Find the fastest funnel for a checkpoint that loses no more than allowed, on your data and this machine.

    One of --texts, --pairs, --beir, --labels and --tags gives the data. Half of them search among about 200 funnels;
    the last few are timed; the other half certify the winner. If none qualifies, the exit status is 1.

    Example: funnel plan --checkpoint my-gemma --texts texts.txt --max-loss 0.05
    """
    form, path = given_data(texts=texts, pairs=pairs, beir=beir, labels=labels, tags=tags)
    require_packages()
    from funnel_training import plan as planning
    from funnel_training.plan_plot import draw

    result = planning.plan(
        checkpoint,
        read_task(form, path, checkpoint),
        max_loss=max_loss,
        output=output,
        resume=resume,
        attention=attention,
        pooling=pooling,
        dtype=dtype,
        backend=backend,
        truncate=truncate,
    )
    write_text(output / "plan.json", json.dumps(dataclasses.asdict(result), indent=2, allow_nan=False) + "\n")
    picture, conclusion = draw(result), conclude(result, checkpoint)
    write_bytes(output / "plan.png", picture)
    write_text(output / "plan.html", web_page(result, picture, conclusion))
    console = output_console()
    console.print(describe(result), highlight=False, markup=False, soft_wrap=True)
    console.print(terminal_table(result))
    console.print("\n".join(conclusion), highlight=False, markup=False, soft_wrap=True)
    click.echo(f"Wrote plan.json, plan.png and plan.html to {output}")
    if result.winner is None:
        raise SystemExit(1)


def describe(result: "Plan") -> str:
    """The data and the options, and how many funnels came how far."""
    data, options = result.data, result.options
    funnels = [each for each in result.candidates if each.kind == "funnel"]
    runs = [(sum(each.units >= units for each in funnels), units) for units in data["rungs"]]
    rounds = ", ".join(f"{count} on {units:,}" for count, units in runs)
    names, timed = ", ".join(data["files"]), sum(each.latency is not None for each in funnels)
    return "\n".join(
        [
            f"{result.checkpoint['name']}: {options['attention']} attention, pooling {options['pooling']}, "
            f"{options['dtype']}, on {options['device']}",
            f"{names}: {data['rungs'][-1]:,} {data['unit']} to search, {data['held_out']:,} to certify",
            f"{len(funnels)} funnels: {sum(each.units == 0 for each in funnels)} were not run, as they cannot win; "
            f"{rounds} {data['unit']}; {timed} timed",
        ]
    )


def heads(result: "Plan") -> tuple[str, ...]:
    """The titles of the columns of `rows`."""
    score = result.data["score"]
    held_out = ("held out", "95 % interval")
    return ("", "funnel or rival", "ideal", "latency", "quartiles", score, "95 % interval", *held_out, "verdict")


def rows(result: "Plan") -> list[tuple[str, ...]]:
    """What was timed, fastest first."""
    return [
        (
            "winner" if each.name == result.winner else "",
            each.name,
            f"{each.ideal:.3f}",
            f"{latency.ratio:.3f}",
            f"{latency.low:.3f} - {latency.high:.3f}",
            *ratio_cells(ratio),
            *(("", "") if each.held_out is None else ratio_cells(each.held_out)),
            "" if each.verdict is None else each.verdict.kind,
        )
        for each, ratio, latency in result.timed()
    ]


def terminal_table(result: "Plan") -> Table:
    words = ("", "funnel or rival", "verdict")
    shown = Table()
    for title in heads(result):
        shown.add_column(title, justify="left" if title in words else "right")
    for row in rows(result):
        shown.add_row(*map(escape, row), style="bold" if row[0] else None)
    return shown


def web_page(result: "Plan", picture: bytes, conclusion: list[str]) -> str:
    """All of it as one HTML file."""
    title = f"A funnel for {result.checkpoint['name']}"
    facts = {"checkpoint": result.checkpoint["manifest_sha256"], **result.data["files"], **result.versions}
    return page(
        title,
        paragraphs(*describe(result).splitlines()),
        image(picture, "Quality beside latency"),
        table(heads(result), rows(result)),
        code("\n".join(conclusion)),
        heading("Circumstances"),
        table(("what", "version or SHA-256"), list(facts.items())),
    )


def ratio_cells(ratio: "Ratio") -> tuple[str, str]:
    return f"{ratio.value:.3f}", f"{ratio.low:.3f} - {ratio.high:.3f}"


def conclude(result: "Plan", checkpoint: Path) -> list[str]:
    """What the table means, and the lines to paste."""
    lines, bound, unit = [], 1 - result.options["max_loss"], result.data["unit"]
    for each in result.candidates:
        if each.verdict is not None and each.verdict.kind == "outside":
            lines.append(f"{each.name} is outside the bound on the held-out half.")
        if each.verdict is not None and each.verdict.kind == "not shown":
            more = f"; about {each.verdict.more_units:,} more {unit} would decide it" if each.verdict.more_units else ""
            lines.append(f"{each.name} is not shown to be within the bound on the held-out half{more}.")
    if result.winner is None:
        lines += ["No funnel qualifies.", *closest(result)]
    for rival, ratio, latency in result.where_it_loses():
        lines.append(
            f"A funnel loses here: {rival.name} take {latency.ratio:.3f} of the time and keep {ratio.value:.3f} of the "
            "score."
        )
    for each, ratio, latency in result.within_bound():
        if each.kind == "dtype" and latency.ratio < 1:
            lines.append(
                f"Without a funnel, {each.name} take {latency.ratio:.3f} of the time and keep {ratio.value:.3f} of the "
                "score. A funnel can be used with them: plan again with --dtype int8."
            )
    if result.winner is not None:
        lines += [
            f"{result.winner} keeps at least {bound:g} of the score. Use it:",
            f'  {type(parse_funnel(result.winner)).__name__}.parse("{result.winner}")',
            f"  --funnel {result.winner}",
            f"  funnel convert {shlex.quote(str(checkpoint))} NEW --funnel {result.winner}",
        ]
    return lines


def closest(result: "Plan") -> list[str]:
    """Why no funnel was certified."""
    bound = 1 - result.options["max_loss"]
    scored = [(each, each.ratio) for each in result.candidates if each.kind == "funnel" and each.ratio]
    if not scored:
        return ["On texts of these lengths no funnel computes less than the model without one."]
    best, ratio = max(scored, key=lambda pair: pair[1].value)
    if ratio.high < bound:
        return [
            f"The best of them, {best.name}, keeps {ratio.value:.3f}; train the checkpoint for a funnel, or allow more."
        ]
    return []
