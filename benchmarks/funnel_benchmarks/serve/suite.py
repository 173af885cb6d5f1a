"""The serving suite: how long requests take when they arrive by chance, with a funnel and without.

First the *offline rate* of both engines, with all requests there at once: as fast as each can be. Then requests arrive
as a Poisson process at shares of that rate, and each one's latency runs from its arrival to its vector. As in MLPerf's
Server scenario nothing is cached, no request is treated by its content, and none waits for one that is not there yet.
"""

import dataclasses
import functools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from funnel_benchmarks.charts import Chart, Panel, Series
from funnel_benchmarks.describe import describe_backend, describe_machine, describe_model
from funnel_benchmarks.funnels import NO_FUNNEL, check_funnel, funnel_facts, funnel_name
from funnel_benchmarks.measure import compiling_nothing, in_turns, spread
from funnel_benchmarks.models import Model
from funnel_benchmarks.results import LeftOut, Measurement, Results, Row
from funnel_benchmarks.serve.requests import (
    ARRIVALS_SEED,
    IDS_SEED,
    LENGTHS_SEED,
    Requests,
    check_requests,
    poisson_arrivals,
)
from funnel_benchmarks.serve.server import Served, serve
from funnel_benchmarks.statistics import quartiles
from funnel_benchmarks.suite import Cell, Column, Section, Table, field, number
from funnel_benchmarks.suite import Suite as BaseSuite
from funnel_engine import Engine, FunnelConfig
from funnel_engine.packing import make_plan
from funnel_kernels.target import check_backend

BASELINE = "no funnel"
SHARES = (50, 80, 95)  # per cent of an offline rate
NEAR = 0.02  # rates that differ by less are one


class Engines(NamedTuple):
    """The same model twice, warm."""

    baseline: Engine
    funneled: Engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite(BaseSuite):
    """What is measured.

    Attributes:
        sources: what lengths are drawn from, one kind of requests for each; see `lengths.draw`.
        count: requests of each kind.
        max_batch_tokens: what a batch holds: tokens, where a sequence takes whole windows of the funnel.

    Raises:
        ConfigError: a funnel that pools nothing or that the model cannot have, lengths that are named twice, a count
            or budget below 1.
        InputError: lengths that cannot be read, or a request that the model or a batch is too small for.
    """

    model: Model
    funnel: FunnelConfig
    sources: tuple[str, ...]
    count: int
    max_batch_tokens: int
    backend: str

    name = "serve"

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_funnel(self.model.config, self.funnel)
        check_requests(self.kinds, self.model.name, self.model.config, self.funnel, self.max_batch_tokens)

    @functools.cached_property
    def engines(self) -> Engines:
        return Engines(*(warm_engine(self, funnel) for funnel in (NO_FUNNEL, self.funnel)))

    @functools.cached_property
    def kinds(self) -> tuple[Requests, ...]:
        return tuple(Requests(source, self.count, self.model.config.vocab_size) for source in self.sources)

    def sizes(self, kind: Requests, funnel: FunnelConfig) -> np.ndarray:
        """What each request takes of a batch, [n]: its tokens, rounded up to whole windows of the funnel."""
        return make_plan(self.model.config, funnel).rows_needed(kind.lengths)

    def options(self) -> Row:
        """Everything that a cell depends on, as the head of a result file."""
        return {
            "model": self.model.facts(),
            "funnel": funnel_facts(self.funnel),
            "lengths": [kind.facts() for kind in self.kinds],
            "requests": self.count,
            "max_batch_tokens": self.max_batch_tokens,
            "backend": self.backend,
            "served_by": self.model.served_by([self.funnel], self.backend),
            "shares": SHARES,
            "seeds": {"lengths": LENGTHS_SEED, "ids": IDS_SEED, "arrivals": ARRIVALS_SEED},
        }

    def cells(self, results: Results) -> Iterator[Measurement]:
        """The cells of the suite. A row of an offline rate has, beside what `Results` puts there:

            lengths             of which requests
            seconds             for all of them with the funnel, with samples; `baseline_seconds` without
            requests_per_second with the funnel; `baseline_requests_per_second` without

        and one of requests that arrive by chance:

            lengths, engine     which requests, and whose latency: "no funnel", or the funnel's name
            share, share_of     the rate, in per cent of the offline rate of which engine
            arrivals_per_second the rate
            requests            how many
            latency             seconds from arrival to vector; the samples are sorted and rounded to microseconds
            p50, p90, p99       of those, interpolated
            mean_batch          `sequences` and `tokens`
            busy                share of the time in which the engine worked
            compilations        0, or else the cell fails
        """

        funneled = funnel_name(self.funnel)
        for kind in self.kinds:
            yield offline_name(kind.name), partial(offline, self, kind)
            for share, owner, engine in [
                *((share, BASELINE, engine) for share in SHARES for engine in (BASELINE, funneled)),
                *((share, funneled, funneled) for share in SHARES),
            ]:
                name = online_name(kind.name, engine, owner, share)
                yield name, partial(online, self, kind, engine, owner, share, results.rows)

    @classmethod
    def section(cls, content: Row) -> Section:
        """Latencies at a common rate, offline rates, and all figures."""
        options = content["options"]
        online, offline = (
            [row for row in content["rows"] if ("latency" in row) == with_it] for with_it in (True, False)
        )
        return Section(
            title=f"Requests that arrive by chance: {options['model']['name']}",
            facts=facts(options),
            tables=[Table("Offline rates", OFFLINE_COLUMNS, offline), online_table(online, options["requests"])],
            plots=[chart(content)] if online else [],
            summary=summary(offline, online),
            reading=READING,
        )


