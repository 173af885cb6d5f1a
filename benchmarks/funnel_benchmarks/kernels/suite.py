"""The kernels suite: each case on each backend, in turns with the ceiling that bounds it.

The ceilings are measured first. A case's bound is the time that its work takes at their rates: of its products, or of
its bytes, whichever is longer. Its *share* is that of the bound in the measured time; 1 means as fast as this machine
can be. Share and ceiling of a row come from samples taken in turns (A B B A), so that changes of the machine's speed
cancel.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import numpy as np

from funnel_benchmarks.charts import Chart, Panel, Series
from funnel_benchmarks.kernels.cases import CUDNN, Case
from funnel_benchmarks.kernels.ceilings import SAMPLE_SECONDS, Ceiling
from funnel_benchmarks.measure import alone, in_turns, sampler, spread
from funnel_benchmarks.results import LeftOut, Measurement, Results, Row, error_text
from funnel_benchmarks.statistics import quartiles
from funnel_benchmarks.suite import Cell, Column, Section, Table, field, number
from funnel_benchmarks.suite import Suite as BaseSuite
from funnel_engine.devices import local_target
from funnel_engine.packing import Ints
from funnel_kernels.errors import BackendUnavailable, FunnelError
from funnel_kernels.op import problem
from funnel_kernels.target import AUTO


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Suite(BaseSuite):
    """What is measured.

    Attributes:
        model: whose sizes they are, in words.
        dtype, lengths: of the model's batch.
        cases: none: only the ceilings are measured.
        backends: names in `funnel_kernels.BACKENDS`.
        ceilings: of products, and of copies.
        repeats: how often A B B A is run.
        seconds: that a sample lasts at least.
    """

    model: str
    dtype: str
    lengths: Ints
    cases: Sequence[Case]
    backends: tuple[str, ...]
    ceilings: tuple[Ceiling, Ceiling]
    repeats: int
    seconds: float = SAMPLE_SECONDS

    name = "kernels"

    def options(self) -> Row:
        """Everything that a cell depends on beside its own name, as the head of a result file."""
        lengths = self.lengths.tolist()
        return {"model": self.model, "dtype": self.dtype, "lengths": lengths, "repeats": self.repeats}

    def cells(self, results: Results) -> Iterator[Measurement]:
        """The cells of a suite: a row for each ceiling, then one for each case and backend.

        A ceiling's row has `seconds` with samples, `work`, `rate` (FLOP/s or bytes/s) and `about`. A case's row has:

            case, backend       names
            flops, bytes        of a call; bytes are 0 for the whole forward pass, whose memory has no simple bound
            seconds             with samples
            bound               "product" or "copy"; `ceiling_seconds` of its ceiling, with samples
            share               {low, median, high} of the bound in the time, of samples taken side by side
            flops_per_second, bytes_per_second
        """
        for ceiling in self.ceilings:
            yield f"ceiling: {ceiling.name}", partial(measure_ceiling, ceiling, self.repeats)
        for case in self.cases:
            for backend in case.backends or self.backends:
                yield f"{case.name}; {backend}", partial(measure, self, case, backend)

    @classmethod
    def section(cls, content: Row) -> Section:
        """The share of this machine's ceilings that each op reaches."""
        options = content["options"]
        measured = [row for row in content["rows"] if "share" not in row]
        rows = [row for row in content["rows"] if "share" in row]
        lengths = options["lengths"]
        batch = f"{len(lengths)} x {lengths[0]} tokens, " if lengths else ""
        return Section(
            title=f"Kernels: {options['model']}",
            facts={
                "Sizes": f"of {options['model']}; {batch}{options['dtype']}",
                "Repeats": f"{options['repeats']} times A B B A",
            },
            tables=[Table("Ceilings", CEILING_COLUMNS, measured), Table("Ops", COLUMNS, rows)],
            plots=[plot(rows, bound) for bound in ("product", "copy") if any(row["bound"] == bound for row in rows)],
            summary=summary(rows),
            reading=READING,
        )


def measure_ceiling(ceiling: Ceiling, repeats: int) -> Row:
    samples = alone(ceiling.sample, repeats)
    rate = ceiling.work / quartiles(samples).median
    return {"about": ceiling.about, "work": ceiling.work, "seconds": spread(samples), "rate": rate}


