"""What the device can do at best: a large product of bfloat16 matrices, and a copy of memory."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from funnel_benchmarks.device.bench import Bench
from funnel_benchmarks.device.part import CELL, MILLISECONDS, Part
from funnel_benchmarks.measure import alone, spread
from funnel_benchmarks.results import Measurement, Row
from funnel_benchmarks.statistics import quartiles
from funnel_benchmarks.suite import Column, field

copy = jax.jit(jnp.copy)  # a program's result may not be its argument, so XLA copies


def cells(bench: Bench) -> Iterator[Measurement]:
    size = bench.sizes.matrix
    yield f"bfloat16 product of {size:,} x {size:,} matrices", partial(matrix_product, bench, size)
    yield f"copy of {bench.sizes.copy_bytes / 1e9:.3g} GB", partial(copy_rate, bench, bench.sizes.copy_bytes)


def matrix_product(bench: Bench, size: int) -> Row:
    a, b = (bench.normal(stream, (size, size)) for stream in range(2))
    product = jax.jit(jnp.matmul)
    samples = alone(bench.sampler(lambda: product(a, b)), bench.sizes.repeats)
    flops = 2 * size**3
    return {
        "seconds": spread(samples),
        "flops": flops,
        "tflops_per_second": flops / quartiles(samples).median / 1e12,
    }


def copy_rate(bench: Bench, size: int) -> Row:
    x = bench.normal(0, (size // 2,))
    samples = alone(bench.sampler(lambda: copy(x)), bench.sizes.repeats)
    moved = 2 * x.nbytes
    return {
        "seconds": spread(samples),
        "bytes_read_and_written": moved,
        "gb_per_second": moved / quartiles(samples).median / 1e9,
    }


class Ceilings(Part):
    name = "device ceilings"
    title = "What the device can do"
    note = "Random bfloat16 numbers. A copy's bytes count twice: read and written."
    columns = (
        CELL,
        MILLISECONDS,
        Column("TFLOP/s", field("tflops_per_second", ",.1f")),
        Column("GB/s", field("gb_per_second", ",.0f")),
    )
    measurements = staticmethod(cells)
