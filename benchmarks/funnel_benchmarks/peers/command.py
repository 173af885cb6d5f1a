"""The command `funnel bench peers`."""

import tempfile
from pathlib import Path
from typing import Any

import click

from funnel_benchmarks import suite_command
from funnel_benchmarks.inputs import SEED
from funnel_benchmarks.lengths import draw
from funnel_benchmarks.memory import check_memory
from funnel_benchmarks.peers.batches import ORDERS
from funnel_benchmarks.peers.forms import ENGINE, FLASH, PEERS
from funnel_benchmarks.peers.suite import SCENARIOS, TOLERANCES, Suite, model_fields
from funnel_benchmarks.random_checkpoint import DTYPE
from funnel_engine import HeadConfig

LENGTHS = ("conll", "qnli", "passage")


@click.command()
@click.option("--preset", default="embeddinggemma-300m", show_default=True, help="Architecture, with random weights.")
@suite_command.depth_option
@click.option(
    "--dtype",
    type=click.Choice(list(TOLERANCES)),
    default=DTYPE,
    show_default=True,
    help="Of the engine's weights. A peer computes in the dtype that its users would choose to compare with this.",
)
@suite_command.lengths_option(*LENGTHS)
@click.option(
    "--sequences", type=click.IntRange(1, 2**20), default=64, show_default=True, help="For each of --lengths."
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(list(PEERS)),
    default=[name for name in PEERS if name not in (FLASH, ENGINE)],
    help=f"Only this one; can be given several times. Default: all but {FLASH}, which needs a GPU, and {ENGINE}, which "
    "is this engine in bfloat16, beside --dtype int8.",
)
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    type=click.Choice(SCENARIOS),
    default=SCENARIOS,
    help="Only this one: all sequences in one call, or one after another. Default: both.",
)
@click.option(
    "--order",
    type=click.Choice(ORDERS),
    default="sorted",
    show_default=True,
    help="Of the sequences in the peers' batches: the longest first, or as they come.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Most sequences in a peer's batch."
)
@suite_command.backend_option
@suite_command.repeats_option
@suite_command.file_options()
def peers(preset: str, depth: int | None, lengths: tuple[str, ...], sequences: int, files: Any, **options: Any) -> None:
    """Compare the engine with what else runs such a model, on the same weights and inputs.

    A peer that is not installed, or has no form to compare, is left out with the reason. Results are compared with
    Hugging Face in float32 before anything is timed. Exit status 1: a row failed, for instance because a peer computes
    something else.

    Example: funnel bench peers --dtype int8 --lengths conll --lengths 256 --peer openvino --json peers.json
    """
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(
            preset=preset,
            depth=depth,
            fields=model_fields(preset, depth),
            lengths={name: draw(name, sequences, SEED) for name in lengths},
            folder=Path(folder),
            **options,
        )
        rows = max(int(drawn.sum()) for drawn in suite.lengths.values())
        check_memory(suite.config, HeadConfig(), "float32", rows)  # as Hugging Face has them
        suite_command.run(suite, **files)
