"""What the device did while a call ran, from JAX's profiler.

A profile has one plane for each device; on its lines lie the kernels and transfers, one line for each stream of a GPU.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.profiler import ProfileData, ProfileOptions

from funnel_benchmarks.measure import Call

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