def measure(suite: Suite, case: Case, backend: str) -> Row:
    try:
        sample = sampler(case.make(backend), suite.seconds)
    except BackendUnavailable as reason:
        raise LeftOut(str(reason)) from None
    except FunnelError:
        raise
    except Exception as reason:  # cuDNN is missing or refuses: XLA raises anything
        if backend != CUDNN:
            raise
        raise LeftOut(error_text(reason)) from None
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
    """Those that can run on this machine's device, best first, without the reference, which is not for speed."""
    platform = {"gpu": "triton", "cuda": "triton", "tpu": "tpu"}.get(jax.default_backend(), "cpu")
    return tuple(name for name in AUTO if name in (platform, "xla"))


def runs_mosaic() -> bool:
    """Whether this machine's device is a Hopper GPU, whose attention is Mosaic's unless another backend is named."""
    return problem("mosaic", local_target("mosaic")) is None


READING = (
    "The ceilings are what this machine can do at best: a large matrix product by the best library there is, with its "
    "weight laid out beforehand, and a copy of memory that no cache holds, in bytes read and written.",
    "Share is the time that an op's work takes at the rate of the ceiling that bounds it, over the time that it does "
    "take: 1 means as fast as can be. Its samples and the ceiling's took turns (A B B A); the range is that of the "
    "quartiles. Above 1 an op runs at a better rate than the ceiling, because its arrays stay in a cache, or by noise.",
    "Each op is a program of its own. On a CPU its result lies in memory that has been used before, as inside a model. "
    "Row-wise ops have more rows than a cache holds. embed is a whole forward pass, from token ids on "
    "the host to vectors on the host.",
)
CEILING_COLUMNS = (
    Column("ceiling", lambda row: row["cell"].removeprefix("ceiling: ")),
    Column("what", lambda row: row["about"]),
    Column("rate", field("rate", ",.1f", 1e-9), note="GFLOP/s or GB/s"),
)


def rate(name: str) -> Callable[[Row], Cell | None]:
    """The cell of billions a second; empty where a case has no such work."""
    return lambda row: number(row[name], ",.1f", 1e-9) if row[name] else None


COLOURS, MARKERS = ("measured", "ideal", "ink"), "osD^v"
COLUMNS = (
    Column("op", lambda row: Cell(row["case"], row["backend"]), note="and backend"),
    Column("share", field("share", ".2f"), note="quartiles"),
    Column("bound by", lambda row: row["bound"]),
    Column("time", lambda row: number(row["seconds"]["median"], ",.2f", 1e3), "ms"),
    Column("GFLOP/s", rate("flops_per_second")),
    Column("GB/s", rate("bytes_per_second")),
)


def share(row: Row) -> str:
    return f"{row['share']['median']:.2f}"


def summary(rows: list[Row]) -> str:
    """The first whole forward pass by each backend, and attention against cuDNN's, if they are there."""
    whole = [row for row in rows if row["case"].startswith("embed")]
    shares = [f"{share(row)} with {row['backend']}" for row in whole if row["case"] == whole[0]["case"]]
    sentences = [f"A whole forward pass reaches {' and '.join(shares)} of the rate of a bare matrix product."]
    cudnn = {row["case"]: row["share"]["median"] for row in rows if row["backend"] == CUDNN}
    ratios = [
        row["share"]["median"] / cudnn[row["case"]] for row in rows if row["case"] in cudnn and row["backend"] != CUDNN
    ]
    return " ".join(
        [
            *(sentences if whole else []),
            *([f"Attention reaches {min(ratios):.2f} to {max(ratios):.2f} of cuDNN's rate."] if ratios else []),
        ]
    )


def plot(rows: list[Row], bound: str) -> Chart:
    """A dot for each op and backend."""
    mine = [row for row in rows if row["bound"] == bound]
    cases, backends = (list(dict.fromkeys(row[name] for row in mine)) for name in ("case", "backend"))
    series = []
    for index, backend in enumerate(backends):
        own = [row for row in mine if row["backend"] == backend]
        places, shares = [cases.index(row["case"]) for row in own], [row["share"] for row in own]
        series.append(Series(backend, places, shares, COLOURS[index % 3], MARKERS[index % 5]))
    words = "; ".join(f"{row['cell']}: {share(row)}" for row in mine)
    ceiling = {"product": "a large matrix product", "copy": "a copy of memory"}[bound]
    return Chart(
        described=f"Share of the rate of {ceiling} that each op reaches: {words}.",
        caption=f"Share of the rate of {ceiling}, with quartiles; the dashed line is that ceiling.",
        panels=[Panel(series, value_label="share of the ceiling", rows=cases, references={ceiling: 1.0})],
    )
