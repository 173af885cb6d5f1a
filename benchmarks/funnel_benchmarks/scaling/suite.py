"""The scaling suite: one engine with a funnel and one without, at growing sizes.

Both run in one process on the same random token ids and weights, in the order A B B A, after their programs are
compiled; what is timed is `Engine.embed`, as in the latency suite. Limits on positions are raised where a sequence is
longer than the model was made for: latency does not depend on them.
"""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax

from funnel_benchmarks.charts import Chart, Panel, Series, times
from funnel_benchmarks.describe import describe_backend, describe_machine, describe_model
from funnel_benchmarks.funnels import NO_FUNNEL, check_funnel, funnel_facts, funnel_name
from funnel_benchmarks.inputs import SEED, random_inputs
from funnel_benchmarks.machine import usable_cores
from funnel_benchmarks.measure import Sample, in_turns, sampler, spread
from funnel_benchmarks.memory import activation_bytes, available_bytes
from funnel_benchmarks.models import Model
from funnel_benchmarks.results import LeftOut, Measurement, Results, Row
from funnel_benchmarks.scaling.axes import AXES, Point, points
from funnel_benchmarks.scaling.peak_memory import watched_memory
from funnel_benchmarks.scaling.slopes import ENGINES, Growth, Slope, growths
from funnel_benchmarks.suite import Cell, Column, Section, Table, field, number
from funnel_benchmarks.suite import Suite as BaseSuite
from funnel_engine import Engine, FunnelConfig
from funnel_engine.checks import check_positive
from funnel_engine.flops import forward_flops
from funnel_engine.funnel_transformer_config import require_model_config
from funnel_engine.packing import make_plan
from funnel_engine.weights import expected_shapes
from funnel_kernels.target import check_backend


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite(BaseSuite):
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

    name = "scaling"

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_positive("repeats", self.repeats)
        check_funnel(self.model.config, FunnelConfig.after(self.layer))

    def points(self) -> list[Point]:
        """All points of all axes, in the order of measuring."""
        sizes = {"layers": self.model.config.num_layers, "most_tokens": self.most_tokens, "cores": usable_cores()}
        return [point for axis in AXES if axis in self.axes for point in points(axis, **sizes)]

    def funnel(self, layers: int) -> FunnelConfig:
        """The funnel of a model of `layers` layers; every place has at least one layer after it."""
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

    @property
    def steps(self) -> int:
        return 1 + self.repeats

    def cells(self, results: Results) -> Iterator[Measurement]:
        """The cells of the suite. A row has, beside what `Results` puts there:

        axis, x             what grows, and how large it is here; see `axes.AXES`
        sequences, tokens   in the batch, and of each
        layers              of the model
        funnel              its name
        calls               that are timed together: 2 on axis "engines", else 1
        seconds             of these calls with the funnel, with samples; `baseline_seconds` without
        flops               of these calls with the funnel; `baseline_flops` without
        peak_memory_bytes   while both were timed, by owner; see `peak_memory.watched_memory`
        """
        for point in self.points():
            yield point.name, partial(measure, self, point, lambda: results.advance())

    @classmethod
    def section(cls, content: Row) -> Section:
        """How each cost grows beside its work, and all figures."""
        rows, grown = content["rows"], list(growths(content["rows"]))
        return Section(
            title=f"How latency grows: {content['options']['model']['name']}",
            facts=facts(content["options"]),
            tables=[Table("Exponents", SLOPES, grown), Table("All figures", COLUMNS, rows)],
            plots=[chart(content)] if rows else [],
            summary=summary(rows, grown),
            reading=READING,
        )


def measure(suite: Suite, point: Point, advance: Callable[[], object]) -> Row:
    """Measures one cell.

    Raises:
        LeftOut: it cannot be measured here.
        FunnelError: something was compiled while timing.
    """
    check_possible(suite, point)
    funnel = suite.funnel(point.layers)
    without, funneled = (prepare(suite, point, each) for each in (NO_FUNNEL, funnel))
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
    config = require_model_config(model.config, "`bench scaling`")
    longest = max(config.max_positions, point.tokens)
    return dataclasses.replace(
        model, config=dataclasses.replace(config, layer_types=config.layer_types[: point.layers], max_positions=longest)
    )


