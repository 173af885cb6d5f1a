"""An engine whose batches tests hold back, count and break."""

import threading
from typing import Any

import numpy as np

from funnel_engine import Engine
from funnel_engine.inputs import Ragged


class GatedEngine:
    """An engine that starts a batch at once, and whose results come when `gate` is open.

    Attributes:
        started: the lengths of the sequences of each batch that was started, and its method.
        poison: batches with this token id fail.
        spoiled: sequences with this token id get NaN.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.gate = threading.Event()
        self.started: list[tuple[str, list[int]]] = []
        self.poison = self.spoiled = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def start(self, inputs: Ragged, method: str) -> "GatedCall":
        self.started.append((method, inputs.lengths.tolist()))
        if self.poison in inputs.ids:
            raise RuntimeError("poison")
        return GatedCall(self, inputs, method)


class GatedCall:
    def __init__(self, engine: GatedEngine, inputs: Ragged, method: str):
        self.engine, self.inputs, self.call = engine, inputs, engine.engine.start(inputs, method)

    def result(self) -> Any:
        assert self.engine.gate.wait(60)
        results = self.call.result()
        for index, (first, end) in enumerate(zip(self.inputs.offsets, self.inputs.offsets[1:], strict=False)):
            if self.engine.spoiled in self.inputs.ids[first:end]:
                results[index] = np.nan
        return results
