"""The whole engine without a funnel: tokens and operations a second, and what padding costs the forward pass."""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax

from funnel_benchmarks.device.bench import Bench
from funnel_benchmarks.device.layouts import filled
from funnel_benchmarks.device.part import CELL, MILLISECONDS, Part, against_goal
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_benchmarks.measure import alone, in_turns, spread
from funnel_benchmarks.results import Measurement, Row
from funnel_benchmarks.statistics import quartiles
from funnel_benchmarks.suite import Column, field
from funnel_engine.flops import forward_flops
from funnel_engine.model import forward
from funnel_engine.packing import Ints, pack
from funnel_engine.xla_options import compiler_options

CEILING_GOAL = 0.65  # of the rate of a large matrix product


def cells(bench: Bench) -> Iterator[Measurement]:
    sequences, tokens = bench.sizes.batches[0]
    yield f"{sequences} x {tokens} tokens", partial(measure, bench)
    compiled = functools.cache(partial(compiler, bench))  # when the first cell is measured
    for percent in bench.sizes.padding_percent:
        name = f"forward pass, {percent} % of {bench.sizes.tokens} rows are padding"
        yield name, partial(measure_padded, bench, compiled, percent)


def measure(bench: Bench) -> Row:
    lengths = bench.equal_lengths
    samples = alone(bench.sampler(bench.embedding(lengths)), bench.sizes.repeats)
    return figures(bench, lengths, samples) | {
        "compile_seconds": bench.engine().stats()["compile_seconds"],
        "goal": CEILING_GOAL,
    }


def measure_padded(bench: Bench, compiled: Callable[[], Any], percent: int) -> Row:
    """A batch that does not fill its bucket takes no longer than one that does: `of_full` is at most about 1."""
    run, full = compiled(), bench.equal_lengths
    lengths = filled(bench.sizes.tokens, int(full[0]), percent)
    of_full, of_padded = (bench.sampler(partial(run, on_device(bench, each))) for each in (full, lengths))
    full_samples, samples = in_turns(of_full, of_padded, bench.sizes.repeats)
    return figures(bench, lengths, samples) | {
        "full_seconds": spread(full_samples),
        "of_full": quartiles(samples).median / quartiles(full_samples).median,
    }


def compiler(bench: Bench) -> Callable[[Any], Any]:
    """The forward pass, compiled as the engine does it."""
    engine = bench.engine()
    encoder = partial(forward, config=engine.config, funnel=NO_FUNNEL, target=engine.devices.target)
    batch = on_device(bench, bench.equal_lengths)
    lowered = jax.jit(encoder).lower(engine.params, batch)
    return partial(lowered.compile(compiler_options(jax.default_backend())), engine.params)


def on_device(bench: Bench, lengths: Ints) -> Any:
    """Sequences of these lengths in the largest bucket."""
    return jax.device_put(pack(bench.engine().plan, *bench.inputs(lengths), bench.sizes.tokens))


def figures(bench: Bench, lengths: Ints, samples: list[float]) -> Row:
    median = quartiles(samples).median
    flops = forward_flops(bench.sizes.config, NO_FUNNEL, lengths)
    rate = flops / median / 1e12
    row: Row = {
        "seconds": spread(samples),
        "flops": flops,
        "tokens_per_second": int(lengths.sum()) / median,
        "tflops_per_second": rate,
    }
    return row if bench.matrix_rate is None else row | {"matrix_share": rate / bench.matrix_rate}


class WholeEngine(Part):
    name = "device engine"
    title = "The engine without a funnel"
    note = (
        "`Engine.embed`, from token ids on the host to vectors on the host; the forward pass, from ids on the device. "
        "Operations of matrix products and attention only, and of tokens only. The matrix rate is that of the "
        "ceilings, if they were measured into the same folder."
    )
    columns = (
        CELL,
        MILLISECONDS,
        Column("tokens/s", field("tokens_per_second", ",.0f")),
        Column("TFLOP/s", field("tflops_per_second", ",.1f")),
        Column("share", against_goal("matrix_share"), note="of the matrix rate"),
        Column("compiling", field("compile_seconds", ",.1f"), "s"),
        Column("of the time", field("of_full", ".3f"), note="of a full bucket"),
    )
    measurements = staticmethod(cells)
