"""The kernels suite: each case on each backend, in turns with the ceiling that bounds it.

The ceilings are measured first. A case's bound is the time that its work takes at their rates: of its products, or of
its bytes, whichever is longer. Its *share* is that of the bound in the measured time; 1 means as fast as this machine
can be. Share and ceiling of a row come from samples taken in turns (A B B A), so that a machine's moods cancel.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from funnel_benchmarks.kernels.cases import Case, Sizes, cases
from funnel_benchmarks.kernels.ceilings import SAMPLE_SECONDS, Ceiling
from funnel_benchmarks.measure import alone, in_turns, sampler, spread
from funnel_benchmarks.results import Cell, LeftOut, Row
from funnel_benchmarks.statistics import quartiles
from funnel_engine.devices import local_target
from funnel_kernels.errors import BackendUnavailable
from funnel_kernels.target import AUTO


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Suite:
    """What is measured.

    Attributes:
        backends: names in `funnel_kernels.BACKENDS`.
        ceilings: of products, and of copies.
        repeats: how often A B B A is run.
    """

    sizes: Sizes
    backends: tuple[str, ...]
    ceilings: tuple[Ceiling, Ceiling]
    repeats: int

    def options(self) -> Row:
        """Everything that a cell depends on beside its own name, as the head of a result file."""
        return {"dtype": self.sizes.dtype, "lengths": self.sizes.lengths.tolist(), "repeats": self.repeats}


def cells(suite: Suite) -> Iterator[Cell]:
    """The cells of a suite: a row for each ceiling, then one for each case and backend.

    A ceiling's row has `seconds` with samples, `work`, `rate` (FLOP/s or bytes/s) and `about`. A case's row has:

        case, backend       names
        flops, bytes        of a call; bytes are 0 for the whole forward pass, whose memory has no simple bound
        seconds             with samples
        bound               "product" or "copy"; `ceiling_seconds` of its ceiling, with samples
        share               {low, median, high} of the bound in the time, of samples taken side by side
        flops_per_second, bytes_per_second
    """
    for ceiling in suite.ceilings:
        yield f"ceiling: {ceiling.name}", partial(measure_ceiling, ceiling, suite.repeats)
    for case in cases(suite.sizes):
        for backend in suite.backends:
            yield f"{case.name}; {backend}", partial(measure, suite, case, backend)


def measure_ceiling(ceiling: Ceiling, repeats: int) -> Row:
    samples = alone(ceiling.sample, repeats)
    rate = ceiling.work / quartiles(samples).median
    return {"about": ceiling.about, "work": ceiling.work, "seconds": spread(samples), "rate": rate}


def measure(suite: Suite, case: Case, backend: str) -> Row:
    try:
        sample = sampler(case.make(local_target(backend)), SAMPLE_SECONDS)
    except BackendUnavailable as reason:
        raise LeftOut(str(reason)) from None
    ceiling, work = bound(case, suite.ceilings)
    ceiling_samples, samples = in_turns(ceiling.sample, sample, suite.repeats)
    bounds = work / ceiling.work * np.array(ceiling_samples)
    median = quartiles(samples).median
    return {
        "case": case.name,
        "backend": backend,
        "flops": case.flops,
        "bytes": case.bytes,
        "seconds": spread(samples),
        "bound": ceiling.name,
        "ceiling_seconds": spread(ceiling_samples),
        "share": quartiles((bounds / samples).tolist())._asdict(),
        "flops_per_second": case.flops / median,
        "bytes_per_second": case.bytes / median,
    }


def bound(case: Case, ceilings: tuple[Ceiling, Ceiling]) -> tuple[Ceiling, int]:
    """The ceiling at which a case takes longer, and how much of its work is meant."""
    needed = [
        (work / ceiling.work * ceiling.sample(), ceiling, work)
        for ceiling, work in zip(ceilings, (case.flops, case.bytes), strict=True)
        if work
    ]
    _, ceiling, work = max(needed, key=lambda each: each[0])
    return ceiling, work


def backends_here() -> tuple[str, ...]:
    """Those that can run on this machine's device, but for the reference, which is no backend for speed."""
    platform = {"gpu": "triton", "cuda": "triton", "tpu": "tpu"}.get(jax.default_backend(), "cpu")
    return tuple(name for name in AUTO if name in (platform, "xla"))
