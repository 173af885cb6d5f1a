"""The command `funnel demo`."""

import dataclasses
from pathlib import Path

import click
import numpy as np

from funnel_benchmarks.charts import require_matplotlib
from funnel_benchmarks.demo_model import make_demo_model
from funnel_benchmarks.latency.command import even_layers, measure
from funnel_benchmarks.latency.suite import Batch, Suite
from funnel_benchmarks.models import checkpoint_model
from funnel_engine import FunnelConfig, convert
from funnel_kernels.errors import InputError

MARKER = "made-by-funnel-demo.txt"
SEQUENCES, TOKENS, REPEATS = 2, 512, 5


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for everything the demo makes.",
)
def demo(output: Path) -> None:
    """Make a small model, run it with and without a funnel, and show the difference.

    Takes about two minutes on two cores and downloads nothing: the model has random weights, which latency does not
    depend on. Writes latency.json, latency.png and latency.html into the folder.
    """
    require_matplotlib()
    source, converted, marker = output / "hugging-face", output / "checkpoint", output / MARKER
    try:
        if output.exists() and any(output.iterdir()) and not marker.exists():
            raise InputError(
                f"folder {output} contains files of yours, which the demo would replace; choose a new --output"
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
    suite = Suite(
        model=model,
        funnels=tuple(FunnelConfig.after(layer) for layer in even_layers(model.config.num_layers)),
        batches=(Batch(np.full(SEQUENCES, TOKENS, np.int32)),),
        backend="auto",
        repeats=REPEATS,
    )
    json_file, plot_file, html_file = (output / f"latency.{ending}" for ending in ("json", "png", "html"))
    measure(suite, json=json_file, plot=plot_file, html=html_file)
