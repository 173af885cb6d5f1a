"""The queue before the engine, and the two threads that run it.

Requests wait in a queue that is bounded in rows and in requests. A batch takes one sequence of each request in turn, so
a request with thousands of texts does not block a short one, and ends where the next sequence does not fit.

No request waits for a timer: an idle engine runs at once what there is, and what comes in meanwhile makes the next
batch. One thread packs and dispatches batches, the other waits for their results. So a batch is packed while another
runs, but not before it is as large as that one: a batch that is closed early is small, and small batches cost more.
"""

import asyncio
import dataclasses
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from funnel_engine import Engine
from funnel_engine.inputs import Ragged
from funnel_engine.packing import Ints
from funnel_engine.results import PER_ROW, Call
from funnel_serving.metrics import Metrics
from funnel_serving.refusals import Refusal

log = logging.getLogger(__name__)

SHORTEST_RETRY, LONGEST_RETRY = 1.0, 30.0  # seconds, in Retry-After
MEMORY = 0.8  # the weight of earlier batches in the mean speed, at each new batch
ON_DEVICE = 2  # batches: one runs, and one is packed


class Request:
    """The sequences of one request, all for one method of the engine, and what became of them.

    Attributes:
        method: "embed", "classify", "tag" or "hidden_states".
        inputs: the token ids.
        rows: the rows that each sequence takes in a batch, [B].
        deadline: when it is too late to run it, on the clock of `time.perf_counter`.
        future: its results, [B, D] or a list of B arrays; or a `Refusal`.
        submitted, began, ended: when it came into the queue, its first batch began, and its last one ended.
        taken: how many of its sequences are in a batch, or were.
    """

    def __init__(self, method: str, inputs: Ragged, rows: Ints, deadline: float):
        self.method, self.inputs, self.deadline = method, inputs, deadline
        self.rows: list[int] = rows.tolist()
        self.waiting_rows = sum(self.rows)
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.submitted = self.began = self.ended = time.perf_counter()
        self.taken = 0
        self._results: Any = [None] * len(self.rows) if method in PER_ROW else None
        self._missing = len(self.rows)

    def store(self, indices: Sequence[int], results: Sequence[np.ndarray] | np.ndarray) -> Any:
        """Keeps the results of these sequences. Returns those of all sequences once they are complete, else None."""
        if self._results is None:
            assert isinstance(results, np.ndarray)
            self._results = np.empty((len(self.rows), results.shape[1]), np.float32)
        if isinstance(results, np.ndarray):
            self._results[indices] = results
        else:
            for index, result in zip(indices, results, strict=True):
                self._results[index] = result
        self._missing -= len(indices)
        return None if self._missing else self._results


