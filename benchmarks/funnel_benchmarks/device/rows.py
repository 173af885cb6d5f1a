"""How fast the row-wise ops are: against a copy within the device that reads and writes as many bytes in all.

A call works on several sets of inputs, one after another, which together no cache holds.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funnel_benchmarks.device import plots
from funnel_benchmarks.device.bench import Bench
from funnel_benchmarks.device.part import CELL, Part, against_goal
from funnel_benchmarks.measure import in_turns, spread
from funnel_benchmarks.results import Measurement, Row
from funnel_benchmarks.statistics import quartiles
from funnel_benchmarks.suite import Column, Plot, field
from funnel_kernels import pool_norm, recover_norm
from funnel_kernels.recover_norm import MODES

STRIDES = (2, 4)
EPS = 1e-6
GOAL = 0.85  # of the copy's bandwidth


def cells(bench: Bench) -> Iterator[Measurement]:
    for width in bench.sizes.widths:
        for stride in STRIDES:
            yield f"pool_norm max, stride {stride}, width {width}", partial(measure_pool_norm, bench, width, stride)
        for stride in STRIDES:
            for mode in MODES:
                name = f"recover_norm {mode}, stride {stride}, width {width}"
                yield name, partial(measure_recover_norm, bench, width, stride, mode)


def measure_pool_norm(bench: Bench, width: int, stride: int) -> Row:
    rows = bench.sizes.rows
    shared = jnp.ones(rows, bool), bench.normal(0, (width,))
    op = partial(pool_norm, stride=stride, pool="max", eps=EPS, target=bench.target)
    return against_copy(bench, op, [(rows, width)], shared, written=2 * rows // stride * width)


def measure_recover_norm(bench: Bench, width: int, stride: int, mode: str) -> Row:
    rows = bench.sizes.rows
    op = partial(recover_norm, stride=stride, mode=mode, eps=EPS, target=bench.target)
    inputs, shared = [(rows // stride, width)], (bench.normal(0, (width,)),)
    if mode == "tile":
        return against_copy(bench, op, inputs, (None, *shared), written=rows * width)
    return against_copy(bench, op, [*inputs, (rows, width)], shared, written=rows * width)


def against_copy(
    bench: Bench, op: Callable[..., Any], shapes: list[tuple[int, int]], shared: tuple[Any, ...], written: int
) -> Row:
    """The bandwidth of an op and of a copy, measured in turns.

    Args:
        shapes: of the arrays that `op` takes first.
        shared: what it takes then, for all input sets alike; small, so their bytes do not count.
        written: numbers that it writes.
    """
    numbers = sum(rows * width for rows, width in shapes) + written
    count = max(1, -(-bench.sizes.rotated_bytes // (2 * numbers)))  # input sets
    sets = [
        [bench.normal(1 + len(shapes) * index + place, shape) for place, shape in enumerate(shapes)]
        for index in range(count)
    ]
    copied = [bench.normal(index, (numbers // 2,)) for index in range(count)]
    run_op = jax.jit(lambda sets, shared: [op(*arrays, *shared) for arrays in sets])
    run_copy = jax.jit(lambda arrays: [jnp.copy(array) for array in arrays])

    samplers = bench.sampler(lambda: run_copy(copied)), bench.sampler(lambda: run_op(sets, shared))
    copy_samples, samples = ([second / count for second in each] for each in in_turns(*samplers, bench.sizes.repeats))
    moved = 2 * numbers
    rates = [moved / quartiles(each).median / 1e9 for each in (samples, copy_samples)]
    return {
        "bytes_read_and_written": moved,
        "input_sets": count,
        "seconds": spread(samples),
        "copy_seconds": spread(copy_samples),
        "gb_per_second": rates[0],
        "copy_gb_per_second": rates[1],
        "share": rates[0] / rates[1],
        "goal": GOAL,
    }


class Rows(Part):
    name = "device rows"
    title = "Pooling and recovery"
    note = "Bandwidth counts each byte read and written once; the copy reads and writes as many in all."
    columns = (
        CELL,
        Column("time", field("seconds", ",.1f", 1e6), "us", "quartiles"),
        Column("GB/s", field("gb_per_second", ",.0f")),
        Column("copy", field("copy_gb_per_second", ",.0f"), "GB/s"),
        Column("share", against_goal("share")),
    )
    measurements = staticmethod(cells)

    @classmethod
    def plots(cls, content: Row) -> list[Plot]:
        caption = "Bandwidth of each row-wise op as a share of a copy's"
        drawn = Plot(partial(plots.rows, content), f"{caption}; the table has the same figures.", caption)
        return [drawn] if content["rows"] else []
