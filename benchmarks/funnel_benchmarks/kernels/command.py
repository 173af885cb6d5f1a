"""The command `funnel bench kernels`."""

from typing import Any

import click
import numpy as np

from funnel_benchmarks import suite_command
from funnel_benchmarks.kernels.allocator import keep_freed_memory
from funnel_benchmarks.kernels.cases import Sizes
from funnel_benchmarks.kernels.ceilings import ceilings
from funnel_benchmarks.kernels.suite import Suite, backends_here
from funnel_benchmarks.memory import check_memory
from funnel_benchmarks.models import preset_model
from funnel_kernels import BACKENDS


@click.command()
@click.option("--preset", default="gemma-2b", show_default=True, help="Architecture whose sizes are taken.")
@click.option("--depth", type=int, default=4, show_default=True, help="Its first layers, for the whole forward pass.")
@click.option("--seq-len", type=click.IntRange(1, 2**20), default=512, show_default=True, help="Tokens a sequence.")
@click.option("--batch", type=click.IntRange(1, 2**20), default=2, show_default=True, help="Sequences in the batch.")
@suite_command.dtype_option
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(list(BACKENDS)),
    help="Only this one; can be given several times. Default: what runs on this machine, but for the reference.",
)
@suite_command.repeats_option
@suite_command.file_options()
def kernels(
    preset: str,
    depth: int,
    seq_len: int,
    batch: int,
    dtype: str,
    backends: tuple[str, ...],
    repeats: int,
    files: dict[str, Any],
) -> None:
    """Measure every op on every backend against what this machine can do at best.

    First its ceilings: a large matrix product and a copy of memory. Then each op, in turns with the ceiling that
    bounds it, and the share of it that the op reaches. Exit status 1: a row failed.

    Example: funnel bench kernels --preset embeddinggemma-300m --seq-len 256 --batch 32 --json kernels.json
    """
    keep_freed_memory()
    model = preset_model(preset, dtype, depth)
    check_memory(model.config, model.head, dtype, seq_len * batch)
    sizes = Sizes(model.config, np.full(batch, seq_len, np.int32), dtype)
    with ceilings(dtype) as measured:
        suite = Suite(
            model=model.name, sizes=sizes, backends=backends or backends_here(), ceilings=measured, repeats=repeats
        )
        suite_command.run(suite, **files)
