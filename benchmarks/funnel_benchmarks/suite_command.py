"""What the commands of all suites share: options, checks of their files, and the run itself."""

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from funnel_benchmarks.charts import render, require_matplotlib
from funnel_benchmarks.describe import describe_machine
from funnel_benchmarks.lengths import PRESETS as LENGTH_PRESETS
from funnel_benchmarks.machine import machine_facts
from funnel_benchmarks.report.page import render_page
from funnel_benchmarks.results import LeftOut, Measurement, Results, Row
from funnel_benchmarks.suite import Suite, row_line, terminal_table
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.output_files import check_writable, write_bytes, write_text
from funnel_engine.presets import PRESETS
from funnel_engine.weights import DTYPES
from funnel_kernels.errors import ConfigError

FILE = click.Path(path_type=Path)
WIDE = 200  # columns
PLOT_ENDINGS = (".png", ".svg", ".pdf")

preset_option = click.option(
    "--preset",
    default="embeddinggemma-300m",
    show_default=True,
    help=f"Architecture, with random weights: {', '.join(PRESETS)}.",
)
depth_option = click.option("--depth", type=int, help="Keep only this many of its first layers. Default: all.")
layer_option = click.option(
    "--layer",
    type=click.IntRange(min=0),
    help="How many full-length layers come before the 2:1 funnel. Default: a sixth of the layers, at least 1.",
)
dtype_option = click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True, help="Of weights."
)
backend_option = click.option(
    "--backend", default="auto", show_default=True, help="What runs the engine's kernels; see `funnel doctor`."
)
minutes_option = click.option(
    "--minutes",
    type=float,
    default=9.0,
    show_default=True,
    help="No measurement begins after this time; one that has begun is finished.",
)
small_option = click.option("--small", is_flag=True, help="Sizes for a rehearsal on a CPU.")
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), help="Of the random data of checks. Default: another one every time."
)
repeats_option = click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How often both sides are run in turns, A B B A, for each row.",
)


def lengths_option(*default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds `--lengths`; the command gets a tuple of what `lengths.draw` takes, as `lengths`."""
    return click.option(
        "--lengths",
        multiple=True,
        default=(",".join(default),),
        show_default=True,
        callback=lambda context, parameter, given: tuple(word for each in given for word in each.split(",")),
        help="Tokens of the sequences, one line of the result for each: a number, which all of them have; a data set "
        f"whose lengths are imitated ({', '.join(LENGTH_PRESETS)}); or a file with one length a line. Commas separate "
        "several.",
    )


def file_options(*, plot: str = "", html: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the options of a run's files. They are checked first; the command gets them as `files`, which `run` takes.

    Args:
        plot: what `--plot` draws; empty: the command does not have the option.
        html: whether there is `--html`.
    """
    options = [
        click.option("--json", type=FILE, help="Write all figures here, for programs, after every row."),
        click.option("--resume", is_flag=True, help="Keep the rows in the file of --json, and measure those it lacks."),
    ]
    if plot:
        options.append(click.option("--plot", type=FILE, help=f"Draw {plot} here; {', '.join(PLOT_ENDINGS)}."))
    if html:
        options.append(click.option("--html", type=FILE, help="Write a report here that opens in any browser."))

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def checked(*arguments: Any, **given: Any) -> Any:
            files = {name: given.pop(name) for name in ("json", "resume", "plot", "html") if name in given}
            check_files(**files)
            return command(*arguments, files=files, **given)

        for option in reversed(options):
            checked = option(checked)
        return checked

    return decorate


def deadline(minutes: float) -> float:
    """When `--minutes` are over, as `time.monotonic` counts.

    Raises:
        ConfigError: they are below 0.
    """
    if not minutes >= 0:
        raise ConfigError(f"--minutes {minutes} is not 0 or more; give the minutes that the run may take")
    return time.monotonic() + 60 * minutes


def funnel_place(layer: int | None, config: EncoderConfig) -> int:
    """The value of `--layer`, or its default."""
    return max(1, config.num_layers // 6) if layer is None else layer


def check_files(
    *, json: Path | None = None, resume: bool = False, plot: Path | None = None, html: Path | None = None
) -> None:
    """Checks before a run that its files can be written after it.

    Raises:
        InputError: a name with another ending, or a folder that does not exist.
        ConfigError: a picture without matplotlib, or `--resume` without a file.
    """
    for path, endings in ((json, (".json",)), (plot, PLOT_ENDINGS), (html, (".html",))):
        if path is not None:
            check_writable(path, endings)
    if plot or html:
        require_matplotlib()
    if resume and json is None:
        raise ConfigError("--resume adds to the file of --json; name that file")


def run(
    suite: Suite,
    *,
    json: Path | None = None,
    resume: bool = False,
    plot: Path | None = None,
    html: Path | None = None,
    until: float = math.inf,
) -> None:
    """Measures a suite: prints each row when it is measured, then tables and findings, and writes all files.

    Exit status 1: a row failed.

    Args:
        until: when no further cell may begin, as `time.monotonic` counts.
    """
    options = suite.options()
    results = Results(json, suite=suite.name, options=options, machine=machine_facts(), resume=resume, console=screen())
    results.show = partial(row_line, suite.section, results.content)
    section = suite.section(results.content)
    results.tell(section.title, *(f"{name}: {text}" for name, text in section.facts.items() if text))
    results.tell(f"Machine: {describe_machine(results.content['machine'])}", "")
    results.measure_all(within(until, suite.cells(results)), steps=suite.steps)
    told, section = section.facts, suite.section(results.content)
    for table in section.filled:
        results.console.print("", terminal_table(table))
    if section.summary:
        results.tell("", section.summary)
    results.tell(*(f"{name}: {text}" for name, text in section.facts.items() if text and name not in told))
    if plot and section.plots:
        write_bytes(plot, render(section.plots[0], plot.suffix[1:]))
        results.tell(f"plot    {plot}")
    if html and results.rows:
        write_text(html, render_page(section.title, [(results.content, section)]))
        results.tell(f"report  {html}")
    if results.path is not None and not results.kept:
        results.tell(f"figures {results.path}")
    if results.failed:
        raise SystemExit(1)


def within(until: float, cells: Iterable[Measurement]) -> Iterator[Measurement]:
    """The same cells, which are left out if their turn comes too late."""

    def measured(measure: Callable[[], Row]) -> Row:
        if time.monotonic() >= until:
            raise LeftOut("not measured: out of time")
        return measure()

    return ((name, partial(measured, measure)) for name, measure in cells)


def screen() -> Console:
    """Standard output; where it is not a terminal, as wide as a table of many columns."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)