def warm_engine(suite: Suite, funnel: FunnelConfig) -> Engine:
    """An engine with all of its programs compiled, and the largest run once, which touches all memory."""
    engine = suite.model.engine(funnel, suite.backend, suite.max_batch_tokens)
    engine.warmup()
    kind = suite.kinds[0]
    fitting = np.cumsum(suite.sizes(kind, funnel)) <= suite.max_batch_tokens
    engine.embed(kind.take(0, int(fitting.sum())))
    return engine


def run(suite: Suite, engine: Engine, kind: Requests, arrivals: np.ndarray) -> Served:
    """Serves all requests of a kind with one engine."""

    def embed(first: int, stop: int) -> None:
        engine.embed(kind.take(first, stop))

    assert isinstance(engine.funnel, FunnelConfig)
    return serve(arrivals, suite.sizes(kind, engine.funnel), suite.max_batch_tokens, embed)


def offline(suite: Suite, kind: Requests) -> Row:
    """How fast both engines are when all requests are there from the beginning."""
    at_once = np.zeros(suite.count)

    def seconds(engine: Engine) -> float:
        return run(suite, engine, kind, at_once).seconds

    without, funneled = suite.engines
    baseline_samples, samples = in_turns(partial(seconds, without), partial(seconds, funneled), repeats=1)
    return {
        "lengths": kind.name,
        "seconds": spread(samples),
        "baseline_seconds": spread(baseline_samples),
        "requests_per_second": suite.count / quartiles(samples).median,
        "baseline_requests_per_second": suite.count / quartiles(baseline_samples).median,
    }


