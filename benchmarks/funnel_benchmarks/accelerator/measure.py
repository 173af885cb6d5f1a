"""How a call is timed.

Device work is asynchronous: a sample enqueues enough calls to last a while, waits once, and divides.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from funnel_benchmarks.latency import counting_compilations
from funnel_benchmarks.statistics import interleave, quartiles
from funnel_kernels.errors import FunnelError

Call = Callable[[], Any]
Sample = Callable[[], float]


def sampler(call: Call, least_seconds: float) -> Sample:
    """A function that measures the seconds of one `call`, by enough of them to last `least_seconds`.

    The calls that find out how many those are also compile and warm up.
    """

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        result = None
        for _ in range(calls):
            result = call()  # frees the last result: the device reuses its memory in order
        jax.block_until_ready(result)
        return time.perf_counter() - start

    seconds(1)
    calls, spent = 1, seconds(1)
    while spent < least_seconds:
        calls = math.ceil(calls * min(10, 1.2 * least_seconds / spent))
        spent = seconds(calls)
    return lambda: seconds(calls) / calls


def in_turns(first: Sample, second: Sample, repeats: int) -> tuple[list[float], list[float]]:
    """Samples two calls in the order A B B A, `repeats` times; `2 * repeats` samples of each."""
    with compiling_nothing():
        return interleave(first, second, repeats, lambda: None)


def alone(sample: Sample, repeats: int) -> list[float]:
    """Samples one call as often as `in_turns` does each of two."""
    with compiling_nothing():
        return [sample() for _ in range(2 * repeats)]


@contextmanager
def compiling_nothing() -> Iterator[None]:
    """Raises `FunnelError` if something is compiled meanwhile, so that the samples are no timings."""
    with counting_compilations() as compilations:
        yield
    if compilations:
        raise FunnelError(f"{len(compilations)} programs were compiled while timing, where 0 may be; please report it")


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Samples as they stand in a table: quartiles, median, and each one in the order taken."""
    return {**quartiles(samples)._asdict(), "samples": list(samples)}
