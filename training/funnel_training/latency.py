"""How long a model takes, relative to the unfunneled one on the same inputs."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Latency:
    """Medians over the rounds.

    Attributes:
        seconds, baseline_seconds: of one call.
        ratio: of the two within a round, so that slow drift of the machine cancels.
        low, high: first and third quartile of that ratio.
    """

    seconds: float
    baseline_seconds: float
    ratio: float
    low: float
    high: float


def measure_in_turns(baseline: Callable[[], Any], other: Callable[[], Any]) -> Latency:
    """Times two calls in the order A B B A, five times over; both have run once before."""

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    baseline(), other()
    rounds = np.array([[seconds(call) for call in (baseline, other, other, baseline)] for _ in range(ROUNDS)])
    exact, others = rounds[:, [0, 3]], rounds[:, [1, 2]]
    low, ratio, high = np.quantile(others.sum(axis=1) / exact.sum(axis=1), (0.25, 0.5, 0.75))
    return Latency(float(np.median(others)), float(np.median(exact)), float(ratio), float(low), float(high))
