"""The suite `serve-http`: what HTTP costs, and how a server behaves under load, over real sockets.

Three servers are measured one after another, each as a process of its own: `funnel serve` without a funnel and with
one, and what users would otherwise run, sentence-transformers behind FastAPI (`peer_server`). All have the same random
weights and get the same requests, from a third process (`load_process`), so that client, server and the engine beside
them share no interpreter. They do share the cores of the machine.

Nothing is timed before the vectors of a server are compared with those of `Engine.embed`.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from funnel_benchmarks.funnels import NO_FUNNEL, check_funnel, funnel_facts, funnel_name
from funnel_benchmarks.measure import in_turns, sampler, spread
from funnel_benchmarks.models import Model, random_model
from funnel_benchmarks.peers.forms import SENTENCE, dtype_beside
from funnel_benchmarks.peers.peer_process import not_installed
from funnel_benchmarks.peers.sentence_model import text_of, write_tokenizer
from funnel_benchmarks.peers.suite import TOLERANCES, difference
from funnel_benchmarks.random_checkpoint import write_random_model
from funnel_benchmarks.results import LeftOut, Measurement, Results, Row
from funnel_benchmarks.serve import http_section
from funnel_benchmarks.serve.connections import NO_REPLY
from funnel_benchmarks.serve.load import Load, Replies, Texts
from funnel_benchmarks.serve.peer_server import PACKAGES
from funnel_benchmarks.serve.requests import (
    ARRIVALS_SEED,
    IDS_SEED,
    LENGTHS_SEED,
    Requests,
    check_requests,
    poisson_arrivals,
)
from funnel_benchmarks.serve.server_process import Server, own_command, peer_command
from funnel_benchmarks.serve.suite import BASELINE
from funnel_benchmarks.statistics import quartiles
from funnel_benchmarks.suite import Section
from funnel_benchmarks.suite import Suite as BaseSuite
from funnel_engine import Engine, FunnelConfig, convert
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.presets import Fields
from funnel_kernels.errors import ConfigError, FunnelError
from funnel_kernels.target import check_backend
from funnel_serving.serve_command import require_packages
from funnel_serving.settings import Settings

PEER = f"{SENTENCE} behind FastAPI"
SHARES = (50, 80, 95, 150)  # per cent of a server's own capacity
COMMON_SHARE = 80  # of the baseline's capacity: its p99 there is what the highest rates of the others must keep to
SEARCH_STEPS = 5  # of the search for such a rate; each halves what is not known
REPEATS = 5  # A B B A
CALLS = 10  # short requests in a sample
SHORT = 16  # tokens of a short request
MOST_TEXTS = 512  # in a sample of capacity
COMPARED = 8  # texts whose vectors are compared


class Form(NamedTuple):
    """How texts are sent to measure capacity, by clients that wait for each reply."""

    name: str
    clients: int
    texts: int


LARGE = Form("large requests", 2, 128)
GROUPS = Form("8 clients x 8 texts", 8, 8)
SINGLES = Form("64 clients x 1 text", 64, 1)  # the requests of open loops have one text too
FORMS = (LARGE, GROUPS, SINGLES)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Suite(BaseSuite):
    """What is measured. `close` ends what runs.

    Attributes:
        preset, fields: the model's name, and its `config.json`, see `peers.suite.model_fields`.
        dtype: of the engine's weights.
        sources, count: what lengths are drawn from, and the requests of an open loop for each.
        max_batch_tokens, max_waiting_requests: settings of the server.
        folder: for checkpoints; it is the caller's to remove.
        engines, running: what was loaded, and the server that runs, by the server's name.

    Raises:
        ConfigError: a funnel that pools nothing or that the model cannot have, a package of `funnel serve` that is not
            installed, a count below 1, or a queue that is too short to measure capacity.
        InputError: lengths that cannot be read, or a request that the model or a batch is too small for.
    """

    preset: str
    fields: Fields
    dtype: str
    funnel: FunnelConfig
    sources: tuple[str, ...]
    count: int
    max_batch_tokens: int
    max_waiting_requests: int
    backend: str
    folder: Path
    engines: dict[str, Engine] = dataclasses.field(default_factory=dict)
    running: dict[str, Server] = dataclasses.field(default_factory=dict)

    name = "serve-http"

    def __post_init__(self) -> None:
        require_packages()
        check_backend(self.backend)
        check_funnel(self.model.config, self.funnel)
        check_requests(self.kinds, self.preset, self.model.config, self.funnel, self.max_batch_tokens)
        if self.max_waiting_requests < SINGLES.clients:
            raise ConfigError(
                f"--max-waiting-requests {self.max_waiting_requests} is less than the {SINGLES.clients} requests that "
                "wait while capacity is measured; raise it"
            )

    @functools.cached_property
    def model(self) -> Model:
        return random_model(self.preset, read_model_config(self.fields), self.dtype)

    @functools.cached_property
    def kinds(self) -> tuple[Requests, ...]:
        return tuple(Requests(source, self.count, self.model.config.vocab_size) for source in self.sources)

    @property
    def funnels(self) -> dict[str, FunnelConfig]:
        """Of each server the funnel of the engine that it is measured beside."""
        return {BASELINE: NO_FUNNEL, funnel_name(self.funnel): self.funnel, PEER: NO_FUNNEL}

    @property
    def settings(self) -> Row:
        """Settings of `funnel serve` that both servers of ours get; all others are its defaults."""
        return {
            "host": "127.0.0.1",
            "port": 0,
            "backend": self.backend,
            "warmup": "all",
            "max_batch_tokens": self.max_batch_tokens,
            "max_waiting_requests": self.max_waiting_requests,
            "max_waiting_rows": Settings.max_waiting_rows,
            "request_seconds": Settings.request_seconds,
        }

    def options(self) -> Row:
        """Everything that a cell depends on, as the head of a result file."""
        return {
            "model": self.model.facts(),
            "funnel": funnel_facts(self.funnel),
            "lengths": [kind.facts() for kind in self.kinds],
            "requests": self.count,
            "settings": self.settings,
            "backend": self.backend,
            "served_by": self.model.served_by([self.funnel], self.backend),
            "shares": SHARES,
            "seeds": {"lengths": LENGTHS_SEED, "ids": IDS_SEED, "arrivals": ARRIVALS_SEED},
        }

    def cells(self, results: Results) -> Iterator[Measurement]:
        """The cells of the suite. Every row has `server`: "no funnel", the funnel's name, or the peer's.

        A row of capacity, of texts that clients send one request after another:

            lengths, form           of which texts, and how many clients send how many texts in a request
            texts                   of a sample
            seconds, engine_seconds for all of them, of the server and of `Engine.embed` on the same texts, in turns
            texts_per_second, engine_texts_per_second

        of a short request at a time:

            tokens                  of the request
            seconds, engine_seconds of one, in turns; a sample is the median of ten calls
            overhead                seconds, the difference of the medians

        of requests of one text each that arrive by chance (`lengths`, `share`, `arrivals_per_second`, `requests`), what
        `describe_replies` says; and for each of `lengths` of the highest rate at which p99 is not above that of no
        funnel at 80 % of its capacity:

            limit                   that p99, seconds
            arrivals_per_second     the highest rate of those that were tried
            baseline_arrivals_per_second    that of no funnel
            tried                   for each rate in turn the rate, p99, and requests without a result
        """
        for server in self.funnels:  # so that each starts once
            yield f"{server}: one short request", partial(overhead, self, server)
            for kind in self.kinds:
                place = f"{kind.name}: {server}"
                for form in FORMS:
                    yield f"{place}, {form.name}", partial(capacity, self, server, kind, form)
                for share in SHARES:
                    yield open_name(kind, server, share), partial(arriving, self, server, kind, share, results.rows)
                if server != BASELINE:
                    yield f"{place}, highest rate", partial(highest_rate, self, server, kind, results.rows)

    @classmethod
    def section(cls, content: Row) -> Section:
        """How the results read."""
        return http_section.section(content)

    @functools.cached_property
    def source(self) -> Path:
        """The folder of the weights as sentence-transformers reads it, which takes the mean of the rows."""
        folder = self.folder / "source"
        write_random_model(folder, self.fields)
        write_tokenizer(folder, self.model.config.vocab_size)
        return folder

    @functools.cached_property
    def checkpoint(self) -> Path:
        """The same as `funnel serve` reads it."""
        folder = self.folder / "checkpoint"
        convert(self.source, folder, dtype=self.dtype)
        return folder

    def engine(self, server: str) -> Engine:
        """The engine that a server is measured beside, warm."""
        funnel = self.funnels[server]
        key = funnel_name(funnel)
        if key not in self.engines:
            self.engines[key] = Engine.load(
                self.checkpoint, funnel=funnel, backend=self.backend, max_batch_tokens=self.max_batch_tokens
            )
            self.engines[key].warmup()
        return self.engines[key]

    def load(self, name: str) -> Load:
        """The client of a server, which is started if another one or none runs, and compared with the engine."""
        if name not in self.running:
            self.close()
            if name == PEER:
                if missing := next((package for package in PACKAGES if find_spec(package) is None), None):
                    raise LeftOut(not_installed(missing))
                if jax.default_backend() != "cpu":
                    raise LeftOut(f"JAX runs on {jax.default_backend()}, where this peer does not")
                command = peer_command(self.source, dtype_beside(SENTENCE, self.dtype, on_cpu=True))
            else:
                command = own_command(self.checkpoint, self.settings | {"funnel": str(self.funnels[name])})
            with contextlib.ExitStack() as on_failure:
                server = Server(command)
                on_failure.callback(server.close)
                self.compare(name, server)
                on_failure.pop_all()
            self.running[name] = server
        load = self.running[name].load
        assert load is not None
        return load

    def compare(self, name: str, server: Server) -> None:
        """Raises `FunnelError` if a server's vectors are not those of the engine."""
        texts = texts_of(self.kinds[0])[:COMPARED]
        worst, limit = difference(server.embed(texts), self.engine(name).embed(texts)), TOLERANCES[self.dtype]
        if not worst <= limit:
            raise FunnelError(
                f"vectors of the server {name!r} differ from the engine's by {worst:.3g} of their size, more than the "
                f"limit of {limit:g} for {self.dtype}: it computes something else"
            )

    def close(self) -> None:
        """Ends the server that runs."""
        for server in self.running.values():
            server.close()
        self.running.clear()

    def send(self, name: str, kind: Requests, rate: float) -> Replies:
        """All requests of a kind, one text each, at Poisson arrivals.

        Raises:
            FunnelError: nothing had a result, or the server compiled something meanwhile.
        """
        requests = [[text] for text in texts_of(kind)]
        replies = self.load(name).opened(requests, poisson_arrivals(rate, self.count))
        if compiled := self.running[name].compilations():
            raise FunnelError(f"the server compiled {compiled} programs after its warm-up, and must not; please report")
        if not (replies.statuses == 200).any():
            raise FunnelError(f"no request had a result: {http_section.describe_statuses(count_statuses(replies))}")
        return replies


