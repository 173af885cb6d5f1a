"""The command `funnel bench latency`."""

from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource

from funnel_benchmarks import suite_command
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_benchmarks.inputs import SEED
from funnel_benchmarks.latency.layers import even_layers, parse_layers
from funnel_benchmarks.latency.suite import Batch, Suite
from funnel_benchmarks.latency.sweeps import LENGTHS, QUICK_TOKENS, SWEEPS, TOKENS, sweep_batches, sweep_funnels
from funnel_benchmarks.lengths import PRESETS as LENGTH_PRESETS
from funnel_benchmarks.lengths import describe as describe_lengths
from funnel_benchmarks.lengths import draw as draw_lengths
from funnel_benchmarks.memory import check_memory
from funnel_benchmarks.models import Model, checkpoint_model, preset_model
from funnel_engine import FunnelConfig
from funnel_engine.config import RECOVERIES
from funnel_engine.presets import PRESETS
from funnel_engine.weights import DTYPES
from funnel_kernels.errors import ConfigError
from funnel_kernels.pool_norm import POOLS

REPEATS = 10
# What a sweep decides, by the names of the command's parameters.
DECIDED = {
    "preset_name": "--preset",
    "checkpoint": "--checkpoint",
    "seq_len": "--seq-len",
    "batch": "--batch",
    "lengths": "--lengths",
    "layers": "--layers",
    "stride": "--stride",
    "pool": "--pool",
    "recovery": "--recovery",
}


@click.command()
@click.option("--preset", "preset_name", help=f"Architecture to run with random weights: {', '.join(PRESETS)}.")
@click.option("--checkpoint", type=suite_command.FILE, help="Or a folder that `funnel convert` has made.")
@click.option(
    "--sweep",
    type=click.Choice(SWEEPS),
    help="Or this preset with every kind of funnel: 2:1 and 4:1 after every even layer, two funnels, pooled queries "
    f"over unpooled keys, every recovery; at {', '.join(map(str, LENGTHS))} tokens a sequence, and as many sequences "
    f"as make {TOKENS} tokens a batch.",
)
@click.option(
    "--quick",
    is_flag=True,
    help=f"The sweep with one sequence of {QUICK_TOKENS} tokens, and one repeat: on two CPU cores a quarter of an hour "
    "for gemma-2b, and well over an hour for gemma-7b.",
)
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
    "--recovery",
    type=click.Choice(["none", *RECOVERIES]),
    default="none",
    show_default=True,
    help="How each token gets a row of its own again at the end.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help="Of weights and activations. Default: bfloat16, or the checkpoint's.",
)
@suite_command.backend_option
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    help=f"How often baseline, funnel, funnel, baseline are run for each row. Default: {REPEATS}, or 1 if --quick.",
)
@suite_command.file_options(plot="the rows like the first", html=True)
@click.pass_context
def latency(
    context: click.Context,
    preset_name: str | None,
    checkpoint: Path | None,
    sweep: str | None,
    quick: bool,
    seq_len: int,
    batch: int,
    lengths: str | None,
    layers: str | None,
    stride: int,
    pool: str,
    recovery: str,
    dtype: str | None,
    backend: str,
    repeats: int | None,
    files: dict[str, Any],
) -> None:
    """Measure how much time a funnel saves.

    Runs one batch with the funnel in each of several places, in turns with the same engine without it, and prints
    latencies, their ratio and the ratio that the saved operations would allow at best. Exit status 1: a row failed.

    Example: funnel bench latency --preset gemma-2b --batch 4 --layers 2,8,14 --json gemma.json --html gemma.html
    """
    if sweep is not None:
        for name, option in DECIDED.items():
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise ConfigError(f"--sweep {sweep} decides what is measured; leave out {option}")
        model = preset_model(sweep, dtype)
        funnels, batches = sweep_funnels(model.config.num_layers), sweep_batches(quick)
    elif quick:
        raise ConfigError(f"--quick shortens a sweep; give --sweep {' or --sweep '.join(SWEEPS)}")
    else:
        model = choose_model(preset_name, checkpoint, dtype)
        count = model.config.num_layers
        funnels = tuple(
            FunnelConfig.after(layer, stride=stride, pool=pool, recovery=None if recovery == "none" else recovery)
            for layer in (even_layers(count) if layers is None else parse_layers(layers, count))
        )
        if lengths is None:
            batches = (Batch(np.full(batch, seq_len, np.int32)),)
        else:
            batches = (Batch(draw_lengths(lengths, batch, SEED), describe_lengths(lengths)),)
    suite = Suite(
        model=model,
        funnels=funnels,
        batches=batches,
        backend=backend,
        repeats=repeats or (1 if quick else REPEATS),
    )
    measure(suite, **files)


def choose_model(preset_name: str | None, checkpoint: Path | None, dtype: str | None) -> Model:
    if preset_name is not None and checkpoint is None:
        return preset_model(preset_name, dtype)
    if checkpoint is not None and preset_name is None:
        return checkpoint_model(checkpoint, dtype)
    raise ConfigError("give one of --preset NAME, --checkpoint FOLDER and --sweep NAME, to say which model is measured")


def measure(suite: Suite, **files: Any) -> None:
    """Runs the suite, if its model and batches fit in memory."""
    model, rows = suite.model, max(suite.rows(NO_FUNNEL, batch) for batch in suite.batches)
    check_memory(model.config, model.head, model.dtype, rows)
    suite_command.run(suite, **files)
