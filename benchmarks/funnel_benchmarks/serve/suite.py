"""The serving suite: how long requests take when they arrive by chance, with a funnel and without.

First the *offline rate* of both engines, with all requests there at once: as fast as each can be. Then requests arrive
as a Poisson process at shares of that rate, and each one's latency runs from its arrival to its vector. As in MLPerf's
Server scenario nothing is cached, no request is treated by its content, and none waits for one that is not there yet.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from funnel_benchmarks.funnels import NO_FUNNEL, check_funnel, funnel_facts, funnel_name
from funnel_benchmarks.measure import compiling_nothing, in_turns, spread
from funnel_benchmarks.models import Model
from funnel_benchmarks.results import Cell, LeftOut, Row
from funnel_benchmarks.serve.requests import ARRIVALS_SEED, IDS_SEED, LENGTHS_SEED, Requests, poisson_arrivals
from funnel_benchmarks.serve.server import Served, serve
from funnel_benchmarks.statistics import quartiles
from funnel_engine import Engine, FunnelConfig
from funnel_engine.packing import make_plan
from funnel_kernels.errors import ConfigError, InputError
from funnel_kernels.target import check_backend

SHARES = (50, 80, 95)  # per cent of an offline rate
NEAR = 0.02  # rates that differ by less are one
BASELINE = "no funnel"


class Engines(NamedTuple):
    """The same model twice, warm."""

    baseline: Engine
    funneled: Engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
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

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_funnel(self.model.config, self.funnel)
        names = [kind.name for kind in self.kinds]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"lengths {name!r} are given twice; name each only once")
        for kind in self.kinds:
            longest = kind.lengths.max()
            if longest > self.model.config.max_positions:
                raise InputError(
                    f"lengths {kind.name!r} have a request of {longest} tokens, more than the "
                    f"{self.model.config.max_positions} that {self.model.name} was made for; take shorter ones"
                )
            if self.sizes(kind, self.funnel).max() > self.max_batch_tokens:
                raise InputError(
                    f"lengths {kind.name!r} have a request of {longest} tokens, but a batch holds only "
                    f"{self.max_batch_tokens}; raise --max-batch-tokens"
                )

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


def cells(suite: Suite, weights: Mapping[str, Any], rows: list[Row]) -> Iterator[Cell]:
    """The cells of a suite. A row of an offline rate has, beside what `Results` puts there:

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

    Args:
        weights: by the names of `weights.expected_shapes`, on the device already; both engines share them.
        rows: those measured so far, a list that grows by the row of each cell: offline rates are looked up there.
    """

    @functools.cache
    def engines() -> Engines:
        return Engines(*(warm_engine(suite, weights, funnel) for funnel in (NO_FUNNEL, suite.funnel)))

    funneled = funnel_name(suite.funnel)
    for kind in suite.kinds:
        yield offline_name(kind.name), partial(offline, suite, engines, kind)
        for share, owner, engine in [
            *((share, BASELINE, engine) for share in SHARES for engine in (BASELINE, funneled)),
            *((share, funneled, funneled) for share in SHARES),
        ]:
            name = online_name(kind.name, engine, owner, share)
            yield name, partial(online, suite, engines, kind, engine, owner, share, rows)


def offline_name(kind: str) -> str:
    return f"{kind}: offline"


def online_name(kind: str, engine: str, owner: str, share: int) -> str:
    return f"{kind}: {engine} at {share} % of the rate of {owner}"


def warm_engine(suite: Suite, weights: Mapping[str, Any], funnel: FunnelConfig) -> Engine:
    """An engine with all of its programs compiled, and the largest run once, which touches all memory."""
    engine = Engine(
        suite.model.config, suite.model.head, weights,
        funnel=funnel, backend=suite.backend, max_batch_tokens=suite.max_batch_tokens,
    )  # fmt: skip
    engine.warmup()
    kind = suite.kinds[0]
    fitting = np.cumsum(suite.sizes(kind, funnel)) <= suite.max_batch_tokens
    engine.embed(kind.take(0, int(fitting.sum())))
    return engine


def run(suite: Suite, engine: Engine, kind: Requests, arrivals: np.ndarray) -> Served:
    """Serves all requests of a kind with one engine."""

    def embed(first: int, stop: int) -> None:
        engine.embed(kind.take(first, stop))

    return serve(arrivals, suite.sizes(kind, engine.funnel), suite.max_batch_tokens, embed)


def offline(suite: Suite, engines: Callable[[], Engines], kind: Requests) -> Row:
    """How fast both engines are when all requests are there from the beginning."""
    at_once = np.zeros(suite.count)

    def seconds(engine: Engine) -> float:
        return run(suite, engine, kind, at_once).seconds

    without, funneled = engines()
    baseline_samples, samples = in_turns(partial(seconds, without), partial(seconds, funneled), repeats=1)
    return {
        "lengths": kind.name,
        "seconds": spread(samples),
        "baseline_seconds": spread(baseline_samples),
        "requests_per_second": suite.count / quartiles(samples).median,
        "baseline_requests_per_second": suite.count / quartiles(baseline_samples).median,
    }


def offline_rates(offline_row: Row) -> tuple[float, float]:
    """Requests a second without a funnel and with it."""
    return offline_row["baseline_requests_per_second"], offline_row["requests_per_second"]


def online(
    suite: Suite, engines: Callable[[], Engines], kind: Requests, engine: str, owner: str, share: int, rows: list[Row]
) -> Row:
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
    chosen = engines().baseline if engine == BASELINE else engines().funneled
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