def texts_of(kind: Requests) -> Texts:
    """The texts of all requests."""
    ids, offsets = kind.inputs
    return [text_of(each.tolist()) for each in np.split(ids, offsets[1:-1])]


def open_name(kind: Requests, server: str, share: int) -> str:
    return f"{kind.name}: {server} at {share} % of its capacity"


def capacity(suite: Suite, server: str, kind: Requests, form: Form) -> Row:
    """The throughput of a server beside that of `Engine.embed`."""
    load, engine = suite.load(server), suite.engine(server)
    texts = texts_of(kind)[:MOST_TEXTS]
    requests = [texts[first : first + form.texts] for first in range(0, len(texts), form.texts)]

    def send() -> float:
        return load.closed(requests, form.clients).seconds

    send()
    engine_samples, samples = in_turns(sampler(partial(engine.embed, texts), 0.0), send, REPEATS)
    return {
        "server": server,
        "lengths": kind.name,
        "form": form.name,
        "texts": len(texts),
        "seconds": spread(samples),
        "engine_seconds": spread(engine_samples),
        "texts_per_second": len(texts) / quartiles(samples).median,
        "engine_texts_per_second": len(texts) / quartiles(engine_samples).median,
    }


def overhead(suite: Suite, server: str) -> Row:
    """What HTTP adds to one short request when nothing else is there."""
    load, engine = suite.load(server), suite.engine(server)
    (text,) = texts_of(Requests(str(SHORT), 1, suite.model.config.vocab_size))

    def call() -> float:
        start = time.perf_counter()
        engine.embed([text])
        return time.perf_counter() - start

    def compute() -> float:
        return float(np.median([call() for _ in range(CALLS)]))

    def send() -> float:
        return float(np.median(load.closed([[text]] * CALLS, 1).latencies))

    compute(), send()
    engine_samples, samples = in_turns(compute, send, REPEATS)
    return {
        "server": server,
        "tokens": SHORT,
        "seconds": spread(samples),
        "engine_seconds": spread(engine_samples),
        "overhead": quartiles(samples).median - quartiles(engine_samples).median,
    }


