"""How a call is timed.

Device work is asynchronous: a sample enqueues enough calls to last a while, waits once, and divides.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from funnel_benchmarks.statistics import interleave, quartiles
from funnel_kernels.errors import FunnelError

COMPILATION = "/jax/core/compile/backend_compile_duration"  # JAX reports this event for every program it compiles

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


def in_turns(
    first: Sample, second: Sample, repeats: int, advance: Callable[[], object] = lambda: None
) -> tuple[list[float], list[float]]:
    """Samples two calls in the order A B B A, `repeats` times; `2 * repeats` samples of each.

    Raises:
        FunnelError: something was compiled meanwhile.
    """
    with compiling_nothing():
        return interleave(first, second, repeats, advance)


def alone(sample: Sample, repeats: int) -> list[float]:
    """Samples one call as often as `in_turns` does each of two."""
    with compiling_nothing():
        return [sample() for _ in range(2 * repeats)]


@contextmanager
def compiling_nothing() -> Iterator[None]:
    """Raises `FunnelError` if something is compiled meanwhile, so that the samples are not timings."""
    with counting_compilations() as compilations:
        yield
    if compilations:
        raise FunnelError(f"{len(compilations)} programs were compiled while timing, and must not be; please report it")


@contextmanager
def counting_compilations() -> Iterator[list[float]]:
    """A list that grows by one for every program that JAX compiles in this process meanwhile."""
    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event == COMPILATION:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Samples as a result file has them: quartiles, median, and each one in the order taken."""
    return {**quartiles(samples)._asdict(), "samples": list(samples)}
