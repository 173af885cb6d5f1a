"""The parts of a run: each module's `cells` names what it measures, and measures it when asked to."""

from collections.abc import Callable, Iterator

from funnel_benchmarks.accelerator.bench import Bench
from funnel_benchmarks.accelerator.parts import (
    attention,
    ceilings,
    check,
    engine,
    flags,
    funnel,
    latency,
    peer,
    ragged,
    rows,
)
from funnel_benchmarks.results import Measurement

# In order of importance: a run that is short of time measures the first ones.
PARTS: dict[str, Callable[[Bench], Iterator[Measurement]]] = {
    "check": check.cells,
    "ceilings": ceilings.cells,
    "attention": attention.cells,
    "rows": rows.cells,
    "engine": engine.cells,
    "funnel": funnel.cells,
    "peer": peer.cells,
    "latency": latency.cells,
    "ragged": ragged.cells,
    "flags": flags.cells,
}