def arriving(suite: Suite, server: str, kind: Requests, share: int, rows: list[Row]) -> Row:
    """What becomes of requests at a share of a server's capacity.

    Raises:
        LeftOut: the capacity is not known.
    """
    rate = share / 100 * measured_capacity(kind, server, rows)
    replies = suite.send(server, kind, rate)
    return {
        "server": server,
        "lengths": kind.name,
        "share": share,
        "arrivals_per_second": rate,
        "requests": suite.count,
        **describe_replies(replies),
        "memory": suite.running[server].memory(),
    }


def highest_rate(suite: Suite, server: str, kind: Requests, rows: list[Row]) -> Row:
    """The highest rate that a server can take at the p99 of no funnel at `COMMON_SHARE` of its capacity, by bisection.

    Raises:
        LeftOut: that p99 or the capacity is not known, or no rate that was tried is low enough.
    """
    common = open_name(kind, BASELINE, COMMON_SHARE)
    reference = next((row for row in rows if row["cell"] == common), None)
    if reference is None:
        raise LeftOut(f"the p99 to keep to is not known, because {common!r} has no row")
    low, high, tried = 0.0, measured_capacity(kind, server, rows), []
    for _ in range(SEARCH_STEPS):
        rate = (low + high) / 2
        found = describe_replies(suite.send(server, kind, rate))
        lost = suite.count - found["statuses"].get("200", 0)
        tried.append({"arrivals_per_second": rate, "p99": found["p99"], "lost": lost})
        low, high = (rate, high) if found["p99"] <= reference["p99"] and not lost else (low, rate)
    if not low:
        raise LeftOut(
            f"p99 is above {1e3 * reference['p99']:,.0f} ms at every rate that was tried, down to {high:,.3g}/s"
        )
    return {
        "server": server,
        "lengths": kind.name,
        "limit": reference["p99"],
        "arrivals_per_second": low,
        "baseline_arrivals_per_second": reference["arrivals_per_second"],
        "tried": tried,
    }


