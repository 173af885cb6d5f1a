"""The whole engine without a funnel: tokens and operations a second."""

from collections.abc import Iterator
from functools import partial

from funnel_benchmarks.accelerator.bench import Bench
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_benchmarks.measure import alone, spread
from funnel_benchmarks.results import Cell, Row
from funnel_benchmarks.statistics import quartiles
from funnel_engine.flops import forward_flops

CEILING_GOAL = 0.65  # of the rate of a large matrix product


def cells(bench: Bench) -> Iterator[Cell]:
    sequences, tokens = bench.sizes.batches[0]
    yield f"{sequences} x {tokens} tokens", partial(measure, bench)


def measure(bench: Bench) -> Row:
    lengths = bench.equal_lengths
    samples = alone(bench.sampler(bench.embedding(lengths)), bench.sizes.repeats)
    median = quartiles(samples).median
    flops = forward_flops(bench.sizes.config, NO_FUNNEL, lengths)
    return {
        "seconds": spread(samples),
        "flops": flops,
        "tokens_per_second": int(lengths.sum()) / median,
        "tflops_per_second": flops / median / 1e12,
        "compile_seconds": bench.engine().stats()["compile_seconds"],
        "goal": CEILING_GOAL,
    }
