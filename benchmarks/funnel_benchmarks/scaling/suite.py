"""The scaling suite: one engine with a funnel and one without, at growing sizes.

Both run in one process on the same random token ids and weights, in the order A B B A, after their programs are
compiled; what is timed is `Engine.embed`, as in the latency suite. Limits on positions are raised where a sequence is
longer than the model was made for: latency does not depend on them.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax

from funnel_benchmarks.funnels import NO_FUNNEL, check_funnel, funnel_facts, funnel_name
from funnel_benchmarks.inputs import SEED, random_inputs
from funnel_benchmarks.machine import usable_cores
from funnel_benchmarks.measure import Sample, in_turns, spread
from funnel_benchmarks.memory import activation_bytes, available_bytes
from funnel_benchmarks.models import Model
from funnel_benchmarks.results import Cell, LeftOut, Row
from funnel_benchmarks.scaling.axes import AXES, Point, points
from funnel_benchmarks.scaling.peak_memory import watched_memory
from funnel_engine import Engine, FunnelConfig
from funnel_engine.config import check_positive
from funnel_engine.flops import forward_flops
from funnel_engine.packing import make_plan
from funnel_engine.weights import expected_shapes
from funnel_kernels.target import check_backend


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """What is measured.

    Attributes:
        axes: names in `AXES`.
        layer: full-length layers before the 2:1 funnel; models of fewer layers have it in proportion.
        most_tokens: of the largest batch.
        repeats: how often A B B A is run for each cell.

    Raises:
        ConfigError: a funnel that the model cannot have, or a number below 1.
    """

    model: Model
    axes: tuple[str, ...]
    layer: int
    most_tokens: int
    backend: str
    repeats: int

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_positive("repeats", self.repeats)
        check_funnel(self.model.config, FunnelConfig.after(self.layer))

    def points(self) -> list[Point]:
        """All points of all axes, in the order of measuring."""
        sizes = {"layers": self.model.config.num_layers, "most_tokens": self.most_tokens, "cores": usable_cores()}
        return [point for axis in AXES if axis in self.axes for point in points(axis, **sizes)]

    def funnel(self, layers: int) -> FunnelConfig:
        """The funnel of a model of so many layers; every place has at least one layer after it."""
        place = round(self.layer * layers / self.model.config.num_layers)
        return FunnelConfig.after(min(place, layers - 1))

    def options(self) -> Row:
        """Everything that a cell depends on beside its own name, as the head of a result file."""
        funnel = FunnelConfig.after(self.layer)
        return {
            "model": self.model.facts(),
            "funnel": funnel_facts(funnel),
            "most_tokens": self.most_tokens,
            "backend": self.backend,
            "served_by": self.model.served_by([funnel], self.backend),
            "repeats": self.repeats,
            "order": "A B B A",
            "seed": SEED,
        }


def cells(suite: Suite, weights: Mapping[str, Any], *, advance: Callable[[], object] = lambda: None) -> Iterator[Cell]:
    """The cells of a suite. A row has, beside what `Results` puts there:

        axis, x             what grows, and how large it is here; see `axes.AXES`
        sequences, tokens   in the batch, and of each
        layers              of the model
        funnel              its name
        calls               that are timed together: 2 on axis "engines", else 1
        seconds             of these calls with the funnel, with samples; `baseline_seconds` without
        flops               of these calls with the funnel; `baseline_flops` without
        peak_memory_bytes   while both were timed, by owner; see `peak_memory.watched_memory`

    Args:
        weights: of the whole model, on the device already; all engines share them.
        advance: called `1 + suite.repeats` times in each cell: after the warm-up and after each A B B A.
    """
    for point in suite.points():
        yield point.name, partial(measure, suite, weights, point, advance)


def measure(suite: Suite, weights: Mapping[str, Any], point: Point, advance: Callable[[], object]) -> Row:
    """Measures one cell.

    Raises:
        LeftOut: it cannot be measured here.
        FunnelError: something was compiled while timing.
    """
    check_possible(suite, point)
    funnel = suite.funnel(point.layers)
    without, funneled = (prepare(suite, weights, point, each) for each in (NO_FUNNEL, funnel))
    advance()
    with watched_memory() as peaks:
        baseline_samples, samples = in_turns(without, funneled, suite.repeats, advance)
    config = model_at(suite.model, point).config
    return {
        "axis": point.axis,
        "x": point.x,
        "sequences": point.sequences,
        "tokens": point.tokens,
        "layers": point.layers,
        "funnel": funnel_name(funnel),
        "calls": point.calls,
        "seconds": spread(samples),
        "baseline_seconds": spread(baseline_samples),
        "flops": point.calls * forward_flops(config, funnel, point.lengths),
        "baseline_flops": point.calls * forward_flops(config, NO_FUNNEL, point.lengths),
        "peak_memory_bytes": peaks,
    }


def check_possible(suite: Suite, point: Point) -> None:
    """Raises `LeftOut` for what this device does not have, or has not enough of."""
    if point.threads is not None and jax.default_backend() != "cpu":
        raise LeftOut(f"threads are those of the kernels for CPUs, and this is a {jax.default_backend()}")
    rows = make_plan(suite.model.config, FunnelConfig.after(suite.layer)).rows_needed(point.lengths)
    needed = point.engines * activation_bytes(suite.model.config, int(rows.sum()))
    if needed > (available := available_bytes()):
        raise LeftOut(
            f"its activations need about {needed / 1e9:,.1f} GB beside the weights, but {available / 1e9:,.1f} GB are "
            "available"
        )


def model_at(model: Model, point: Point) -> Model:
    """The first layers of a model, for sequences of any length."""
    config = model.config
    longest = max(config.max_positions, point.tokens)
    return dataclasses.replace(
        model,
        config=dataclasses.replace(config, layer_types=config.layer_types[: point.layers], max_positions=longest),
    )


def prepare(suite: Suite, weights: Mapping[str, Any], point: Point, funnel: FunnelConfig) -> Sample:
    """Engines whose one bucket is compiled, and the function that times their calls once."""
    model, lengths = model_at(suite.model, point), point.lengths
    names = expected_shapes(model.config, model.head)
    engines = [
        Engine(
            model.config, model.head, {name: weights[name] for name in names},
            funnel=funnel, backend=suite.backend, threads=point.threads,
            max_batch_tokens=int(make_plan(model.config, funnel).rows_needed(lengths).sum()),
        )
        for _ in range(point.engines)
    ]  # fmt: skip
    inputs = random_inputs(model.config.vocab_size, lengths)

    def run(engine: Engine) -> None:
        """An engine's share of the calls."""
        for _ in range(point.calls // point.engines):
            engine.embed(inputs)

    def timed() -> float:
        start = time.perf_counter()
        if len(engines) == 1:
            run(engines[0])
        else:
            with ThreadPoolExecutor(len(engines)) as pool:
                for running in [pool.submit(run, engine) for engine in engines]:
                    running.result()
        return time.perf_counter() - start

    timed()  # compiles
    timed()  # touches all memory once more before it counts
    return timed
