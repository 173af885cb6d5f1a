"""One short sequence: how long it takes, and whether the device ever waits. And where the time of a full batch goes.

While JAX's profiler runs, XLA replays no CUDA graphs, so the gaps between the kernels of a profile are not those of a
call. Kernels are taken from profiles, and the time of a call from calls without one.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from funnel_benchmarks.device import plots
from funnel_benchmarks.device.bench import Bench
from funnel_benchmarks.device.device_profile import (
    Kernel,
    busy_nanoseconds,
    most_expensive,
    profile,
)
from funnel_benchmarks.device.part import CELL, MILLISECONDS, Part, against_goal
from funnel_benchmarks.measure import alone, sampler, spread
from funnel_benchmarks.results import LeftOut, Measurement, Row
from funnel_benchmarks.statistics import quartiles
from funnel_benchmarks.suite import Column, Plot, Table, field

GOAL = 0.9  # of the time of a call
SHOWN = 10  # kernels
PROFILES = 5


def cells(bench: Bench) -> Iterator[Measurement]:
    one, (sequences, tokens) = bench.sizes.one, bench.sizes.batches[0]
    yield f"one sequence of {one} tokens", partial(wall_time, bench)
    yield f"device busy, one sequence of {one} tokens", partial(busy_share, bench)
    yield f"where the time goes, {sequences} x {tokens} tokens", partial(where_time_goes, bench)


def one_sequence(bench: Bench) -> Callable[[], Any]:
    return bench.embedding(np.array([bench.sizes.one], np.int32))


def wall_time(bench: Bench) -> Row:
    """Every call is a sample: a caller waits for each."""
    return {"seconds": spread(alone(sampler(one_sequence(bench), 0.0), 10 * bench.sizes.repeats))}


def busy_share(bench: Bench) -> Row:
    return busy(one_sequence(bench), PROFILES)[0] | {"goal": GOAL}


def where_time_goes(bench: Bench) -> Row:
    row, ran = busy(bench.embedding(bench.equal_lengths), 1)
    return row | {"most_expensive": [total._asdict() for total in most_expensive(ran, SHOWN)]}


def busy(call: Callable[[], Any], times: int) -> tuple[Row, list[Kernel]]:
    """The share of a call's time in which a kernel runs, and the kernels of one call."""
    call()
    profiles = [profiled(call) for _ in range(times)]
    samples = alone(sampler(call, 0.0), times)
    milliseconds = float(np.median([busy_nanoseconds(ran) for ran in profiles])) / 1e6
    row = {
        "seconds": spread(samples),
        "busy_share": milliseconds / 1e3 / quartiles(samples).median,
        "busy_milliseconds": milliseconds,
        "kernels": len(profiles[0]),
    }
    return row, profiles[0]


def profiled(call: Callable[[], Any]) -> list[Kernel]:
    ran = profile(call)
    if not ran:
        raise LeftOut("the profile has no plane of a device: JAX does not tell here when the device works")
    return ran


class Latency(Part):
    name = "device latency"
    title = "One short sequence, and where the time goes"
    note = (
        "Busy: the share of a call's time, from ids on the host to vectors on the host, in which a kernel runs. The "
        "kernels' times are from a profile, in which XLA replays no CUDA graphs; the call's time is without one."
    )
    columns = (
        CELL,
        MILLISECONDS,
        Column("busy", against_goal("busy_share")),
        Column("kernels", field("kernels", ",d")),
    )
    measurements = staticmethod(cells)

    @classmethod
    def tables(cls, rows: list[Row]) -> list[Table]:
        columns = (
            Column("kernel", lambda total: total["name"]),
            Column("runs", field("runs", ",d")),
            Column("time", field("milliseconds", ",.3f"), "ms"),
            Column("share", field("share", ".1f", 100), "%", "of all kernels"),
        )
        profiled = [row for row in rows if "most_expensive" in row]
        return super().tables(rows) + [Table(row["cell"], columns, row["most_expensive"]) for row in profiled]

    @classmethod
    def plots(cls, content: Row) -> list[Plot]:
        caption = "The most expensive kernels of a full batch"
        drawn = Plot(partial(plots.kernels, content), f"{caption}; the table has the same figures.", caption)
        return [drawn] if any("most_expensive" in row for row in content["rows"]) else []
