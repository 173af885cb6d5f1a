"""The latency suite: every funnel on every batch, against the same engine without a funnel.

Both run in one process on the same random token ids and the same weights on the device, in the order A B B A, after
their programs are compiled. What is timed is `Engine.embed`, from token ids on the host to vectors on the host, so
packing and transfers count and tokenising does not.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from funnel_benchmarks.charts import Chart, Panel, Series, times
from funnel_benchmarks.describe import describe_backend, describe_machine, describe_model
from funnel_benchmarks.funnels import NO_FUNNEL, check_funnel, funnel_facts, funnel_name
from funnel_benchmarks.inputs import SEED, random_inputs
from funnel_benchmarks.lengths import length_facts
from funnel_benchmarks.machine import peak_memory_gb
from funnel_benchmarks.measure import Sample, in_turns, sampler, spread
from funnel_benchmarks.models import Model
from funnel_benchmarks.results import Measurement, Results, Row
from funnel_benchmarks.statistics import quartiles, ratio
from funnel_benchmarks.suite import Cell, Column, Section, Table, field
from funnel_benchmarks.suite import Suite as BaseSuite
from funnel_engine import Engine, FunnelConfig
from funnel_engine.checks import check_positive
from funnel_engine.flops import forward_flops, ideal_ratio
from funnel_engine.packing import Ints, make_plan
from funnel_kernels.errors import InputError
from funnel_kernels.target import check_backend

PAPER = "arXiv:2504.02877 (Gemma 2B on a TPU)"
PAPER_LAYERS = 18
# Full-length layers before a 2:1 max funnel -> the saving, as the paper puts it: "over 40 %" early in the stack, 44 %
# in Figure 4, and "around 5 %" at the end.
PAPER_SAVINGS = {2: "44 %", 16: "about 5 %"}


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Sequences that run as one packed call.

    Attributes:
        lengths: tokens of each sequence, [B].
        source: where the lengths are from, in words.
    """

    lengths: Ints
    source: str = "all equal"

    @property
    def name(self) -> str:
        sequences, shortest, longest = len(self.lengths), self.lengths.min(), self.lengths.max()
        if shortest == longest:
            return f"{sequences} x {longest} tokens"
        return f"{sequences} sequences of {shortest} to {longest} tokens, {self.lengths.sum():,} in all: {self.source}"

    def facts(self) -> Row:
        return {"name": self.name, "source": self.source, "sequences": len(self.lengths), **length_facts(self.lengths)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite(BaseSuite):
    """What is measured: a cell for every funnel on every batch.

    Attributes:
        repeats: how often A B B A is run for each cell.

    Raises:
        ConfigError: a funnel that pools nothing, or that the model cannot have.
        InputError: a sequence that is longer than the model was made for.
    """

    model: Model
    funnels: tuple[FunnelConfig, ...]
    batches: tuple[Batch, ...]
    backend: str
    repeats: int

    name = "latency"

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_positive("repeats", self.repeats)
        longest = max(batch.lengths.max() for batch in self.batches)
        if longest > self.model.config.max_positions:
            raise InputError(
                f"the longest sequence has {longest} tokens, more than the {self.model.config.max_positions} that "
                f"{self.model.name} was made for; take shorter sequences"
            )
        for funnel in self.funnels:
            check_funnel(self.model.config, funnel)

    def rows(self, funnel: FunnelConfig, batch: Batch) -> int:
        """Rows of the packed axis that a batch takes."""
        return int(make_plan(self.model.config, funnel).rows_needed(batch.lengths).sum())

    def options(self) -> Row:
        """Everything that a cell depends on beside its own funnel, as the head of a result file."""
        return {
            "model": self.model.facts(),
            "batches": [batch.facts() for batch in self.batches],
            "backend": self.backend,
            "served_by": self.model.served_by(self.funnels, self.backend),
            "repeats": self.repeats,
            "order": "A B B A",
            "seed": SEED,
        }

    @property
    def steps(self) -> int:
        return 1 + self.repeats

    def cells(self, results: Results) -> Iterator[Measurement]:
        """The cells of the suite. A row has, beside what `Results` puts there:

        funnel              its `name`, and all its options
        batch               its `name`, `sequences`, `tokens`, lengths and their source
        seconds             latency with the funnel, with samples; `baseline_seconds` without
        ratio               {low, median, high}; low and high are the least and greatest that the quartiles allow
        saving_percent      100 * (1 - ratio)
        ideal_ratio         of the floating-point operations; `efficiency` is ideal_ratio / ratio
        tokens_per_second   with the funnel, as `flops_per_second`; `baseline_flops` is the work without
        padding_waste       share of the packed rows that hold no token; `baseline_padding_waste` without
        compile_seconds     beforehand; `baseline_compile_seconds` without the funnel, once for each batch
        peak_memory_gb      of process and device, since the process began
        """
        for batch in self.batches:
            calls = Calls(self, batch)
            for funnel in self.funnels:
                yield f"{funnel_name(funnel)}; {batch.name}", partial(measure, calls, funnel, lambda: results.advance())

    @classmethod
    def section(cls, content: Row) -> Section:
        """Saving against ideal and paper, the efficiency of every row, and all figures."""
        rows, batches = content["rows"], content["options"]["batches"]
        lengths = batches[0]["name"] if len(batches) == 1 else f"{len(batches)} batches"
        return Section(
            title=f"Latency with a funnel, and without: {content['options']['model']['name']}, {lengths}",
            facts=facts(content),
            tables=[Table("", COLUMNS, rows)],
            plots=[paper_chart(content), efficiency_chart(content)] if rows else [],
            summary=summary(content),
            reading=READING,
        )


def measure(calls: "Calls", funnel: FunnelConfig, advance: Callable[[], object]) -> Row:
    """Measures one cell.

    Raises:
        FunnelError: something was compiled while timing, so that the samples are not latencies.
    """
    suite, lengths = calls.suite, calls.batch.lengths
    baseline, time_baseline = calls.baseline
    engine, time_funnel = calls.prepare(funnel)
    advance()
    baseline_samples, samples = in_turns(time_baseline, time_funnel, suite.repeats, advance)
    latency, measured = quartiles(samples), ratio(quartiles(samples), quartiles(baseline_samples))
    ideal = ideal_ratio(suite.model.config, funnel, lengths)
    return {
        "funnel": funnel_facts(funnel),
        "batch": calls.batch.facts(),
        "seconds": spread(samples),
        "baseline_seconds": spread(baseline_samples),
        "ratio": measured._asdict(),
        "saving_percent": 100 * (1 - measured.median),
        "ideal_ratio": ideal,
        "efficiency": ideal / measured.median,
        "tokens_per_second": int(lengths.sum()) / latency.median,
        "flops_per_second": forward_flops(suite.model.config, funnel, lengths) / latency.median,
        "baseline_flops": forward_flops(suite.model.config, NO_FUNNEL, lengths),
        **engine_facts(engine, ""),
        **engine_facts(baseline, "baseline_"),
        "peak_memory_gb": peak_memory_gb(),
    }


class Calls:
    """What the cells of one batch share: token ids, and the engine without a funnel."""

    def __init__(self, suite: Suite, batch: Batch):
        self.suite, self.batch = suite, batch

    @functools.cached_property
    def inputs(self) -> tuple[Ints, Ints]:
        return random_inputs(self.suite.model.config.vocab_size, self.batch.lengths)

    @functools.cached_property
    def baseline(self) -> tuple[Engine, Sample]:
        return self.prepare(NO_FUNNEL)

    def prepare(self, funnel: FunnelConfig) -> tuple[Engine, Sample]:
        """An engine whose one bucket is compiled, and what times a call."""
        suite = self.suite
        engine = suite.model.engine(funnel, suite.backend, suite.rows(funnel, self.batch))
        return engine, sampler(partial(engine.embed, self.inputs), 0.0)


def engine_facts(engine: Engine, prefix: str) -> dict[str, float]:
    """How much of an engine's rows is padding, and how long its programs took to compile."""
    stats = engine.stats()
    waste = stats["padding_rows"] / (stats["padding_rows"] + stats["tokens"])
    return {f"{prefix}padding_waste": waste, f"{prefix}compile_seconds": stats["compile_seconds"]}


READING = (
    "2:1 after L means: L full-length layers, then each pair of neighbouring token vectors is pooled into one, and "
    "all later layers work on the shorter sequence. The earlier the funnel, the more work it saves.",
    "Ratio is the median latency with the funnel over the median latency of the same engine without it; 0.6 means "
    "that 40 % of the time is saved. Both ran in turns on the same inputs, so each row has a baseline of its own. "
    "Whiskers and ranges are quartiles; those of the ratio are the least and greatest that both latencies' quartiles "
    "allow.",
    "Ideal is the ratio of the floating-point operations: what the ratio would be if pooling, bookkeeping and memory "
    "traffic were free and smaller matrix products ran at the same rate. Efficiency is ideal over measured; 1 means "
    "that the funnel saves all that it can, and more than 1 that the rest runs better on fewer rows, or noise.",
    "Latency is from token ids on the host to vectors on the host. Turning text into tokens is not in it, nor is "
    "compiling, which is done once beforehand.",
    "The funnel of a Funnel-Transformer is between its blocks. Without it the same layers run as one block, at full "
    "length and without the decoder, with the same kernels.",
)
MARKS = (("o", False), ("D", True), ("s", False), ("^", True), ("v", False), ("P", True))  # of batches
BOUNDS = {"low": "high", "median": "median", "high": "low"}  # of a ratio and of its inverse
COLUMNS = (
    Column("funnel", lambda row: Cell(row["funnel"]["name"], row["batch"]["name"]), note="and batch"),
    Column("ratio", field("ratio", ".3f"), note="range"),
    Column("ideal", field("ideal_ratio", ".3f"), note="ratio"),
    Column("efficiency", field("efficiency", ".3f"), note="ideal / ratio"),
    Column("saving", field("saving_percent", ".1f"), "%"),
    Column("latency", field("seconds", ",.1f", 1e3), "ms", "quartiles"),
    Column("baseline", field("baseline_seconds", ",.1f", 1e3), "ms", "quartiles"),
    Column("tokens/s", field("tokens_per_second", ",.0f")),
    Column("GFLOP/s", field("flops_per_second", ",.1f", 1e-9)),
    Column("padding", field("padding_waste", ".1f", 100), "%"),
    Column("compiling", field("compile_seconds", ".1f"), "s"),
)


def summary(content: Row) -> str:
    rows = content["rows"]
    if not rows:
        return "Nothing was measured."
    best = max(rows, key=lambda row: row["saving_percent"])
    efficiencies = [row["efficiency"] for row in rows]
    known = beside_paper(content)
    sentences = (
        *([f"Saved, beside {PAPER}: {'. '.join(known)}"] if known else []),
        f"{best['funnel']['name']} saves {best['saving_percent']:.1f} % of the latency ({best['batch']['name']}), "
        f"where {100 * (1 - best['ideal_ratio']):.1f} % would be ideal",
        f"Efficiency over all {len(rows)} rows: median {np.median(efficiencies):.2f}, from {min(efficiencies):.2f} to "
        f"{max(efficiencies):.2f}",
    )
    return "".join(f"{sentence}. " for sentence in sentences).rstrip()


def beside_paper(content: Row) -> list[str]:
    """A line for each batch; none if a result has no such model or none of the paper's places."""
    if content["options"]["model"]["layers"] != PAPER_LAYERS:
        return []
    ours: dict[str, list[str]] = {}
    for row in content["rows"]:
        funnel = FunnelConfig(**{name: value for name, value in row["funnel"].items() if name != "name"})
        layer = len(funnel.strides) - 1
        if layer in PAPER_SAVINGS and funnel == FunnelConfig.after(layer):
            saved = f"{row['saving_percent']:.1f} % after layer {layer} (paper: {PAPER_SAVINGS[layer]})"
            ours.setdefault(row["batch"]["name"], []).append(saved)
    return [f"{', '.join(saved)}; {batch}" for batch, saved in ours.items()]


def series(rows: list[Row]) -> list[Row]:
    """The rows that differ from the first only in the place of their one funnel, in rising order.

    A sweep has many more kinds of rows than a picture shows; its first kind is the paper's.
    """

    def kind(row: Row) -> tuple[object, ...]:
        funnel = {name: value for name, value in row["funnel"].items() if name not in ("name", "strides")}
        return row["batch"]["name"], [stride for stride in row["funnel"]["strides"] if stride > 1], funnel

    return sorted((row for row in rows if kind(row) == kind(rows[0])), key=layers_before)


def layers_before(row: Row) -> int:
    """Full-length layers before the first funnel."""
    return next(layer for layer, stride in enumerate(row["funnel"]["strides"]) if stride > 1)


def paper_chart(content: Row) -> Chart:
    """Latency ratio, and the saving in per cent, over the place of the funnel; cf. Figure 4 of arXiv:2504.02877."""
    rows, model = series(content["rows"]), content["options"]["model"]
    funnel, layers = rows[0]["funnel"], [layers_before(row) for row in rows]
    queries = ", queries only" if funnel["pool_query_only"] else ""
    kind = f"{rows[0]['batch']['name']}; {funnel['pool']} pooling{queries}, recovery {funnel['recovery'] or 'none'}"
    ideals = [row["ideal_ratio"] for row in rows]
    ideal = partial(Series, "ideal (FLOPs)", layers, colour="ideal", marker="D", line="--")
    measured = partial(Series, "measured (quartiles)", layers, line="-")
    place = f"full-length layers before the {funnel['strides'][layers[0]]}:1 funnel (of {model['layers']})"
    ratios = [measured([row["ratio"] for row in rows]), ideal(ideals)]
    savings = [measured([row["saving_percent"] for row in rows]), ideal([100 * (1 - each) for each in ideals])]
    return Chart(
        f"Latency ratio and saving over the place of the funnel ({kind}); the table has the same figures.",
        f"Latency and saving over the place of the funnel: {kind}",
        panels=[
            Panel(ratios, value_label="latency with funnel / without", references={"no funnel": 1.0}, ticks=layers),
            Panel(savings, place, "latency saved (%)", ticks=layers),
        ],
        facts=(describe_model(model), kind, describe_machine(content["machine"])),
    )


def efficiency_chart(content: Row) -> Chart:
    """A row for each funnel, with a mark for each batch at its efficiency; whiskers from the range of the ratio."""
    rows = content["rows"]
    funnels, batches = (list(dict.fromkeys(row[name]["name"] for row in rows)) for name in ("funnel", "batch"))
    drawn = []
    for batch, (marker, hollow) in zip(batches, itertools.cycle(MARKS)):
        chosen = [row for row in rows if row["batch"]["name"] == batch]
        places = [funnels.index(row["funnel"]["name"]) for row in chosen]
        inverse = [{bound: 1 / row["ratio"][other] for bound, other in BOUNDS.items()} for row in chosen]
        values = [times(row["ideal_ratio"], each) for row, each in zip(chosen, inverse, strict=True)]
        drawn.append(Series(batch, places, values, marker=marker, hollow=hollow))
    return Chart(
        "Efficiency of every funnel on every batch; the table has the same figures.",
        "Efficiency of all that was measured: ideal ratio / measured ratio",
        panels=[Panel(drawn, value_label="efficiency", rows=funnels, references={"ideal (FLOPs)": 1.0})],
    )


def facts(content: Row) -> dict[str, str]:
    """How it was measured."""
    options, rows = content["options"], content["rows"]
    model = options["model"]
    named = {
        "Model": describe_model(model),
        "Shape": f"{model['family']}, MLP {model['intermediate_size']:,}, {model['heads']} heads of "
        f"{model['head_dim']}, {model['kv_heads']} key/value heads",
        "Weights": model["weights"],
        "Batches": "; ".join(f"{batch['name']}, median {batch['median']:g}" for batch in options["batches"]),
        "Method": f"{options['repeats']} times {options['order']} per row, medians of {2 * options['repeats']} runs; "
        f"random token ids, seed {options['seed']}",
        "Compilations while timing": "0",
        "Backend": describe_backend(options),
    }
    if rows:
        waste = max(row["baseline_padding_waste"] for row in rows)
        named |= {
            "Padding without a funnel": f"at most {100 * waste:.1f} % of rows",
            "Compiling beforehand": f"{compile_seconds(rows):.1f} s in all",
            "Peak memory": describe_peak(rows),
        }
    return named


def compile_seconds(rows: list[Row]) -> float:
    """Of all programs; those without a funnel were compiled once for each batch."""
    baselines = {row["batch"]["name"]: row["baseline_compile_seconds"] for row in rows}
    return sum(baselines.values()) + sum(row["compile_seconds"] for row in rows)


def describe_peak(rows: list[Row]) -> str:
    """The most memory that was in use while any row was measured."""
    owners = {owner: max(row["peak_memory_gb"].get(owner, 0) for row in rows) for owner in rows[-1]["peak_memory_gb"]}
    return ", ".join(f"{owner} {peak:.2f} GB" for owner, peak in owners.items())
