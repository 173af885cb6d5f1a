"""The command: `python -m funnel_benchmarks.cpu --json FILE`."""

import importlib.metadata
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from funnel_benchmarks.cpu.bench import BACKEND, Bench
from funnel_benchmarks.cpu.rows import rows
from funnel_benchmarks.cpu.sizes import FULL, SMALL
from funnel_benchmarks.machine import machine_facts
from funnel_benchmarks.results import Cell, Results, Row
from funnel_engine import ConfigError, FunnelError
from funnel_engine.output_files import check_writable

PACKAGES = ("torch", "transformers", "onednn-cpu-gomp")


@click.command()
@click.option("--json", "json_file", required=True, type=click.Path(path_type=Path), help="Written after every row.")
@click.option("--only", metavar="TEXT,TEXT", help="Measure only rows whose name contains one of these.")
@click.option("--small", is_flag=True, help="Tiny sizes, for a rehearsal.")
@click.option("--repeats", type=click.IntRange(min=1), default=10, show_default=True, help="Times A B B A is run.")
def main(json_file: Path, only: str | None, small: bool, repeats: int) -> None:
    """Measure how fast the engine is on this CPU, against what else runs here.

    Exit status 1 if a row failed; a goal that is missed is a result. --only '?' is in no name, so it lists them all.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(SMALL if small else FULL, repeats, Path(folder))
        try:
            check_writable(json_file, (".json",))
            cells = chosen(list(rows(bench)), only)
        except FunnelError as error:
            raise click.ClickException(str(error)) from error
        results = Results(
            json_file,
            suite="cpu",
            options={"small": small, "repeats": repeats, "order": "A B B A", "backend": BACKEND},
            machine=machine_facts() | {package: version_of(package) for package in PACKAGES},
        )
        results.measure_all(cells)
    Console().print(screen(results.rows))
    if results.failed:
        raise SystemExit(1)


def chosen(cells: list[Cell], only: str | None) -> list[Cell]:
    """The cells whose name contains one of the comma-separated texts of `only`; None takes all.

    Raises:
        ConfigError: a text is in no name.
    """
    if only is None:
        return cells
    texts = [text.strip() for text in only.split(",")]
    for text in texts:
        if not any(text in name for name, _ in cells):
            names = "\n  ".join(name for name, _ in cells)
            raise ConfigError(f"--only {only!r}: no row's name contains {text!r}; the rows are\n  {names}")
    return [(name, measure) for name, measure in cells if any(text in name for text in texts)]


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def screen(measured: list[Row]) -> Table:
    """The rows as a table for people."""
    made = Table("what: against")
    for title in ("ours ms", "other ms", "measured", "range", "goal"):
        made.add_column(title, justify="right", no_wrap=True)
    for row in measured:
        made.add_row(*line(row), style={True: "green", False: "red", None: ""}[row["met"]])
    return made


def line(row: Row) -> tuple[str, ...]:
    """One row's cells. Where the goal is missed it has a mark, since not every screen has colours."""
    low, median, high = (f"{row['measured'][name]:.3f}" for name in ("low", "median", "high"))
    goal = "" if row["goal"] is None else f"{row['goal']:g}" + ("" if row["met"] else " missed")
    times = (f"{1e3 * row[name]['median']:,.2f}" if name in row else "" for name in ("seconds", "other_seconds"))
    return row["cell"], *times, f"{median} {row['unit']}", f"{low} - {high}", goal


if __name__ == "__main__":
    main()
