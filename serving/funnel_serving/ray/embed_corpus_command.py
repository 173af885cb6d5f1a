"""The command `funnel embed-corpus`. It imports late what the extra `ray` installs: `funnel --help` loads this file."""

import importlib.util
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from funnel_engine.cli import funnel_option
from funnel_engine.config import Funnel
from funnel_engine.weights import DTYPES
from funnel_kernels.errors import ConfigError

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)


@click.command("embed-corpus")
@click.argument("corpus", type=PATH)
@click.option("--checkpoint", type=PATH, required=True, help="Folder that `funnel convert` wrote.")
@click.option("--output", "-o", type=PATH, required=True, help="Folder of the Parquet files to write.")
@click.option("--id-column", default="id", show_default=True, help="Column of texts or integers; each must be unique.")
@click.option("--text-column", default="text", show_default=True, help="Column of the texts.")
@click.option("--prompt-name", help="Name of the checkpoint's prompt to put before each text.")
@click.option("--truncate", is_flag=True, help="Cut off the end of texts that are too long.")
@click.option("--truncate-dim", type=COUNT, help="Keep only this many dimensions of each vector.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of weights. Default: the checkpoint's.")
@click.option("--rows-per-chunk", type=COUNT, default=8192, show_default=True, help="Rows of a file of the output.")
@click.option("--address", help="Of the Ray cluster. Default: RAY_ADDRESS, or this machine.")
@click.option("--workers", type=COUNT, help="Number of workers. Default: one for each node.")
@click.option("--cpus-per-worker", type=COUNT, help="CPUs of a worker. Default: all of the smallest node.")
@click.option("--gpus-per-worker", type=click.FloatRange(min=0), default=0, show_default=True, help="GPUs of a worker.")
@funnel_option("that of the checkpoint")
def embed_corpus(
    corpus: Path,
    checkpoint: Path,
    output: Path,
    id_column: str,
    text_column: str,
    prompt_name: str | None,
    truncate: bool,
    truncate_dim: int | None,
    dtype: str | None,
    rows_per_chunk: int,
    address: str | None,
    workers: int | None,
    cpus_per_worker: int | None,
    gpus_per_worker: float,
    funnel: Funnel | None,
) -> None:
    """Embed a CORPUS, a file or folder of .parquet or .jsonl, on a Ray cluster.

    Every row of the corpus is once in the output, with its id and its vector, or with the reason why it has none. If
    the command or one of its workers is killed, run it again: it goes on where it was.

    Example: funnel embed-corpus articles/ --checkpoint my-gemma --output vectors
    """
    require_packages()
    from funnel_serving.ray.corpus import Columns
    from funnel_serving.ray.embed_corpus import Job, Workers
    from funnel_serving.ray.embed_corpus import embed_corpus as run

    options = {
        "prompt_name": prompt_name,
        "truncate": truncate,
        "truncate_dim": truncate_dim,
        "dtype": dtype,
        "funnel": None if funnel is None else str(funnel),
    }
    job = Job(corpus, checkpoint, output, Columns(id_column, text_column), rows_per_chunk, options)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Chunks")
        counts = run(
            job,
            Workers(workers, cpus_per_worker, gpus_per_worker),
            address,
            lambda finished, total: bar.update(task, completed=finished, total=total),
        )
    click.echo(f"Wrote {counts['rows']} rows to {counts['parts']} files in {output}; {counts['errors']} have an error")


def require_packages() -> None:
    """Raises `ConfigError` if the packages of the extra `ray` are not installed."""
    for package in ("ray", "pyarrow"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{package} is not installed; run: pip install 'funnel-engine[ray]'")