def measured_capacity(kind: Requests, server: str, rows: list[Row]) -> float:
    """Requests of one text a second.

    Raises:
        LeftOut: it was not measured.
    """
    cell = f"{kind.name}: {server}, {SINGLES.name}"
    for row in rows:
        if row["cell"] == cell:
            return float(row["texts_per_second"])
    raise LeftOut(f"the capacity is not known, because {cell!r} has no row")


def describe_replies(replies: Replies) -> Row:
    """What a row says of the requests of an open loop.

    Returns:
        statuses            how many requests had which status, or "no reply"
        results_per_second  200s, over the time from the first arrival to the last reply
        latency             of 200s, seconds from arrival to the end of the reply; sorted, rounded to microseconds
        p50, p90, p99       of those, interpolated
        refusals            of 429s, where there are any: `p50`, `p99` and `most` of the seconds from sending
        client              `lag_p50`, `lag_p99`, `lag_most`: seconds from arrival to sending; `busy`, of a core
    """
    done, refused = replies.statuses == 200, replies.statuses == 429
    latencies = np.sort(np.round(replies.latencies[done], 6))
    row: Row = {
        "statuses": count_statuses(replies),
        "results_per_second": float(done.sum() / replies.seconds),
        "latency": spread(latencies.tolist()),
        **quantiles(latencies, p50=0.5, p90=0.9, p99=0.99),
        "client": {
            **quantiles(replies.lags, lag_p50=0.5, lag_p99=0.99, lag_most=1.0),
            "busy": replies.cpu_seconds / replies.seconds,
        },
    }
    if refused.any():
        row["refusals"] = quantiles((replies.latencies - replies.lags)[refused], p50=0.5, p99=0.99, most=1.0)
    return row


def count_statuses(replies: Replies) -> Row:
    counts = zip(*np.unique(replies.statuses, return_counts=True), strict=True)
    return {"no reply" if status == NO_REPLY else str(status): int(count) for status, count in counts}


def quantiles(values: np.ndarray, **levels: float) -> Row:
    return {name: float(np.quantile(values, level)) for name, level in levels.items()}