def prepare(suite: Suite, point: Point, funnel: FunnelConfig) -> Sample:
    """Engines whose one bucket is compiled, and the function that times their calls once."""
    model, lengths, weights = model_at(suite.model, point), point.lengths, suite.model.loaded(suite.backend)
    engines = [
        Engine(
            model.config,
            model.head,
            {name: weights[name] for name in expected_shapes(model.config, model.head)},
            funnel=funnel,
            backend=suite.backend,
            threads=point.threads,
            max_batch_tokens=int(make_plan(model.config, funnel).rows_needed(lengths).sum()),
        )
        for _ in range(point.engines)
    ]
    inputs = random_inputs(model.config.vocab_size, lengths)

    def run(engine: Engine) -> None:
        """An engine's share of the calls."""
        for _ in range(point.calls // point.engines):
            engine.embed(inputs)

    def call() -> None:
        if len(engines) == 1:
            run(engines[0])
        else:
            with ThreadPoolExecutor(len(engines)) as pool:
                list(pool.map(run, engines))

    return sampler(call, 0.0)


MANY = 7  # sizes: every other one has its number
FLAG = "the cost grows faster than its work"
READING = (
    "One size grows at a time: tokens of one sequence; sequences in the batch; layers, with the funnel in proportion; "
    "sequences among the same number of tokens. Both engines ran in turns. A broken line is the work, the "
    "floating-point operations, scaled to pass through the last measured point: points above it further to the left "
    "are time that is not spent on the work, such as the cost of a call.",
    "An exponent p says that a quantity grows as the p-th power of another; it is fitted by least squares on "
    "logarithms of medians, and its range is the 95 % confidence interval (Student's t). A cost that grows faster than "
    "its work is one whose exponent over the work has all of its interval above 1.",
    "Threads: the same batch with as many threads for an engine; the line is the work of each thread. Engines: two "
    "calls, by one engine one after the other, or by two at once from two threads.",
    "Memory is the most that was resident while both engines were timed, weights and programs included, and below it "
    "what was resident when timing began; on a device it is the most in use since the program began.",
)


def exponent(name: str) -> Callable[[Growth], Cell]:
    """The cell of a slope of a growth, with its interval."""

    def cell(growth: Growth) -> Cell:
        slope: Slope = getattr(growth, name)
        return Cell(f"{slope.exponent:.2f}", f"{slope.low:.2f} \u2013 {slope.high:.2f}", slope.exponent)

    return cell


def peak_bytes(row: Row) -> int | None:
    """Of the device if it keeps count, else of the process; None if neither is known."""
    peaks: dict[str, int] = row["peak_memory_bytes"]
    return peaks.get("device", peaks.get("process"))


def memory(row: Row) -> Cell | None:
    peak, before = peak_bytes(row), row["peak_memory_bytes"].get("before")
    if peak is None:
        return None
    return Cell(f"{peak / 1e9:.2f}", "" if before is None else f"{before / 1e9:.2f}", peak)


def size(row: Row) -> Cell:
    return Cell(f"{row['axis']} {row['x']}", f"{row['sequences']} x {row['tokens']} tokens, {row['layers']} layers")


def ratio(row: Row) -> Cell:
    return number(row["seconds"]["median"] / row["baseline_seconds"]["median"], ".3f")


SLOPES = (
    Column("axis", lambda growth: Cell(growth.axis, growth.engine), note="and engine"),
    Column("latency", exponent("seconds"), note="exponent of the size"),
    Column("work", exponent("work"), note="exponent of the size"),
    Column("latency over work", exponent("seconds_over_work"), note="exponent"),
    Column("verdict", lambda growth: FLAG if growth.flagged else ""),
)
COLUMNS = (
    Column("size", size, note="and batch"),
    Column("with funnel", field("seconds", ",.1f", 1e3), "ms", "quartiles"),
    Column("work", field("flops", ",.1f", 1e-9), "GFLOP"),
    Column("without", field("baseline_seconds", ",.1f", 1e3), "ms", "quartiles"),
    Column("work", field("baseline_flops", ",.1f", 1e-9), "GFLOP"),
    Column("ratio", ratio, note="with / without"),
    Column("memory", memory, "GB", "and before"),
)


def summary(rows: list[Row], grown: list[Growth]) -> str:
    if not rows:
        return "Nothing was measured."
    if not grown:
        return f"{len(rows)} sizes were measured, too few along one axis for an exponent."
    faster = [f"{growth.axis} ({growth.engine})" for growth in grown if growth.flagged]
    verdict = (
        f"A cost grows faster than its work along {', '.join(faster)}" if faster else f"Nowhere is it sure that {FLAG}"
    )
    slopes = "; ".join(
        f"{growth.axis}: latency grows with the power {growth.seconds.exponent:.2f} of the size, its work with "
        f"{growth.work.exponent:.2f}"
        for growth in grown
        if growth.engine == "with funnel"
    )
    return f"{verdict}. With the funnel, {slopes}."


def chart(content: Row) -> Chart:
    """A panel for each axis: latency, and the work of each engine as a line through the last median."""
    panels = []
    for axis, text in AXES.items():
        rows = sorted((row for row in content["rows"] if row["axis"] == axis), key=lambda row: row["x"])
        sizes, series = [row["x"] for row in rows], []
        for prefix, name in ENGINES.items() if rows else ():
            latency = [times(1e3, row[f"{prefix}seconds"]) for row in rows]
            scale = latency[-1]["median"] / work(rows[-1], prefix)
            colour, marker = ("ideal", "D") if prefix else ("measured", "o")
            works = [scale * work(row, prefix) for row in rows]
            series += [
                Series(name, sizes, latency, colour, marker),
                Series(f"{name}: its work", sizes, works, colour, "", "--"),
            ]
        if rows:
            ticks = sizes[:: -1 if len(sizes) < MANY else -2]
            panels.append(Panel(series, text, "latency (ms)", log=True, log_values=True, ticks=ticks))
    return Chart(
        "Latency over each size, a panel for each axis; the table has the same figures.",
        "Latency with quartiles over each size, and the work scaled to the last point",
        panels,
        facts=(describe_model(content["options"]["model"]), describe_machine(content["machine"])),
        columns=2,
    )


def work(row: Row, prefix: str) -> float:
    """FLOPs, and on the axis of threads those of each thread."""
    flops: int = row[f"{prefix}flops"]
    return flops / row["x"] if row["axis"] == "threads" else flops


def facts(options: Row) -> dict[str, str]:
    runs = f"medians of {2 * options['repeats']} runs; random token ids, seed {options['seed']}"
    return {
        "Model": describe_model(options["model"]),
        "Funnel": options["funnel"]["name"],
        "Axes": "; ".join(f"{axis}: {text}" for axis, text in AXES.items()),
        "Method": f"{options['repeats']} times {options['order']} per row, {runs}",
        "Compilations while timing": "0",
        "Backend": describe_backend(options),
    }
