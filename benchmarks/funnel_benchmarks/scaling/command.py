"""The command `funnel bench scaling`."""

from functools import partial
from pathlib import Path

import click
from rich.console import Console

from funnel_benchmarks.machine import machine_facts
from funnel_benchmarks.memory import check_memory
from funnel_benchmarks.models import preset_model
from funnel_benchmarks.plot_style import render, require_matplotlib
from funnel_benchmarks.results import Results
from funnel_benchmarks.scaling import table
from funnel_benchmarks.scaling.axes import AXES, SHORTEST
from funnel_benchmarks.scaling.plot import draw
from funnel_benchmarks.scaling.suite import Suite, cells
from funnel_engine.output_files import check_writable, write_bytes
from funnel_engine.presets import PRESETS
from funnel_engine.weights import DTYPES
from funnel_kernels.errors import ConfigError

PLOT_ENDINGS = (".png", ".svg", ".pdf")
FILE = click.Path(path_type=Path)


@click.command()
@click.option(
    "--preset", default="embeddinggemma-300m", show_default=True,
    help=f"Architecture, with random weights: {', '.join(PRESETS)}.",
)  # fmt: skip
@click.option("--depth", type=int, help="Keep only so many of its first layers. Default: all.")
@click.option(
    "--layer", type=click.IntRange(min=0),
    help="How many full-length layers come before the 2:1 funnel. Default: a sixth of the layers, at least 1.",
)  # fmt: skip
@click.option(
    "--axis", "axes", multiple=True, type=click.Choice(list(AXES)), default=list(AXES),
    help="Only this one; can be given several times. "
    f"{'; '.join(f'{axis}: {text}' for axis, text in AXES.items())}. Default: all.",
)  # fmt: skip
@click.option(
    "--most-tokens", type=click.IntRange(SHORTEST, 2**20), default=16384, show_default=True,
    help="Of the largest batch.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True,
    help="Of weights and activations.",
)  # fmt: skip
@click.option("--backend", default="auto", show_default=True, help="What runs the kernels; see `funnel doctor`.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True,
    help="How often no funnel, funnel, funnel, no funnel are run for each row.",
)  # fmt: skip
@click.option("--json", "json_file", type=FILE, help="Write all figures here, for programs, after every row.")
@click.option("--resume", is_flag=True, help="Keep the rows that the file of --json has, and measure those it lacks.")
@click.option("--plot", "plot_file", type=FILE, help=f"Draw latency over size here; {', '.join(PLOT_ENDINGS)}.")
def scaling(
    preset: str,
    depth: int | None,
    layer: int | None,
    axes: tuple[str, ...],
    most_tokens: int,
    dtype: str,
    backend: str,
    repeats: int,
    json_file: Path | None,
    resume: bool,
    plot_file: Path | None,
) -> None:
    """Measure how latency and memory grow with the size of the work, with a funnel and without.

    At the end stand the exponents of the power laws that fit best: how latency grows with each size, how the
    floating-point operations do, and the one with the other. Exit status 1: a row failed.

    Example: funnel bench scaling --axis tokens --axis depth --json scaling.json --plot scaling.png
    """
    for path, endings in ((json_file, (".json",)), (plot_file, PLOT_ENDINGS)):
        if path is not None:
            check_writable(path, endings)
    if plot_file:
        require_matplotlib()
    if resume and json_file is None:
        raise ConfigError("--resume goes on with the file of --json; name it")
    model = preset_model(preset, dtype, depth)
    place = max(1, model.config.num_layers // 6) if layer is None else layer
    suite = Suite(model=model, axes=axes, layer=place, most_tokens=most_tokens, backend=backend, repeats=repeats)
    check_memory(model.config, model.head, model.dtype, SHORTEST)  # larger batches are left out one by one
    console = Console()
    results = Results(
        json_file,
        suite="scaling",
        options=suite.options(),
        machine=machine_facts(),
        resume=resume,
        show=table.row_line,
        console=console,
    )
    for line in table.introduction(results.content):
        results.tell(line)
    weights = model.load(console, backend)
    results.measure_all(cells(suite, weights, advance=lambda: results.advance()), steps=1 + repeats)
    for line in table.conclusion(results.content):
        results.tell(line)
    if plot_file and results.rows:
        write_bytes(plot_file, render(partial(draw, results.content), plot_file.suffix[1:]))
    for what, path in (("figures", json_file), ("plot", plot_file)):
        if path and path.exists():
            results.tell(f"{what:<7} {path}")
    if results.failed:
        raise SystemExit(1)
