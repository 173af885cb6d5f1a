"""The results of a call: batches on the devices become one result per input, in the order of the inputs."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from funnel_engine.devices import Devices
from funnel_engine.inputs import Ragged
from funnel_engine.jax_settings import guarded
from funnel_engine.packing import Ints, Spans

PER_ROW = ("tag", "answer", "hidden_states")  # the methods of the engine that return an array per input


class BatchResult(NamedTuple):
    """The result of one batch: of its head, or the rows of the encoder."""

    order: Ints  # the indices of its sequences among the inputs
    spans: Spans  # their rows
    result: np.ndarray


class Running(NamedTuple):
    """A group of batches on the devices. An interrupted caller must wait for `output` all the same: if the engine is
    freed while a program runs, the program reads weights that are gone."""

    devices: Devices
    group: list[Ints]
    spans: list[Spans]
    output: jax.Array

    def results(self) -> Iterator[BatchResult]:
        """Waits for them."""
        results = self.devices.unstack(self.output)  # those of idle devices come last
        yield from map(BatchResult, self.group, self.spans, results)


class Call:
    """A call that `Engine.start` has dispatched."""

    def __init__(self, inputs: Ragged, method: str, running: Sequence[Running], params: Any):
        """`params` are the weights that the programs read, which must live as long as they run."""
        self._inputs, self._method, self._running, self._params = inputs, method, running, params

    @guarded
    def result(self) -> Any:
        """Waits, and returns what the engine's method returns; the vectors of "embed" are neither cut nor normalised,
        see `finish_vectors`."""
        parts = (part for running in self._running for part in running.results())
        return (split_rows if self._method in PER_ROW else join_sequences)(self._inputs, parts)


def join_sequences(inputs: Ragged, parts: Iterable[BatchResult]) -> np.ndarray:
    """One row per input, in their order, of batches whose results have one row per sequence; [B, D] float32."""
    results: np.ndarray | None = None
    for order, _, result in parts:
        if results is None:
            results = np.empty((len(inputs.lengths), result.shape[1]), np.float32)
        results[order] = result[: len(order)]
    assert results is not None, "there is at least one input"
    return results


def split_rows(inputs: Ragged, parts: Iterable[BatchResult]) -> list[np.ndarray]:
    """One array per input, in their order: its rows, float32."""
    results: list[np.ndarray] = [np.empty(0)] * len(inputs.lengths)
    for order, row_spans, result in parts:
        for index, first, count in zip(order, row_spans.first, row_spans.rows, strict=True):
            results[index] = result[first : first + count].astype(np.float32)  # a copy, so the batch can be freed
    return results


def finish_vectors(vectors: np.ndarray, size: int, normalize: bool) -> np.ndarray:
    """The first `size` dimensions of vectors, [B, size], scaled to length 1 if asked for."""
    vectors = np.ascontiguousarray(vectors[:, :size])
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12) if normalize else vectors
