"""The command `funnel bench latency`."""

from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource

from funnel_benchmarks import suite_command
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_benchmarks.inputs import SEED
from funnel_benchmarks.latency.suite import Batch, Suite
from funnel_benchmarks.lengths import describe, draw
from funnel_benchmarks.memory import check_memory
from funnel_benchmarks.models import Model, checkpoint_model, funnel_transformer_model, preset_model
from funnel_engine import FunnelConfig
from funnel_engine.config import RECOVERIES
from funnel_engine.presets import FUNNEL_TRANSFORMERS, PRESETS, is_funnel_transformer
from funnel_engine.weights import DTYPES
from funnel_kernels.errors import ConfigError
from funnel_kernels.pool_norm import POOLS

REPEATS = 10
SWEEPS = ("gemma-2b", "gemma-7b")  # names of presets
LENGTHS = (512, 4096, 8192)
TOKENS = 8192  # of each batch of a sweep, so that all lengths fill a device alike
QUICK_TOKENS = 512
DOTS = "..."
# The options of a funnel, and all that a sweep decides, by the names of the command's parameters.
FUNNEL = {"layers": "--layers", "stride": "--stride", "pool": "--pool", "recovery": "--recovery"}
DECIDED = {
    "preset_name": "--preset",
    "checkpoint": "--checkpoint",
    "batch": "--batch",
    "lengths": "--lengths",
    **FUNNEL,
}


@click.command()
@click.option(
    "--preset",
    "preset_name",
    help=f"Architecture to run with random weights: {', '.join((*PRESETS, *FUNNEL_TRANSFORMERS))}. The funnel of a "
    "Funnel-Transformer is between its blocks; add -base to leave out its decoder.",
)
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
@suite_command.lengths_option("512")
@click.option("--batch", type=click.IntRange(1, 2**20), default=128, show_default=True, help="Sequences in the batch.")
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
    help="Of weights. Default: bfloat16, or the checkpoint's.",
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
    lengths: tuple[str, ...],
    batch: int,
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
        refuse_options(context, DECIDED, f"--sweep {sweep} decides what is measured")
        model = preset_model(sweep, dtype)
        funnels, batches = sweep_funnels(model.config.num_layers), sweep_batches(quick)
    elif quick:
        raise ConfigError(f"--quick shortens a sweep; give --sweep {' or --sweep '.join(SWEEPS)}")
    else:
        model = choose_model(preset_name, checkpoint, dtype)
        count = model.config.num_layers
        if model.funnel is not None:
            refuse_options(context, FUNNEL, f"the funnel of {model.name} is between its blocks")
            funnels = (model.funnel,)
        else:
            funnels = tuple(
                FunnelConfig.after(layer, stride=stride, pool=pool, recovery=None if recovery == "none" else recovery)
                for layer in (even_layers(count) if layers is None else parse_layers(layers, count))
            )
        batches = tuple(Batch(draw(each, batch, SEED), describe(each)) for each in lengths)
    suite = Suite(
        model=model, funnels=funnels, batches=batches, backend=backend, repeats=repeats or (1 if quick else REPEATS)
    )
    measure(suite, **files)


def choose_model(preset_name: str | None, checkpoint: Path | None, dtype: str | None) -> Model:
    if preset_name is not None and checkpoint is None:
        known = funnel_transformer_model if is_funnel_transformer(preset_name) else preset_model
        return known(preset_name, dtype)
    if checkpoint is not None and preset_name is None:
        return checkpoint_model(checkpoint, dtype)
    raise ConfigError("give one of --preset NAME, --checkpoint FOLDER and --sweep NAME, to say which model is measured")


def refuse_options(context: click.Context, options: dict[str, str], why: str) -> None:
    """Raises `ConfigError` if one of these options, by the names of its parameters, was given."""
    for name, option in options.items():
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise ConfigError(f"{why}; leave out {option}")


def measure(suite: Suite, **files: Any) -> None:
    """Runs the suite, if its model and batches fit in memory."""
    model, rows = suite.model, max(suite.rows(NO_FUNNEL, batch) for batch in suite.batches)
    check_memory(model.config, model.head, model.dtype, rows)
    suite_command.run(suite, **files)


def sweep_funnels(num_layers: int) -> tuple[FunnelConfig, ...]:
    """2:1 and 4:1 after every even layer; two 2:1 funnels; pooled queries over unpooled keys; every recovery."""
    layers = even_layers(num_layers)
    first, middle, late = layers[0], layers[(len(layers) - 1) // 2], layers[3 * len(layers) // 4]
    return (
        *(FunnelConfig.after(layer, stride=stride) for stride in (2, 4) for layer in layers),
        *(FunnelConfig.parse(f"{one}:2,{other}:2") for one, other in ((first, middle), (middle, late))),
        *(FunnelConfig.after(layer, pool_query_only=True) for layer in (first, middle, late)),
        *(FunnelConfig.after(middle, recovery=recovery) for recovery in RECOVERIES),
    )


def sweep_batches(quick: bool) -> tuple[Batch, ...]:
    """As many tokens at every length; quickly, one sequence of 512."""
    lengths, tokens = (LENGTHS[:1], QUICK_TOKENS) if quick else (LENGTHS, TOKENS)
    return tuple(Batch(np.full(tokens // length, length, np.int32)) for length in lengths)


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Reads e.g. "2,8,14" or "2,4,...,16", where the dots carry the last step on up to the next number.

    Args:
        num_layers: of the model; a funnel comes after 0 ... num_layers - 1 of them.

    Returns:
        The numbers in rising order, each once.

    Raises:
        ConfigError: not such a list, or a number that the model does not have.
    """
    words = [word.strip() for word in text.split(",")]
    layers: list[int] = []
    for index, word in enumerate(words):
        if word == DOTS and index + 1 < len(words):
            continue
        if not word.isdecimal() or len(word) > 9:
            raise ConfigError(f"--layers {text!r}: {word!r} is not a number of layers; write e.g. 2,8,14 or 2,4,...,16")
        end = int(word)
        if end >= num_layers:
            raise ConfigError(
                f"--layers {text!r} asks for a funnel after {end} layers, but the model has {num_layers}; "
                f"the last place is after {num_layers - 1}"
            )
        if index and words[index - 1] == DOTS:
            step = layers[-1] - layers[-2] if len(layers) > 1 else 0
            if step <= 0 or end <= layers[-1] or (end - layers[-1]) % step:
                raise ConfigError(
                    f"--layers {text!r}: the dots need two rising numbers before them and one after them in the same "
                    "steps, as in 2,4,...,16"
                )
            layers += range(layers[-1] + step, end, step)
        layers.append(end)
    return tuple(sorted(set(layers)))


def even_layers(num_layers: int) -> tuple[int, ...]:
    """Every even place from 2 on, as in Figure 4 of arXiv:2504.02877.

    Raises:
        ConfigError: the model has too few layers for one.
    """
    if num_layers < 3:
        raise ConfigError(f"a model of {num_layers} layers has no even place for a funnel from 2 on; give --layers")
    return tuple(range(2, num_layers, 2))
