"""The server: one loop that embeds what waits, as much at once as a batch holds.

Arrivals are an *open loop*: they are fixed beforehand, so a slow server does not slow them down, and a request that had
to wait counts its waiting. The server looks at no request that has not arrived yet, keeps the order of arrival, and
knows nothing of a request but its size.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Clock = Callable[[], float]
Sleep = Callable[[float], object]


class Served(NamedTuple):
    """What became of n requests.

    Attributes:
        latencies: [n] seconds from arrival to completion, in order of arrival.
        batches: [B] how many requests each batch had.
        busy: seconds that the engine worked.
        seconds: from the beginning to the last completion.
    """

    latencies: np.ndarray
    batches: np.ndarray
    busy: float
    seconds: float


def serve(
    arrivals: np.ndarray,
    sizes: np.ndarray,
    budget: int,
    embed: Callable[[int, int], object],
    *,
    clock: Clock = time.perf_counter,
    sleep: Sleep = time.sleep,
) -> Served:
    """Serves all requests, and returns when the last one is done.

    Args:
        arrivals: [n] seconds after the beginning, rising.
        sizes: [n] what each request takes of a batch; none is larger than `budget`.
        budget: what a batch holds.
        embed: runs requests `first ... stop - 1` as one batch.
        clock: seconds since any moment.
        sleep: waits for about this number of seconds.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    latencies, batches, busy = np.empty(len(arrivals)), [], 0.0
    first, taken, begin = 0, 0, clock()
    while first < len(arrivals):
        now = clock() - begin
        if arrivals[first] > now:
            sleep(arrivals[first] - now)
            continue
        arrived = np.searchsorted(arrivals, now, side="right")
        stop = int(min(arrived, np.searchsorted(ends, taken + budget, side="right")))
        embed(first, stop)
        done = clock() - begin
        latencies[first:stop] = done - arrivals[first:stop]
        batches.append(stop - first)
        busy += done - now
        first, taken = stop, int(ends[stop - 1])
    return Served(latencies, np.array(batches), busy, clock() - begin)
