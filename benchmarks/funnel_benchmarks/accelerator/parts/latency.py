"""One short sequence: how long it takes, and whether the device ever waits. And where the time of a full batch goes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from funnel_benchmarks.accelerator.bench import Bench
from funnel_benchmarks.accelerator.device_profile import (
    Kernel,
    busy_nanoseconds,
    most_expensive,
    profile,
    span_nanoseconds,
)
from funnel_benchmarks.measure import alone, sampler, spread
from funnel_benchmarks.results import Cell, LeftOut, Row

GOAL = 0.9  # of the time between the first and the last kernel
SHOWN = 10  # kernels
PROFILES = 5


def cells(bench: Bench) -> Iterator[Cell]:
    one, (sequences, tokens) = bench.sizes.one, bench.sizes.batches[0]
    yield f"one sequence of {one} tokens", partial(wall_time, bench)
    yield f"device busy, one sequence of {one} tokens", partial(busy_share, bench)
    yield f"where the time goes, {sequences} x {tokens} tokens", partial(where_time_goes, bench)


def one_sequence(bench: Bench) -> Callable[[], Any]:
    return bench.embedding(np.array([bench.sizes.one], np.int32))


def wall_time(bench: Bench) -> Row:
    """Every call is a sample: a caller waits for each."""
    return {"seconds": spread(alone(sampler(one_sequence(bench), 0.0), 10 * bench.sizes.repeats))}


def busy_share(bench: Bench) -> Row:
    call = one_sequence(bench)
    call()
    profiles = [profiled(call) for _ in range(PROFILES)]
    shares = [busy_nanoseconds(ran) / span_nanoseconds(ran) for ran in profiles]
    median = float(np.median(shares))
    return {
        "busy_share": median,
        "busy_shares": shares,
        "busy_milliseconds": float(np.median([busy_nanoseconds(ran) for ran in profiles])) / 1e6,
        "kernels": len(profiles[0]),
        "goal": GOAL,
    }


def where_time_goes(bench: Bench) -> Row:
    call = bench.embedding(bench.equal_lengths)
    call()
    ran = profiled(call)
    return {
        "busy_share": busy_nanoseconds(ran) / span_nanoseconds(ran),
        "span_milliseconds": span_nanoseconds(ran) / 1e6,
        "kernels": len(ran),
        "most_expensive": [total._asdict() for total in most_expensive(ran, SHOWN)],
    }


def profiled(call: Callable[[], Any]) -> list[Kernel]:
    ran = profile(call)
    if not ran:
        raise LeftOut("the profile has no plane of a device: JAX does not tell here when the device works")
    return ran
