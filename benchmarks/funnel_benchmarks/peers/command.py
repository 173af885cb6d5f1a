"""The command `funnel bench peers`."""

import tempfile
from pathlib import Path

import click
import numpy as np
from rich.console import Console

from funnel_benchmarks.lengths import PRESETS as LENGTH_PRESETS
from funnel_benchmarks.lengths import draw
from funnel_benchmarks.machine import machine_facts
from funnel_benchmarks.memory import check_memory
from funnel_benchmarks.peers import table
from funnel_benchmarks.peers.batches import ORDERS
from funnel_benchmarks.peers.suite import PEERS, SCENARIOS, SEED, Suite, cells, model_fields
from funnel_benchmarks.results import Results
from funnel_engine import HeadConfig
from funnel_engine.output_files import check_writable
from funnel_engine.packing import Ints
from funnel_kernels.errors import ConfigError, InputError

LENGTHS = ("conll", "qnli", "passage")
FILE = click.Path(path_type=Path)


@click.command()
@click.option("--preset", default="embeddinggemma-300m", show_default=True, help="Architecture, with random weights.")
@click.option("--depth", type=int, help="Keep only so many of its first layers. Default: all.")
@click.option(
    "--lengths", multiple=True, default=LENGTHS, show_default=True,
    help="A data set whose lengths of sequences are imitated, a file with one length a line, or a number: all "
    f"sequences have so many tokens. Can be given several times. Data sets: {', '.join(LENGTH_PRESETS)}.",
)  # fmt: skip
@click.option(
    "--sequences", type=click.IntRange(1, 2**20), default=64, show_default=True, help="For each of --lengths."
)
@click.option(
    "--peer", "peers", multiple=True, type=click.Choice(list(PEERS)), default=list(PEERS),
    help="Only this one; can be given several times. Default: all.",
)  # fmt: skip
@click.option(
    "--scenario", "scenarios", multiple=True, type=click.Choice(SCENARIOS), default=SCENARIOS,
    help="Only this one: all sequences in one call, or one after another. Default: both.",
)  # fmt: skip
@click.option(
    "--order", type=click.Choice(ORDERS), default="sorted", show_default=True,
    help="Of the sequences in the peers' batches: the longest first, or as they come.",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Most sequences in a peer's batch."
)
@click.option("--backend", default="auto", show_default=True, help="What runs our kernels; see `funnel doctor`.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Times A B B A is run.")
@click.option("--json", "json_file", type=FILE, help="Write all figures here, for programs, after every row.")
@click.option("--resume", is_flag=True, help="Keep the rows that the file of --json has, and measure those it lacks.")
def peers(
    preset: str,
    depth: int | None,
    lengths: tuple[str, ...],
    sequences: int,
    peers: tuple[str, ...],
    scenarios: tuple[str, ...],
    order: str,
    batch_size: int,
    backend: str,
    repeats: int,
    json_file: Path | None,
    resume: bool,
) -> None:
    """Compare the engine with what else runs such a model, on the same weights and inputs.

    A peer that is not installed is left out. Results are compared before anything is timed. Exit status 1: a row
    failed, for instance because a peer computes something else.

    Example: funnel bench peers --lengths conll --lengths 256 --peer hugging-face-compiled --json peers.json
    """
    if json_file is not None:
        check_writable(json_file, (".json",))
    elif resume:
        raise ConfigError("--resume goes on with the file of --json; name it")
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(
            fields=model_fields(preset, depth),
            lengths={name: draw_lengths(name, sequences) for name in lengths},
            peers=peers, scenarios=scenarios, order=order, batch_size=batch_size, repeats=repeats, backend=backend,
            folder=Path(folder),
        )  # fmt: skip
        rows = max(int(drawn.sum()) for drawn in suite.lengths.values())
        check_memory(suite.config, HeadConfig(), suite.dtype, rows)
        console = Console()
        results = Results(
            json_file,
            suite="peers",
            options={"preset": preset, "depth": depth, **suite.options()},
            machine=machine_facts(),
            resume=resume,
            show=table.row_line,
            console=console,
        )
        for line in table.introduction(results.content):
            results.tell(line)
        results.measure_all(cells(suite))
    if results.failed:
        raise SystemExit(1)


def draw_lengths(name: str, sequences: int) -> Ints:
    """Lengths of a data set or a file, or all the same if the name is a number.

    Raises:
        InputError: neither a data set nor a readable file, or no such number of tokens.
    """
    if not name.isdecimal():
        return draw(name, sequences, SEED)
    if len(name) > 9 or int(name) < 1:
        raise InputError(f"--lengths {name}: a sequence has 1 to 999999999 tokens")
    return np.full(sequences, int(name), np.int32)
