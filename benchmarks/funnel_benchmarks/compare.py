"""The command `funnel bench compare`: whether one result is slower than another."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import click
from rich.markup import escape
from rich.table import Table

from funnel_benchmarks.results import SAME_MACHINE, Row, differences, figures, read_results
from funnel_benchmarks.statistics import Spread, ratio_of_medians
from funnel_benchmarks.suite_command import FILE, screen
from funnel_kernels.errors import ConfigError, InputError

STYLES = {"slower": "red", "faster": "green", "unclear": "yellow", "same": ""}


class Comparison(NamedTuple):
    """One figure in two results: medians, and the ratio second / first inside its confidence interval."""

    name: str
    first: float
    second: float
    ratio: Spread
    verdict: str


@click.command()
@click.argument("first", metavar="A.json", type=FILE)
@click.argument("second", metavar="B.json", type=FILE)
@click.option(
    "--threshold",
    type=float,
    default=0.05,
    show_default=True,
    help="The relative difference that matters; 0.05 is five per cent.",
)
def compare(first: Path, second: Path, threshold: float) -> None:
    """Compare two results of the same suite, figure by figure: is B slower than A?

    Shows B / A of the medians with a 95 % confidence interval (bootstrap). A figure is "slower" if the whole interval
    lies above 1 + threshold, "faster" if it lies below 1 - threshold, "same" if it lies between the two, and "unclear"
    if it reaches across one of them: then take more samples. Exit status 1: a figure is slower.

    Example: funnel bench compare before.json after.json --threshold 0.03
    """
    if not 0 <= threshold < 1:
        raise ConfigError(f"--threshold {threshold} must be at least 0 and below 1; 0.05 is five per cent")
    before, after = read_results(first), read_results(second)
    console = screen()
    for line in [*circumstances(before, after), *left_over(before, after)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    compared = compare_results(before, after, threshold)
    console.print(shown(compared))
    counts = Counter(each.verdict for each in compared)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in STYLES)
    console.print(f"{summary}; threshold {100 * threshold:g} %", highlight=False)
    if counts["slower"]:
        raise SystemExit(1)


def circumstances(first: Row, second: Row) -> list[str]:
    """A line for everything that differs between two results apart from what was measured.

    Raises:
        InputError: they are of different suites.
    """
    if first["suite"] != second["suite"]:
        raise InputError(
            f"suite {first['suite']!r} cannot be compared with {second['suite']!r}; give two results of one suite"
        )
    lines = [
        f"warning: {name} is not complete: its run was stopped"
        for name, result in (("A", first), ("B", second))
        if not result["complete"]
    ]
    changed = [(f"options.{name}", *values) for name, *values in differences(first["options"], second["options"])]
    changed += [(f"machine.{name}", *values) for name, *values in differences(machines(first), machines(second))]
    for name, before, after in changed:
        matters = name.startswith("options.") or name.removeprefix("machine.") in SAME_MACHINE
        lines.append(f"{'warning: ' if matters else ''}{name}: {before} in A, {after} in B")
    return lines


def machines(result: Row) -> dict[str, str]:
    """The facts about the machine by name; all values, if runs that went on with the file had others."""
    runs = [result["machine"], *(run["machine"] for run in result["resumed"])]
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: " and ".join(dict.fromkeys(show(run.get(name)) for run in runs)) for name in names}


def show(value: object) -> str:
    return ", ".join(map(show, value)) if isinstance(value, list) else str(value)


def named_figures(result: Row) -> dict[str, Row]:
    """Every figure with samples by its name, "cell: seconds"."""
    return {f"{row['cell']}: {name}": figure for row in result["rows"] for name, figure in figures(row)}


def left_over(first: Row, second: Row) -> list[str]:
    """A line for each figure that only one of two results has."""
    here, there = named_figures(first), named_figures(second)
    return [
        *(f"only in A: {name}" for name in here if name not in there),
        *(f"only in B: {name}" for name in there if name not in here),
    ]


def compare_results(first: Row, second: Row, threshold: float) -> list[Comparison]:
    """Every figure that both results have.

    Raises:
        InputError: there is none.
    """
    here, there = named_figures(first), named_figures(second)
    compared = []
    for name in here:
        if name in there:
            ratio = ratio_of_medians(there[name]["samples"], here[name]["samples"])
            medians = here[name]["median"], there[name]["median"]
            compared.append(Comparison(name, *medians, ratio, judge(ratio, threshold)))
    if not compared:
        raise InputError("the two results have no figure in common; compare two runs of the same cells")
    return compared


def judge(ratio: Spread, threshold: float) -> str:
    """The verdict on a figure of which less is better, from the interval of its ratio."""
    if ratio.low > 1 + threshold:
        return "slower"
    if ratio.high < 1 - threshold:
        return "faster"
    return "same" if ratio.low >= 1 - threshold and ratio.high <= 1 + threshold else "unclear"


def shown(compared: list[Comparison]) -> Table:
    table = Table("figure")
    for title in ("A", "B", "B / A", "95 % interval", "verdict"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in compared:
        low, median, high = (f"{bound:.3f}" for bound in each.ratio)
        cells = (f"{each.first:.4g}", f"{each.second:.4g}", median, f"{low} - {high}", each.verdict)
        table.add_row(escape(each.name), *cells, style=STYLES[each.verdict])
    return table