def online(suite: Suite, kind: Requests, engine: str, owner: str, share: int, rows: list[Row]) -> Row:
    """Latencies of one engine, at a share of an offline rate.

    Raises:
        LeftOut: the offline rate is not known, or the rate is one that the engine has been measured at.
        FunnelError: something was compiled meanwhile.
    """
    measured = [row for row in rows if row["cell"] == offline_name(kind.name)]
    if not measured:
        raise LeftOut(f"the offline rate of {owner} is not known, because {offline_name(kind.name)!r} has no row")
    baseline_rate, funneled_rate = offline_rates(measured[0])
    rate = share / 100 * (baseline_rate if owner == BASELINE else funneled_rate)
    if owner != BASELINE:
        for other in SHARES:
            if abs(other / 100 * baseline_rate / rate - 1) < NEAR:
                raise LeftOut(
                    f"{rate:.4g} requests a second are what {other} % of the rate of {BASELINE} are",
                    same_as=online_name(kind.name, engine, BASELINE, other),
                )
    chosen = suite.engines.baseline if engine == BASELINE else suite.engines.funneled
    with compiling_nothing():
        served = run(suite, chosen, kind, poisson_arrivals(rate, suite.count))
    latencies = np.sort(np.round(served.latencies, 6))
    p50, p90, p99 = np.quantile(latencies, (0.5, 0.9, 0.99)).tolist()
    batches = len(served.batches)
    return {
        "lengths": kind.name,
        "engine": engine,
        "share": share,
        "share_of": owner,
        "arrivals_per_second": rate,
        "requests": suite.count,
        "latency": spread(latencies.tolist()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "mean_batch": {"sequences": suite.count / batches, "tokens": int(kind.lengths.sum()) / batches},
        "busy": served.busy / served.seconds,
        "compilations": 0,
    }


def offline_name(kind: str) -> str:
    return f"{kind}: offline"


def offline_rates(offline_row: Row) -> tuple[float, float]:
    """Requests a second without a funnel and with it."""
    return offline_row["baseline_requests_per_second"], offline_row["requests_per_second"]


def online_name(kind: str, engine: str, owner: str, share: int) -> str:
    return f"{kind}: {engine} at {share} % of the rate of {owner}"


HEADLINE_SHARE = 80  # per cent of the rate without a funnel
READING = (
    "Each request is one sequence. Requests arrive as a Poisson process: at random times that were drawn beforehand "
    "and do not wait for the engine (an open loop). One loop serves them: it embeds what waits, in order of arrival, "
    "as much at once as a batch holds, and goes on with what has arrived by then. Latency is from a request's arrival "
    "to its vector, so waiting counts. Both engines see the same requests at the same times.",
    "The offline rate is that of all requests being there from the beginning, in full batches (two runs of each "
    "engine, in the order A B B A). Rates of arrival are shares of it; dotted lines in the picture stand at both. Near "
    "its offline rate an engine's queue grows long, and a small difference in speed becomes a large one in latency.",
    "A percentile of n latencies is only as good as n: above p99 of 1000 lie ten requests, which tend to have waited "
    "in the same queue. Mean batches say how much an engine found waiting each time; busy is the share of time that "
    "it worked.",
)


def row_times(row: Row) -> str:
    """The seconds that each row of requests will take: at the shares of the rate without a funnel, then with it."""
    count = row["baseline_seconds"]["median"] * row["baseline_requests_per_second"]
    rates = offline_rates(row)
    return "; ".join(", ".join(f"{100 * count / (share * rate):,.0f}" for share in SHARES) for rate in rates)


OFFLINE_COLUMNS = (
    Column("requests", lambda row: row["lengths"]),
    Column("with funnel", field("requests_per_second", ",.1f"), "requests/s"),
    Column("without", field("baseline_requests_per_second", ",.1f"), "requests/s"),
    Column("ratio", lambda row: number(offline_rates(row)[1] / offline_rates(row)[0], ".2f"), note="with / without"),
    Column("rows take", row_times, "s", f"at {', '.join(map(str, SHARES))} % without; with"),
)


def online_table(rows: list[Row], requests: int) -> Table:
    def share(row: Row) -> Cell:
        rate = row["arrivals_per_second"]
        return Cell(f"{rate:,.1f}", f"{row['share']} % of {row['share_of']}", rate)

    def quarter(row: Row) -> Cell:
        low, high = (1e3 * row["latency"][name] for name in ("low", "high"))
        return Cell(f"{low:,.1f} \u2013 {high:,.1f}", value=low)

    columns = (
        Column("engine", lambda row: Cell(row["engine"], row["lengths"]), note="and requests"),
        Column("arrivals/s", share, note="share of a rate"),
        Column("p50", field("p50", ",.1f", 1e3), "ms"),
        Column("p90", field("p90", ",.1f", 1e3), "ms"),
        Column(f"p99 of {requests}", field("p99", ",.1f", 1e3), "ms"),
        Column("quartiles", quarter, "ms"),
        Column("batch", lambda row: number(row["mean_batch"]["sequences"], ",.1f"), "sequences"),
        Column("batch", lambda row: number(row["mean_batch"]["tokens"], ",.0f"), "tokens"),
        Column("busy", field("busy", ".0f", 100), "%"),
    )
    return Table("Requests that arrive by chance", columns, rows)


def chart(content: Row) -> Chart:
    """Median and 99th percentile of each engine, a panel for each kind of requests; dotted lines at offline rates."""
    options, rows = content["options"], content["rows"]
    requests, panels = options["requests"], []
    for kind in dict.fromkeys(row["lengths"] for row in rows if "latency" in row):
        offline = next((offline_rates(row) for row in rows if row["cell"] == offline_name(kind)), ())
        series = []
        for engine, colour, marker in (BASELINE, "ideal", "D"), (options["funnel"]["name"], "measured", "o"):
            mine = [row for row in rows if (row["lengths"], row.get("engine")) == (kind, engine)]
            mine.sort(key=lambda row: row["arrivals_per_second"])
            rates = [row["arrivals_per_second"] for row in mine]
            for percentile, line, of in (("p50", "-", ""), ("p99", "--", f" of {requests}")):
                values = [1e3 * row[percentile] for row in mine]
                series.append(Series(f"{engine}, {percentile}{of}", rates, values, colour, marker, line))
        marked = list(zip(offline, ("ideal", "measured"), strict=False))
        panels.append(Panel(series, "arrivals per second", "latency (ms)", kind, marked=marked, log_values=True))
    return Chart(
        "Median and 99th percentile of latency over the rate of arrivals, a panel for each kind of requests; the table "
        "has the same figures.",
        f"Median latency (solid) and p99 of {requests} (dashed) over the rate of arrivals; dotted: offline rates",
        panels,
        facts=(describe_model(options["model"]), describe_machine(content["machine"])),
    )


def summary(offline: list[Row], online: list[Row]) -> str:
    """For each kind of requests what both engines do at one rate, and what they can do at most."""
    if not offline:
        return "Nothing was measured."
    return " ".join(
        kind_summary(row, [each for each in online if each["lengths"] == row["lengths"]]) for row in offline
    )


def kind_summary(offline: Row, online: list[Row]) -> str:
    without, funneled = offline_rates(offline)
    text = f"{offline['lengths']}: {funneled:,.1f} requests a second with the funnel, {without:,.1f} without"
    rate = offline["lengths"], HEADLINE_SHARE, BASELINE
    common = [row for row in online if (row["lengths"], row["share"], row["share_of"]) == rate]
    if len(common) == 2:
        baseline, funnel = sorted(common, key=lambda row: row["engine"] != BASELINE)
        text += (
            f"; at {baseline['arrivals_per_second']:,.1f} arrivals a second p99 of {baseline['requests']} is "
            f"{1e3 * funnel['p99']:,.0f} ms with it, {1e3 * baseline['p99']:,.0f} ms without"
        )
    return f"{text}."


def facts(options: Row) -> dict[str, str]:
    return {
        "Model": describe_model(options["model"]),
        "Funnel": options["funnel"]["name"],
        "Requests": f"{options['requests']} of each kind; {'; '.join(map(describe_lengths, options['lengths']))}",
        "Batches": f"at most {options['max_batch_tokens']} tokens",
        "Time": "programs compile first, for up to minutes; a row takes the number of requests over their rate",
        "Seeds": ", ".join(f"{name} {seed}" for name, seed in options["seeds"].items()),
        "Compilations while timing": "0",
        "Backend": describe_backend(options),
    }


def describe_lengths(facts: Row) -> str:
    return f"{facts['source']}: {facts['shortest']} to {facts['longest']} tokens, median {facts['median']:g}"
