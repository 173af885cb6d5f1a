"""One short sequence: how long it takes, and whether the device ever waits. Where the time of a full batch goes. And
what XLA's options for GPUs change.

A profile has one plane for each device; on its lines lie the kernels and transfers, one line for each stream of a GPU.
While JAX's profiler runs, XLA replays no CUDA graphs, so the gaps between the kernels of a profile are not those of a
call. Kernels are taken from profiles, and the time of a call from calls without one.
"""

import dataclasses
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.profiler import ProfileData, ProfileOptions

from funnel_benchmarks.describe import describe_backend, describe_model
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_benchmarks.inputs import random_inputs
from funnel_benchmarks.kernels.cases import forward_pass
from funnel_benchmarks.measure import Call, alone, in_turns, sampler, spread
from funnel_benchmarks.models import Model
from funnel_benchmarks.results import LeftOut, Measurement, Results, Row
from funnel_benchmarks.statistics import quartiles, ratio
from funnel_benchmarks.suite import Column, Section, Table, field
from funnel_benchmarks.suite import Suite as BaseSuite
from funnel_engine.packing import Ints
from funnel_engine.xla_options import compiler_options

PROFILES = 5
SHOWN = 10  # kernels
Options = dict[str, Any]
CANDIDATES: tuple[Options, ...] = (
    {"xla_gpu_enable_latency_hiding_scheduler": True},
    {"xla_gpu_enable_command_buffer": ""},
    {"xla_gpu_enable_triton_gemm": False},
    {"xla_gpu_graph_min_graph_size": 1},
    # XLA's default and WHILE; compiler options do not know the form "+WHILE" of XLA_FLAGS.
    {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE"},
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Suite(BaseSuite):
    """What is measured.

    Attributes:
        measured: `profiles` or `xla_options`, below.
        batch: tokens of each sequence of a full batch, [B].
        one: tokens of a single sequence.
        repeats: half the number of samples.
    """

    measured: Callable[["Suite"], Iterator[Measurement]]
    model: Model
    batch: Ints
    one: int
    backend: str
    repeats: int

    name = "profile"

    def options(self) -> Row:
        return {
            "measured": self.measured.__name__,
            "model": self.model.facts(),
            "batch": self.batch.tolist(),
            "one": self.one,
            "backend": self.backend,
            "served_by": self.model.served_by([NO_FUNNEL], self.backend),
            "repeats": self.repeats,
        }

    def cells(self, results: Results) -> Iterator[Measurement]:
        return self.measured(self)

    @classmethod
    def section(cls, content: Row) -> Section:
        options, rows = content["options"], content["rows"]
        title, reading, columns = SECTIONS[options["measured"]]
        profiled = [row for row in rows if "most_expensive" in row]
        return Section(
            title=title,
            summary="",
            plots=[],
            tables=[
                Table("", columns, rows),
                *(Table(row["cell"], KERNEL_COLUMNS, row["most_expensive"]) for row in profiled),
            ],
            reading=(reading,),
            facts={"Model": describe_model(options["model"]), "Backend": describe_backend(options)},
        )

    def embedding(self, lengths: Ints) -> Call:
        engine = self.model.engine(NO_FUNNEL, self.backend, int(self.batch.sum()))
        return partial(engine.embed, random_inputs(self.model.config.vocab_size, lengths))


# ----------------------------------------------------------------------------------------------------- profiles


def profiles(suite: Suite) -> Iterator[Measurement]:
    one = np.array([suite.one], np.int32)
    yield f"one sequence of {suite.one} tokens", partial(wall_time, suite, one)
    yield f"device busy, one sequence of {suite.one} tokens", partial(busy_share, suite, one, PROFILES)
    yield f"where the time goes, {len(suite.batch)} x {suite.batch[0]} tokens", partial(where_time_goes, suite)


def wall_time(suite: Suite, lengths: Ints) -> Row:
    """Every call is a sample: a caller waits for each."""
    return {"seconds": spread(alone(sampler(suite.embedding(lengths), 0.0), 10 * suite.repeats))}


def busy_share(suite: Suite, lengths: Ints, times: int) -> Row:
    return busy(suite.embedding(lengths), times)[0]


def where_time_goes(suite: Suite) -> Row:
    row, ran = busy(suite.embedding(suite.batch), 1)
    return row | {"most_expensive": [total._asdict() for total in most_expensive(ran, SHOWN)]}


def busy(call: Call, times: int) -> tuple[Row, list["Kernel"]]:
    """The share of a call's time in which a kernel runs, and the kernels of one call.

    Raises:
        LeftOut: the profiler knows no device.
    """
    call()
    ran = [profile(call) for _ in range(times)]
    if not all(ran):
        raise LeftOut("the profile has no plane of a device: JAX does not tell here when the device works")
    samples = alone(sampler(call, 0.0), times)
    milliseconds = float(np.median([busy_nanoseconds(each) for each in ran])) / 1e6
    row = {
        "seconds": spread(samples),
        "busy_share": milliseconds / 1e3 / quartiles(samples).median,
        "busy_milliseconds": milliseconds,
        "kernels": len(ran[0]),
    }
    return row, ran[0]


# A GPU's lines are streams. A TPU's operations stand on one line; its others repeat them by step and by program.
KERNEL_LINES = re.compile(r"Stream #|XLA Ops$")
HOST_TRANSFERS = re.compile(r"Memcpy ?(H2D|D2H|HtoD|DtoH)", re.IGNORECASE)


class Kernel(NamedTuple):
    """One run of a kernel, or of a copy within the device."""

    name: str
    start: float  # nanoseconds
    end: float


class Total(NamedTuple):
    """All runs of the kernels of one name."""

    name: str
    runs: int
    milliseconds: float
    share: float  # of the time of all kernels


def profile(call: Call) -> list[Kernel]:
    """Runs `call` once and returns what the devices did, in no order; empty where a profile does not tell."""
    options = ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0  # tracing the host would slow its launches
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        return kernels(ProfileData.from_file(str(file)))


def kernels(data: ProfileData) -> list[Kernel]:
    """Everything that ran on a device. Transfers from and to the host are not work of the device."""
    return [
        Kernel(event.name, event.start_ns, event.start_ns + event.duration_ns)
        for plane in data.planes
        if plane.name.startswith("/device:")
        for line in plane.lines
        if KERNEL_LINES.match(line.name)
        for event in line.events
        if not HOST_TRANSFERS.match(event.name)
    ]


def busy_nanoseconds(ran: Iterable[Kernel]) -> float:
    """How long at least one kernel ran: the length of the union of their intervals."""
    busy, until = 0.0, float("-inf")
    for kernel in sorted(ran, key=lambda kernel: kernel.start):
        busy += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return busy


def most_expensive(ran: Sequence[Kernel], count: int) -> list[Total]:
    """The kernels that took most time, by name without the number that XLA gives each copy of a kernel."""
    runs: dict[str, list[float]] = defaultdict(list)
    for kernel in ran:
        runs[re.sub(r"([._]\d+)+$", "", kernel.name)].append(kernel.end - kernel.start)
    everything = sum(map(sum, runs.values()))
    totals = [Total(name, len(times), sum(times) / 1e6, sum(times) / everything) for name, times in runs.items()]
    return sorted(totals, key=lambda total: -total.milliseconds)[:count]


# ------------------------------------------------------------------------------------------------------ options


def xla_options(suite: Suite) -> Iterator[Measurement]:
    """The forward pass compiled with each set of options; what the process has from XLA_FLAGS holds for all."""
    own = compiler_options("gpu")
    for candidate in [own, *(other for other in CANDIDATES if other != own)]:
        text = ", ".join(f"{name}={value}" for name, value in candidate.items()) or "none"
        name = f"the engine's own: {text}" if candidate is own else text
        yield name, partial(with_options, suite, candidate)


def with_options(suite: Suite, candidate: Options) -> Row:
    """In turns with the forward pass that is compiled without any."""
    platform = jax.devices()[0].platform
    if platform != "gpu":
        raise LeftOut(f"not a GPU: JAX runs on {platform}")
    rows = int(suite.batch.sum())
    engine = suite.model.engine(NO_FUNNEL, suite.backend, rows)
    without, call = (sampler(forward_pass(engine, suite.batch, rows, each), 0.0) for each in ({}, candidate))
    baseline, samples = in_turns(without, call, suite.repeats)
    return {
        "seconds": spread(samples),
        "baseline_seconds": spread(baseline),
        "ratio": ratio(quartiles(samples), quartiles(baseline))._asdict(),
    }


WHAT, TIME = Column("what", lambda row: row["cell"]), Column("time", field("seconds", ",.3f", 1e3), "ms", "quartiles")
SECTIONS = {
    "profiles": (
        "One short sequence, and where the time goes",
        "Busy: the share of a call's time, from ids on the host to vectors on the host, in which a kernel runs. The "
        "kernels' times are from a profile, in which XLA replays no CUDA graphs; the call's time is without one.",
        (WHAT, TIME, Column("busy", field("busy_share", ".3f")), Column("kernels", field("kernels", ",d"))),
    ),
    "xla_options": (
        "Compiler options",
        "The forward pass alone, against no options at all; a ratio below 1 means that the options help.",
        (
            WHAT,
            TIME,
            Column("without", field("baseline_seconds", ",.3f", 1e3), "ms", "quartiles"),
            Column("ratio", field("ratio", ".3f"), note="range"),
        ),
    ),
}
KERNEL_COLUMNS = (
    Column("kernel", lambda total: total["name"]),
    Column("runs", field("runs", ",d")),
    Column("time", field("milliseconds", ",.3f"), "ms"),
    Column("share", field("share", ".1f", 100), "%", "of all kernels"),
)
