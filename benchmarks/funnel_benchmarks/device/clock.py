"""The time that a run may take, since a machine with an accelerator is often lent for minutes."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from funnel_benchmarks.results import LeftOut, Measurement, Row


class Clock:
    """Runs out after `minutes`. A cell that has begun is finished; none begins after it."""

    def __init__(self, minutes: float, start: float):
        self.end = start + 60 * minutes  # as time.monotonic() counts

    def seconds_left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def within(self, cells: Iterable[Measurement]) -> Iterator[Measurement]:
        """The same cells, which are left out if their turn comes too late."""
        for name, measure in cells:
            yield name, partial(self.measure, measure)

    def measure(self, measure: Callable[[], Row]) -> Row:
        if not self.seconds_left():
            raise LeftOut("not measured: out of time")
        return measure()
