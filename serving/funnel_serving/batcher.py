"""The queue before the engine, and the thread that runs it.

Requests wait in a queue that is bounded in rows and in requests. A batch takes one sequence of each request in turn, so
a request with thousands of texts does not block a short one, and ends when the next sequence does not fit. There is no
timer that makes a request wait for others: an idle engine runs at once what there is, and what comes in while a batch
runs makes the next batch. When enough waits for a full batch, that one is packed and dispatched while the last runs.
"""

import asyncio
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from funnel_engine import Engine
from funnel_engine.inputs import Ragged
from funnel_engine.packing import Ints
from funnel_engine.results import PER_ROW
from funnel_serving.metrics import Metrics
from funnel_serving.refusals import Refusal

log = logging.getLogger(__name__)

SHORTEST_RETRY, LONGEST_RETRY = 1.0, 30.0  # seconds in Retry-After
MEMORY = 0.8  # how much of the speed of earlier batches remains in the mean, for each new batch


class Request:
    """The sequences of one request, all for one method of the engine, and what is known of them.

    Attributes:
        method: "embed", "classify", "tag" or "hidden_states".
        inputs: the token ids.
        rows: the rows that each sequence takes, [B].
        deadline: when it is too late to run it, on the clock of `time.perf_counter`.
        future: of the results: one array, or a list of arrays if the method has one for each input.
        queue_seconds, inference_seconds: until its first batch began, and from then until its last one ended.
    """

    def __init__(self, method: str, inputs: Ragged, rows: Ints, deadline: float):
        self.method, self.inputs, self.deadline = method, inputs, deadline
        self.rows: list[int] = rows.tolist()
        self.waiting_rows = sum(self.rows)
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.submitted = time.perf_counter()
        self.queue_seconds = self.inference_seconds = 0.0
        self.taken = 0  # sequences that are in a batch, or were
        self.is_dropped = False
        self._results: list[Any] = [None] * len(self.rows)
        self._done = 0

    def take(self) -> int:
        """The index of its next sequence, which is now in a batch."""
        index, self.taken = self.taken, self.taken + 1
        self.waiting_rows -= self.rows[index]
        return index

    def store(self, indices: Sequence[int], results: Sequence[np.ndarray]) -> bool:
        """Keeps results; whether they are complete now."""
        for index, result in zip(indices, results, strict=True):
            self._results[index] = result
        self._done += len(indices)
        return self._done == len(self.rows)

    def results(self) -> Any:
        return self._results if self.method in PER_ROW else np.stack(self._results)


@dataclasses.dataclass(frozen=True)
class Part:
    """The sequences of one request that are in a batch."""

    request: Request
    indices: list[int]

    @property
    def inputs(self) -> list[Ints]:
        ids, offsets = self.request.inputs
        return [ids[offsets[index] : offsets[index + 1]] for index in self.indices]


@dataclasses.dataclass(frozen=True)
class Running:
    """A batch on the device."""

    parts: list[Part]
    call: Any  # funnel_engine.results.Call
    rows: int
    began: float


class Batcher:
    """Makes batches of the requests of all clients and runs them in one thread."""

    def __init__(self, engine: Engine, metrics: Metrics, *, max_waiting_rows: int, max_waiting_requests: int):
        self.engine, self.metrics = engine, metrics
        self.max_waiting_rows, self.max_waiting_requests = max_waiting_rows, max_waiting_requests
        self.batch_rows = engine.batch_rows
        self.waiting_rows = 0
        self.last_progress = time.perf_counter()  # when a batch ended, or the queue began to fill
        self._rows_per_second: float | None = None
        self._waiting: deque[Request] = deque()
        self._running = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # What the event loop calls.

    def submit(self, method: str, inputs: Ragged, deadline: float) -> Request:
        """Puts a whole request into the queue, or none of it.

        Raises:
            Refusal: it can never fit ("too_large"), or does not fit now ("overloaded").
        """
        request = Request(method, inputs, self.engine.rows_needed(inputs.lengths), deadline)
        rows = request.waiting_rows
        if rows > self.max_waiting_rows:
            raise Refusal(
                "too_large",
                f"the request needs {rows} rows of tokens, more than the {self.max_waiting_rows} of the whole queue; "
                "send fewer or shorter inputs in one request",
            )
        with self._changed:
            if self._is_closed:
                raise Refusal("unhealthy", "the server stops; send the request to another one")
            full_rows = self.waiting_rows + rows > self.max_waiting_rows
            if full_rows or len(self._waiting) >= self.max_waiting_requests:
                seconds = self._seconds_to_wait()
                raise Refusal(
                    "overloaded",
                    f"{len(self._waiting)} requests with {self.waiting_rows} rows wait, and the limits are "
                    f"{self.max_waiting_requests} requests and {self.max_waiting_rows} rows; try again in "
                    f"{seconds:.0f} s",
                    retry_after=seconds,
                )
            if not self._waiting and not self._running:
                self.last_progress = time.perf_counter()
            self._waiting.append(request)
            self._add_waiting(rows)
            self._changed.notify()
        return request

    def drop(self, request: Request) -> None:
        """Takes a request out of the queue, because nobody waits for it any more. What runs of it is thrown away."""
        with self._changed:
            if not request.is_dropped and not request.future.done():
                request.is_dropped = True
                self.metrics.dropped.inc()
                if request in self._waiting:
                    self._waiting.remove(request)
                    self._add_waiting(-request.waiting_rows)

    def seconds_without_progress(self) -> float:
        """For how long work has waited or run, and no batch has ended; 0 if there is no work."""
        with self._changed:
            has_work = bool(self._waiting or self._running)
            return time.perf_counter() - self.last_progress if has_work else 0.0

    @property
    def is_idle(self) -> bool:
        with self._changed:
            return not self._waiting and not self._running

    def close(self) -> None:
        """Refuses new requests, and ends the thread once all of the old ones are done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _seconds_to_wait(self) -> float:
        seconds = self.waiting_rows / self._rows_per_second if self._rows_per_second else SHORTEST_RETRY
        return min(max(seconds, SHORTEST_RETRY), LONGEST_RETRY)

    def _add_waiting(self, rows: int) -> None:
        self.waiting_rows += rows
        self.metrics.waiting_rows.set(self.waiting_rows)
        self.metrics.waiting_requests.set(len(self._waiting))

    # What the thread runs.

    def _run(self) -> None:
        running: Running | None = None
        while True:
            following = self._start(parts) if (parts := self._next_parts(running)) else None
            if running:
                self._finish(running)
                if following is None and (parts := self._next_parts(None, wait=False)):
                    following = self._start(parts)
            running = following
            if running is None and self._is_finished():
                return