@dataclasses.dataclass(frozen=True)
class Part:
    """Those sequences of a request that are in one batch."""

    request: Request
    indices: list[int]

    @property
    def inputs(self) -> Ragged:
        return self.request.inputs.take(np.array(self.indices))


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch on the device; `call` is the exception if it could not be dispatched."""

    parts: list[Part]
    rows: int
    began: float
    call: Call | Exception


class Batcher:
    """Makes batches of the requests of all clients. Made and called by the event loop; `close` by any other thread."""

    def __init__(self, engine: Engine, metrics: Metrics, *, max_waiting_rows: int, max_waiting_requests: int):
        self.engine, self.metrics, self.batch_rows = engine, metrics, engine.batch_rows
        self.max_waiting_rows, self.max_waiting_requests = max_waiting_rows, max_waiting_requests
        self._waiting: deque[Request] = deque()
        self._waiting_rows = 0
        self._rows_per_second: float | None = None
        self._progress = time.perf_counter()  # when a batch ended, or work came to an idle engine
        self._is_closed = False
        self._changed = threading.Condition()  # guards all of these, and `_running`
        self._running: deque[int] = deque()  # the rows of each batch on the device
        self._dispatched: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._dispatch_batches, "dispatch"), (self._finish_batches, "results"))
        ]
        for thread in self._threads:
            thread.start()

    def check_room(self, sequences: int) -> None:
        """Refuses as `submit` would if each sequence needed one row.

        That is known before they are tokenised, which takes long where many clients must be refused.
        """
        with self._changed:
            self._check_room(sequences)

    def submit(self, method: str, inputs: Ragged, deadline: float) -> Request:
        """Puts a whole request into the queue, or none of it.

        Raises:
            Refusal: it can never fit ("too_large"), or does not fit now ("overloaded").
        """
        request = Request(method, inputs, self.engine.rows_needed(inputs.lengths), deadline)
        rows = request.waiting_rows
        with self._changed:
            self._check_room(rows)
            if not self._waiting and not self._running:
                self._progress = request.submitted
            self._waiting.append(request)
            self._count_waiting(rows)
            self._changed.notify()
        return request

    def drop(self, request: Request) -> None:
        """Takes a request that nobody waits for out of the queue. What runs of it is thrown away."""
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
                self._count_waiting(-request.waiting_rows)
                if request.future.cancelled():
                    self.metrics.dropped.inc()

    def seconds_without_progress(self) -> float:
        """For how long there has been work, and no batch has ended; 0 if there is no work."""
        with self._changed:
            return 0.0 if self._is_idle() else time.perf_counter() - self._progress

    def close(self, seconds: float) -> bool:
        """Refuses new requests, and waits for all others; whether they were done within the time."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _check_room(self, rows: int) -> None:
        if self._is_closed:
            raise Refusal("unhealthy", "the server stops; ask another one")
        if rows > self.max_waiting_rows:
            raise Refusal(
                "too_large",
                f"the inputs need at least {rows} rows, more than the {self.max_waiting_rows} of the whole queue; send "
                "fewer or shorter inputs in a request",
            )
        if self._waiting_rows + rows > self.max_waiting_rows or len(self._waiting) >= self.max_waiting_requests:
            seconds = self._seconds_to_wait()
            raise Refusal(
                "overloaded",
                f"{len(self._waiting)} requests with {self._waiting_rows} rows wait; the limits are "
                f"{self.max_waiting_requests} requests and {self.max_waiting_rows} rows, and this one needs at least "
                f"{rows} rows. Try again in {seconds:.0f} s",
                retry_after=seconds,
            )

    def _is_idle(self) -> bool:
        return not self._waiting and not self._running

    def _seconds_to_wait(self) -> float:
        seconds = self._waiting_rows / self._rows_per_second if self._rows_per_second else SHORTEST_RETRY
        return min(max(seconds, SHORTEST_RETRY), LONGEST_RETRY)

    def _count_waiting(self, rows: int) -> None:
        self._waiting_rows += rows
        self.metrics.observe_queue(self._waiting_rows, len(self._waiting))

    # What the two threads do.

    def _dispatch_batches(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_time() or (self._is_closed and not self._waiting))
                if not self._waiting:
                    break
                parts, rows = self._take()
                if parts:
                    self._running.append(rows)
            if parts:
                self._dispatched.put(self._start(parts, rows))
        self._dispatched.put(None)

    def _is_time(self) -> bool:
        """Whether to make a batch now."""
        if len(self._running) == ON_DEVICE:
            return False
        return self._waiting_rows >= min(self._running[0], self.batch_rows) if self._running else bool(self._waiting)

    def _take(self) -> tuple[list[Part], int]:
        """The next batch: one sequence of each request in turn, all for the method of the first; and its rows."""
        taken: dict[Request, list[int]] = {}
        others: list[Request] = []  # whose turn remains, because they are for another method
        rows, method, now = 0, "", time.perf_counter()
        while self._waiting:
            request = self._waiting[0]
            if request.deadline < now:
                self._waiting.popleft()
                self._waiting_rows -= request.waiting_rows
                self.metrics.dropped.inc()
                continue
            method = method or request.method
            if request.method != method:
                others.append(self._waiting.popleft())
                continue
            needed = request.rows[request.taken]
            if taken and rows + needed > self.batch_rows:
                break
            self._waiting.popleft()
            taken.setdefault(request, []).append(request.taken)
            request.taken += 1
            request.waiting_rows -= needed
            rows += needed
            if request.taken < len(request.rows):
                self._waiting.append(request)
        self._waiting.extendleft(reversed(others))
        self._count_waiting(-rows)
        return [Part(request, indices) for request, indices in taken.items()], rows

    def _start(self, parts: list[Part], rows: int) -> Batch:
        began = time.perf_counter()
        for part in parts:
            if part.indices[0] == 0:
                part.request.began = began
        inputs = concatenate([part.inputs for part in parts])
        self.metrics.observe_batch(len(inputs.lengths), rows, len(inputs.ids))
        try:
            return Batch(parts, rows, began, self.engine.start(inputs, parts[0].request.method))
        except Exception as error:  # whatever it is, the other requests of the batch must not fail with one
            return Batch(parts, rows, began, error)

    def _finish_batches(self) -> None:
        while (batch := self._dispatched.get()) is not None:
            failure: Exception | None = None
            try:
                if isinstance(batch.call, Exception):
                    raise batch.call
                results = batch.call.result()
            except Exception as error:  # as above
                failure = error
            ended = time.perf_counter()
            with self._changed:
                self._running.popleft()
                speed = batch.rows / (ended - max(batch.began, self._progress))
                mean = self._rows_per_second
                self._rows_per_second = speed if mean is None else MEMORY * mean + (1 - MEMORY) * speed
                self._progress = ended
                self._changed.notify()
            if failure:
                self._run_one_by_one(batch.parts, failure)
            else:
                split = np.cumsum([len(part.indices) for part in batch.parts])
                for part, first, end in zip(batch.parts, [0, *split[:-1]], split, strict=True):
                    self._deliver(part, results[first:end])

    def _run_one_by_one(self, parts: list[Part], failure: Exception) -> None:
        """Runs each request of a failed batch alone, so that only the guilty one fails."""
        log.error("a batch failed", exc_info=failure, extra={"requests": len(parts)})
        for part in parts:
            try:
                if len(parts) == 1:
                    raise failure
                results = self.engine.start(part.inputs, part.request.method).result()
            except Exception as error:  # as in `_start`
                reason = f"the engine failed: {type(error).__name__}; the server's log has more"
                self._resolve(part.request, refusal=Refusal("inference", reason))
            else:
                self._deliver(part, results)

    def _deliver(self, part: Part, results: Any) -> None:
        """Gives a request its results, once they are complete."""
        request = part.request
        request.ended = time.perf_counter()
        is_finite = all(np.isfinite(result).all() for result in results)
        if not is_finite:
            self.metrics.nonfinite.inc()
            reason = "a result is not finite, so it would be no use; the weights or the backend are broken"
            self._resolve(request, refusal=Refusal("inference", reason))
        elif (complete := request.store(part.indices, results)) is not None:
            self._resolve(request, complete)

    def _resolve(self, request: Request, results: Any = None, refusal: Refusal | None = None) -> None:
        def resolve() -> None:
            if request.future.done():  # the client has left, or another part of the request failed
                return
            if refusal:
                request.future.set_exception(refusal)
            else:
                request.future.set_result(results)

        request.future.get_loop().call_soon_threadsafe(resolve)


def concatenate(parts: Sequence[Ragged]) -> Ragged:
    """The sequences of all parts, in order."""
    ids = np.concatenate([part.ids for part in parts])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))])
    if all(part.types is None for part in parts):
        return Ragged(ids, offsets.astype(np.int32))
    types = [np.zeros_like(part.ids) if part.types is None else part.types for part in parts]
    return Ragged(ids, offsets.astype(np.int32), np.concatenate(types))
