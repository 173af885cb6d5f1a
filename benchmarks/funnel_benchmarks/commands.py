"""The commands `funnel bench` and `funnel demo`."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from funnel_benchmarks import table
from funnel_benchmarks.demo_model import make_demo_model
from funnel_benchmarks.latency import SEED, Result, Suite, run_suite
from funnel_benchmarks.layers import even_layers, parse_layers
from funnel_benchmarks.lengths import PRESETS as LENGTH_PRESETS
from funnel_benchmarks.lengths import describe as describe_lengths
from funnel_benchmarks.lengths import draw
from funnel_benchmarks.memory import check_memory
from funnel_benchmarks.models import Model, checkpoint_model, preset_model
from funnel_benchmarks.plot import render, require_matplotlib
from funnel_benchmarks.report import render_html
from funnel_engine import FunnelConfig, convert
from funnel_engine.config import RECOVERIES
from funnel_engine.output_files import check_writable, write_bytes, write_text
from funnel_engine.presets import PRESETS
from funnel_engine.weights import DTYPES
from funnel_kernels.errors import ConfigError, InputError
from funnel_kernels.pool import POOLS

PLOT_ENDINGS = (".png", ".svg", ".pdf")
DEMO_MARKER = "made-by-funnel-demo.txt"
DEMO_SEQUENCES, DEMO_TOKENS, DEMO_REPEATS = 2, 512, 5
FILE = click.Path(path_type=Path)


@click.command()
@click.option("--preset", "preset_name", help=f"Architecture to run with random weights: {', '.join(PRESETS)}.")
@click.option("--checkpoint", type=FILE, help="Or a folder that `funnel convert` has made.")
@click.option(
    "--seq-len", type=click.IntRange(1, 2**20), default=512, show_default=True, help="Tokens of each sequence."
)
@click.option("--batch", type=click.IntRange(1, 2**20), default=128, show_default=True, help="Sequences in the batch.")
@click.option(
    "--lengths",
    help="Draw lengths, whatever --seq-len says: the name of a data set whose lengths are imitated "
    f"({', '.join(LENGTH_PRESETS)}), or a file with one length a line.",
)
@click.option(
    "--layers",
    help="How many full-length layers come before the funnel, one row of the result for each; dots carry the last "
    "step on: 2,4,...,16. Default: every even number.",
)
@click.option("--stride", type=int, default=2, show_default=True, help="Tokens that are pooled into one.")
@click.option("--pool", type=click.Choice(POOLS), default="max", show_default=True, help="How they are pooled.")
@click.option(
    "--recovery", type=click.Choice(["none", *RECOVERIES]), default="none", show_default=True,
    help="How each token gets a row of its own again at the end.",
)  # fmt: skip
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help="Of weights and activations. Default: bfloat16, or the checkpoint's.",
)
@click.option("--backend", default="auto", show_default=True, help="What runs the kernels; see `funnel doctor`.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=10, show_default=True,
    help="How often baseline, funnel, funnel, baseline are run for each row.",
)  # fmt: skip
@click.option("--json", "json_file", type=FILE, help="Write all figures here, for programs.")
@click.option("--plot", "plot_file", type=FILE, help=f"Draw them here; {', '.join(PLOT_ENDINGS)}.")
@click.option("--html", "html_file", type=FILE, help="Write a report here that opens in any browser.")
def bench(
    preset_name: str | None,
    checkpoint: Path | None,
    seq_len: int,
    batch: int,
    lengths: str | None,
    layers: str | None,
    stride: int,
    pool: str,
    recovery: str,
    dtype: str | None,
    backend: str,
    repeats: int,
    json_file: Path | None,
    plot_file: Path | None,
    html_file: Path | None,
) -> None:
    """Measure how much time a funnel saves.

    Runs one batch with the funnel in each of several places, in turns with the same engine without it, and prints
    latencies, their ratio and the ratio that the saved operations would allow at best.

    Example: funnel bench --preset gemma-2b --batch 4 --layers 2,8,14 --json gemma.json --html gemma.html
    """
    for path, endings in ((json_file, (".json",)), (plot_file, PLOT_ENDINGS), (html_file, (".html",))):
        if path is not None:
            check_writable(path, endings)
    if plot_file or html_file:
        require_matplotlib()
    model = choose_model(preset_name, checkpoint, dtype)
    suite = make_suite(
        model,
        layers=parse_layers(layers, model.config.num_layers)
        if layers is not None
        else even_layers(model.config.num_layers),
        stride=stride,
        pool=pool,
        recovery=None if recovery == "none" else recovery,
        backend=backend,
        lengths=draw(lengths, batch, SEED) if lengths is not None else np.full(batch, seq_len, np.int32),
        lengths_source=describe_lengths(lengths) if lengths is not None else "all equal",
        repeats=repeats,
    )
    measure(suite, model, json_file, plot_file, html_file)


@click.command()
@click.option(
    "--output", type=FILE, default=Path("demo"), show_default=True, help="Folder for everything the demo makes."
)
def demo(output: Path) -> None:
    """Make a small model, run it with and without a funnel, and show the difference.

    Takes about two minutes on two cores and downloads nothing: the model has random weights, which latency does not
    depend on. Writes latency.json, latency.png and latency.html into the folder.
    """
    require_matplotlib()
    source, converted, marker = output / "hugging-face", output / "checkpoint", output / DEMO_MARKER
    try:
        if output.exists() and any(output.iterdir()) and not marker.exists():
            raise InputError(
                f"folder {output} holds files of yours, which the demo would replace; choose a new --output"
            )
        source.mkdir(parents=True, exist_ok=True)
        marker.write_text("Everything in this folder is made, and replaced, by `funnel demo`.\n")
        make_demo_model(source)
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or source}: {error.strerror or error}; choose another --output"
        ) from error
    convert(source, converted, dtype="bfloat16", overwrite=True)
    click.echo(f"Made a small Gemma in {source}, and converted it to {converted}\n")
    model = dataclasses.replace(checkpoint_model(converted, None), name="demo", weights="random")
    suite = make_suite(
        model,
        layers=even_layers(model.config.num_layers),
        stride=2,
        pool="max",
        recovery=None,
        backend="auto",
        lengths=np.full(DEMO_SEQUENCES, DEMO_TOKENS, np.int32),
        lengths_source="all equal",
        repeats=DEMO_REPEATS,
    )
    measure(suite, model, *(output / f"latency.{ending}" for ending in ("json", "png", "html")))


def choose_model(preset_name: str | None, checkpoint: Path | None, dtype: str | None) -> Model:
    if preset_name is not None and checkpoint is None:
        return preset_model(preset_name, dtype)
    if checkpoint is not None and preset_name is None:
        return checkpoint_model(checkpoint, dtype)
    raise ConfigError("give either --preset NAME or --checkpoint FOLDER, to say which model is measured")


def make_suite(model: Model, **options: Any) -> Suite:
    return Suite(
        model=model.name, weights=model.weights, config=model.config, head=model.head, dtype=model.dtype, **options
    )


def measure(suite: Suite, model: Model, json_file: Path | None, plot_file: Path | None, html_file: Path | None) -> None:
    """Runs the suite, prints each row when it is there, and writes the files."""
    console = Console()

    def show(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    def on_result(result: Result) -> None:
        if json_file:
            write_text(json_file, json.dumps(result, indent=2) + "\n")
        lines = [table.row_line(result["rows"][-1])] if result["rows"] else table.introduction(result["header"])
        show("\n".join(lines))

    check_memory(suite.config, suite.head, suite.dtype, suite.rows(FunnelConfig()))
    weights = model.load(console, suite.backend)
    with progress_bar(console, total=len(suite.layers) * (1 + suite.repeats)) as advance:
        result = run_suite(suite, weights, on_result=on_result, advance=advance)
    show("\n".join(table.conclusion(result)))
    if plot_file:
        write_bytes(plot_file, render(result, plot_file.suffix[1:]))
    if html_file:
        write_text(html_file, render_html(result))
    for what, path in (("figures", json_file), ("plot", plot_file), ("report", html_file)):
        if path:
            show(f"{what:<7} {path}")


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Callable[[], object]]:
    """Shows how much is done and the time left; yields the function that advances it by one."""
    columns = (
        TextColumn("Measuring"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %, time left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
