"""The commands `funnel bench kernels`, `ceilings` and `check`."""

from collections.abc import Sequence
from typing import Any

import click
import numpy as np

from funnel_benchmarks import suite_command
from funnel_benchmarks.kernels.allocator import keep_freed_memory
from funnel_benchmarks.kernels.cases import Case, Sizes, cases
from funnel_benchmarks.kernels.ceilings import SAMPLE_SECONDS, ceilings
from funnel_benchmarks.kernels.check import make_check
from funnel_benchmarks.kernels.funnel_transformer_cases import funnel_transformer_cases
from funnel_benchmarks.kernels.suite import Suite, backends_here
from funnel_benchmarks.memory import check_memory
from funnel_benchmarks.models import funnel_transformer_model, preset_model
from funnel_engine import FunnelTransformerConfig
from funnel_engine.packing import Ints
from funnel_engine.presets import FUNNEL_TRANSFORMERS, is_funnel_transformer
from funnel_engine.weights import ACTIVATIONS
from funnel_kernels import BACKENDS
from funnel_kernels.errors import ConfigError
from funnel_kernels.target import check_backend

BEST = "what this machine can do at best"
DEPTH = 4
NO_LENGTHS = np.zeros(0, np.int32)


@click.command("kernels")
@click.option(
    "--preset",
    default="gemma-2b",
    show_default=True,
    help=f"Architecture whose sizes are taken; also {', '.join(FUNNEL_TRANSFORMERS)}.",
)
@click.option(
    "--depth",
    type=int,
    help=f"Its first layers, for the whole forward pass. Default: {DEPTH}; a Funnel-Transformer runs all of them.",
)
@click.option("--seq-len", type=click.IntRange(1, 2**20), default=512, show_default=True, help="Tokens a sequence.")
@click.option("--batch", type=click.IntRange(1, 2**20), default=2, show_default=True, help="Sequences in the batch.")
@click.option(
    "--dtype", type=click.Choice(ACTIVATIONS), default="bfloat16", show_default=True, help="Of weights and activations."
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(list(BACKENDS)),
    help="Only this one; can be given several times. Default: what runs on this machine, but for the reference.",
)
@suite_command.repeats_option
@suite_command.file_options()
def kernels_command(
    preset: str,
    depth: int | None,
    seq_len: int,
    batch: int,
    dtype: str,
    backends: tuple[str, ...],
    repeats: int,
    files: Any,
) -> None:
    """Measure every op on every backend against what this machine can do at best.

    First its ceilings: a large matrix product and a copy of memory. Then each op, in turns with the ceiling that
    bounds it, and the share of it that the op reaches. Exit status 1: a row failed.

    Example: funnel bench kernels --preset embeddinggemma-300m --seq-len 256 --batch 32 --json kernels.json
    """
    if is_funnel_transformer(preset):
        if depth is not None:
            raise ConfigError(
                f"--depth {depth} is not for a Funnel-Transformer, which runs all its layers; leave it out"
            )
        model = funnel_transformer_model(preset, dtype)
    else:
        model = preset_model(preset, dtype, DEPTH if depth is None else depth)
    check_memory(model.config, model.head, dtype, seq_len * batch)
    sizes = Sizes(model, np.full(batch, seq_len, np.int32))
    if isinstance(model.config, FunnelTransformerConfig):
        measured = funnel_transformer_cases(sizes, model.config)
    else:
        measured = cases(sizes)
    run(model.name, measured, lengths=sizes.lengths, dtype=dtype, backends=backends, repeats=repeats, **files)


def run(
    model: str,
    measured: Sequence[Case],
    *,
    repeats: int,
    lengths: Ints = NO_LENGTHS,
    dtype: str = "bfloat16",
    backends: tuple[str, ...] = (),
    small: bool = False,
    **files: Any,
) -> None:
    """Measures cases, after the ceilings."""
    keep_freed_memory()
    shrink, seconds = (32, 0.001) if small else (1, SAMPLE_SECONDS)
    with ceilings(dtype, shrink, seconds) as best:
        suite = Suite(
            model=model,
            dtype=dtype,
            lengths=lengths,
            cases=measured,
            backends=backends or backends_here(),
            ceilings=best,
            repeats=repeats,
            seconds=seconds,
        )
        suite_command.run(suite, **files)


@click.command("ceilings")
@suite_command.small_option
@suite_command.minutes_option
@suite_command.file_options()
def ceilings_command(small: bool, minutes: float, files: Any) -> None:
    """Measure what this device can do at best: a large product of bfloat16 matrices, and a copy of memory.

    Example: funnel bench ceilings --json ceilings.json
    """
    until = suite_command.deadline(minutes)
    run(BEST, [], repeats=1 if small else 5, small=small, until=until, **files)


@click.command("check")
@suite_command.backend_option
@suite_command.small_option
@suite_command.minutes_option
@suite_command.seed_option
@suite_command.file_options()
def check_command(backend: str, small: bool, minutes: float, seed: int | None, files: Any) -> None:
    """Check every kernel on this device against float64 on the host, at shapes that are hard to get right.

    Exit status 1: a result was wrong, or a check failed.

    Example: funnel bench check --json check.json
    """
    check_backend(backend)
    suite_command.run(make_check(backend, small, seed), until=suite_command.deadline(minutes), **files)
