"""What the commands of all suites share: options, checks of their files, and how a run begins and ends."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from funnel_benchmarks.machine import machine_facts
from funnel_benchmarks.plot_style import render, require_matplotlib
from funnel_benchmarks.results import Results, Row
from funnel_engine import ModelConfig
from funnel_engine.output_files import check_writable, write_bytes
from funnel_engine.presets import PRESETS
from funnel_engine.weights import DTYPES
from funnel_kernels.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = click.Path(path_type=Path)
PLOT_ENDINGS = (".png", ".svg", ".pdf")

preset_option = click.option(
    "--preset", default="embeddinggemma-300m", show_default=True,
    help=f"Architecture, with random weights: {', '.join(PRESETS)}.",
)  # fmt: skip
depth_option = click.option("--depth", type=int, help="Keep only so many of its first layers. Default: all.")
layer_option = click.option(
    "--layer", type=click.IntRange(min=0),
    help="How many full-length layers come before the 2:1 funnel. Default: a sixth of the layers, at least 1.",
)  # fmt: skip
dtype_option = click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True,
    help="Of weights and activations.",
)  # fmt: skip
backend_option = click.option(
    "--backend", default="auto", show_default=True, help="What runs the engine's kernels; see `funnel doctor`."
)
repeats_option = click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True,
    help="How often both sides are run in turns, A B B A, for each row.",
)  # fmt: skip
json_option = click.option(
    "--json", "json_file", type=FILE, help="Write all figures here, for programs, after every row."
)
resume_option = click.option(
    "--resume", is_flag=True, help="Keep the rows that the file of --json has, and measure those it lacks."
)


def plot_option(what: str) -> Callable[[Any], Any]:
    return click.option("--plot", "plot_file", type=FILE, help=f"Draw {what} here; {', '.join(PLOT_ENDINGS)}.")


def funnel_place(layer: int | None, config: ModelConfig) -> int:
    """The value of `--layer`, or its default."""
    return max(1, config.num_layers // 6) if layer is None else layer


def check_files(
    *, json: Path | None = None, resume: bool = False, plot: Path | None = None, html: Path | None = None
) -> None:
    """Finds out beforehand which file of a run could not be written after it.

    Raises:
        InputError: a name that ends otherwise than such files do, or a place where none can be made.
        ConfigError: a picture without matplotlib, or `--resume` without a file to go on with.
    """
    for path, endings in ((json, (".json",)), (plot, PLOT_ENDINGS), (html, (".html",))):
        if path is not None:
            check_writable(path, endings)
    if plot or html:
        require_matplotlib()
    if resume and json is None:
        raise ConfigError("--resume goes on with the file of --json; name it")


def begin(suite: str, table: ModuleType, options: Row, json_file: Path | None, resume: bool) -> Results:
    """The results of a run that begins now, after its introduction.

    Args:
        table: the suite's module with `introduction(content) -> lines` and `row_line(row) -> line`.
    """
    results = Results(
        json_file,
        suite=suite,
        options=options,
        machine=machine_facts(),
        resume=resume,
        show=table.row_line,
        console=Console(),
    )
    results.tell(*table.introduction(results.content))
    return results


def write_plot(results: Results, file: Path, draw: Callable[..., "Figure"]) -> None:
    """Writes the picture of all results that a suite's `draw(content, look)` makes, and tells where it is."""
    write_bytes(file, render(partial(draw, results.content), file.suffix[1:]))
    results.tell(f"plot    {file}")


def end(results: Results) -> None:
    """Tells where the figures are. Exit status 1 if a row failed."""
    if results.path is not None and not results.kept:
        results.tell(f"figures {results.path}")
    if results.failed:
        raise SystemExit(1)
