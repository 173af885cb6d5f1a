"""The command `funnel bench scaling`."""

from typing import Any

import click

from funnel_benchmarks import suite_command
from funnel_benchmarks.memory import check_memory
from funnel_benchmarks.models import preset_model
from funnel_benchmarks.scaling.axes import AXES, SHORTEST
from funnel_benchmarks.scaling.suite import Suite


@click.command()
@suite_command.preset_option
@suite_command.depth_option
@suite_command.layer_option
@click.option(
    "--axis",
    "axes",
    multiple=True,
    type=click.Choice(list(AXES)),
    default=list(AXES),
    help="Only this one; can be given several times. "
    f"{'; '.join(f'{axis}: {text}' for axis, text in AXES.items())}. Default: all.",
)
@click.option(
    "--most-tokens",
    type=click.IntRange(SHORTEST, 2**20),
    default=16384,
    show_default=True,
    help="Of the largest batch.",
)
@suite_command.dtype_option
@suite_command.backend_option
@suite_command.repeats_option
@suite_command.file_options(plot="latency over size")
def scaling(preset: str, depth: int | None, layer: int | None, dtype: str, files: Any, **options: Any) -> None:
    """Measure how latency and memory grow with the size of the work, with a funnel and without.

    At the end stand the exponents of the power laws that fit best: how latency grows with each size, how the
    floating-point operations do, and the one with the other. Exit status 1: a row failed.

    Example: funnel bench scaling --axis tokens --axis depth --json scaling.json --plot scaling.png
    """
    model = preset_model(preset, dtype, depth)
    place = suite_command.funnel_place(layer, model.config)
    suite = Suite(model=model, layer=place, **options)
    check_memory(model.config, model.head, model.dtype, SHORTEST)  # larger batches are left out one by one
    suite_command.run(suite, **files)
