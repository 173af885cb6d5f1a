"""The command `funnel bench serve`."""

from functools import partial
from pathlib import Path

import click
from rich.console import Console

from funnel_benchmarks.lengths import PRESETS as LENGTH_PRESETS
from funnel_benchmarks.machine import machine_facts
from funnel_benchmarks.memory import check_memory
from funnel_benchmarks.models import preset_model
from funnel_benchmarks.plot_style import render, require_matplotlib
from funnel_benchmarks.results import Results
from funnel_benchmarks.serve import table
from funnel_benchmarks.serve.plot import draw
from funnel_benchmarks.serve.suite import Suite, cells
from funnel_engine import FunnelConfig
from funnel_engine.output_files import check_writable, write_bytes
from funnel_engine.presets import PRESETS
from funnel_engine.weights import DTYPES
from funnel_kernels.errors import ConfigError

PLOT_ENDINGS = (".png", ".svg", ".pdf")
LENGTHS = ("conll", "agnews", "passage")
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
    "--lengths", multiple=True, default=LENGTHS, show_default=True,
    help="A data set whose lengths of sequences are imitated, or a file with one length a line. Can be given several "
    f"times. Data sets: {', '.join(LENGTH_PRESETS)}.",
)  # fmt: skip
@click.option(
    "--requests", type=click.IntRange(1, 2**20), default=1000, show_default=True,
    help="For each line of the result. A p99 that is precise needs 10000.",
)  # fmt: skip
@click.option(
    "--max-batch-tokens", type=click.IntRange(1, 2**24), default=4096, show_default=True,
    help="What a batch holds. A batch takes no more than what waits, so this bounds only how long a burst is on its "
    "way at once; the default is enough for matrix products to run at full rate.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True,
    help="Of weights and activations.",
)  # fmt: skip
@click.option("--backend", default="auto", show_default=True, help="What runs the kernels; see `funnel doctor`.")
@click.option("--json", "json_file", type=FILE, help="Write all figures here, for programs, after every row.")
@click.option("--resume", is_flag=True, help="Keep the rows that the file of --json has, and measure those it lacks.")
@click.option("--plot", "plot_file", type=FILE, help=f"Draw latency over rate here; {', '.join(PLOT_ENDINGS)}.")
def serve(
    preset: str,
    depth: int | None,
    layer: int | None,
    lengths: tuple[str, ...],
    requests: int,
    max_batch_tokens: int,
    dtype: str,
    backend: str,
    json_file: Path | None,
    resume: bool,
    plot_file: Path | None,
) -> None:
    """Measure latencies of requests that arrive by chance, with a funnel and without.

    Requests of one sequence each arrive as a Poisson process, whatever the engine is doing (an open loop), at several
    shares of the rate at which it can serve them when all are there at once. Both engines see the same arrivals.
    Exit status 1: a row failed.

    Example: funnel bench serve --lengths conll --requests 10000 --json serve.json --plot serve.png
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
    suite = Suite(
        model=model, funnel=FunnelConfig.after(place), sources=lengths, count=requests,
        max_batch_tokens=max_batch_tokens, backend=backend,
    )  # fmt: skip
    check_memory(model.config, model.head, model.dtype, max_batch_tokens)
    console = Console()
    results = Results(
        json_file,
        suite="serve",
        options=suite.options(),
        machine=machine_facts(),
        resume=resume,
        show=table.row_line,
        console=console,
    )
    for line in table.introduction(results.content):
        results.tell(line)
    results.measure_all(cells(suite, model.load(console, backend), results.rows))
    if plot_file and any("latency" in row for row in results.rows):
        write_bytes(plot_file, render(partial(draw, results.content), plot_file.suffix[1:]))
    for what, path in (("figures", json_file), ("plot", plot_file)):
        if path and path.exists():
            results.tell(f"{what:<7} {path}")
    if results.failed:
        raise SystemExit(1)
