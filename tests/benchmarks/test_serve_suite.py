"""The serving suite on engines whose clock says how long each token takes."""

import dataclasses
import itertools
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from funnel_benchmarks import models
from funnel_benchmarks.models import Model
from funnel_benchmarks.results import Results
from funnel_benchmarks.serve import suite as serving
from funnel_benchmarks.serve.requests import Requests, poisson_arrivals
from funnel_benchmarks.serve.server import serve
from funnel_benchmarks.serve.suite import Suite
from funnel_engine import FunnelConfig, HeadConfig
from funnel_kernels.errors import BackendUnavailable, ConfigError, InputError
from tiny_models import CONFIG

LENGTHS = "3\n5\n8\n9\n"
COUNT, BUDGET = 60, 40
SECONDS_PER_TOKEN = {1: 0.016, 2: 0.010}  # by total stride; 80 % of the one's rate is 50 % of the other's
MODEL = Model("tiny", "random", CONFIG, HeadConfig(), "float32", lambda backend: {})


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(LENGTHS)
    return str(path)


def make_suite(source, **options):
    funnel = FunnelConfig.after(1)
    given = {"model": MODEL, "funnel": funnel, "sources": (source,), "count": COUNT, "max_batch_tokens": BUDGET}
    return Suite(**(given | {"backend": "auto"} | options))


@pytest.fixture
def engines(monkeypatch):
    """Engines on a clock of their own; each embedding is remembered."""
    clock = SimpleNamespace(now=5.0, made=[], calls=[])

    class ClockedEngine:
        def __init__(self, config, head, weights, *, funnel, backend, max_batch_tokens):
            self.funnel, self.warm = funnel, False
            assert (config, head, weights, backend, max_batch_tokens) == (CONFIG, MODEL.head, {}, "auto", BUDGET)
            clock.made.append(self)

        def warmup(self):
            self.warm = True

        def embed(self, inputs):
            assert self.warm
            ids, offsets = inputs
            lengths = np.diff(offsets)
            assert len(ids) == lengths.sum()
            clock.calls.append((self.funnel.total_stride, lengths.tolist()))
            clock.now += SECONDS_PER_TOKEN[self.funnel.total_stride] * len(ids)

    def sleep(seconds):
        clock.now += max(seconds, 1e-9)  # or rounding makes it none

    monkeypatch.setattr(models, "Engine", ClockedEngine)
    MODEL.made.clear()
    monkeypatch.setattr(serving, "serve", partial(serve, clock=lambda: clock.now, sleep=sleep))
    return clock


def run(suite):
    results = Results(None, suite="serve", options=suite.options(), machine={})
    results.measure_all(suite.cells(results))
    return results


def test_offline_rates_are_those_of_all_requests_at_once_in_turns(engines, source):
    suite = make_suite(source)
    results = run(suite)
    tokens = int(Requests(source, COUNT, 101).lengths.sum())
    row = results.rows[0]
    assert (row["cell"], row["lengths"]) == ("mine.txt: offline", "mine.txt")
    assert row["baseline_seconds"]["samples"] == pytest.approx([tokens * 0.016] * 2)
    assert row["seconds"]["samples"] == pytest.approx([tokens * 0.010] * 2)
    assert row["baseline_requests_per_second"] == pytest.approx(COUNT / (tokens * 0.016))
    assert row["requests_per_second"] == pytest.approx(COUNT / (tokens * 0.010))
    turns = [stride for stride, _ in itertools.groupby(engines.calls, key=lambda call: call[0])]
    assert turns[:5] == [1, 2, 1, 2, 1]  # warm both, then A, B B, A


def test_every_engine_is_measured_at_its_rates_and_none_twice(engines, source):
    results = run(make_suite(source))
    offline, online = results.rows[0], results.rows[1:]
    base, own = offline["baseline_requests_per_second"], offline["requests_per_second"]
    funnel = "2:1 after 1"
    expected = [
        (engine, share, "no funnel", share / 100 * base) for share in (50, 80, 95) for engine in ("no funnel", funnel)
    ]
    expected += [(funnel, share, funnel, share / 100 * own) for share in (80, 95)]
    found = [(row["engine"], row["share"], row["share_of"], row["arrivals_per_second"]) for row in online]
    assert [each[:3] for each in found] == [each[:3] for each in expected]
    assert [each[3] for each in found] == pytest.approx([each[3] for each in expected])
    assert [row["cell"] for row in online] == [f"mine.txt: {e} at {s} % of the rate of {o}" for e, s, o, _ in expected]
    (left_out,) = results.content["left_out"]
    assert left_out["cell"] == "mine.txt: 2:1 after 1 at 50 % of the rate of 2:1 after 1"
    assert left_out["reason"].endswith("requests a second are what 80 % of the rate of no funnel are")
    assert left_out["same_as"] == "mine.txt: 2:1 after 1 at 80 % of the rate of no funnel"
    assert left_out["same_as"] in [row["cell"] for row in online]
    assert [engine.funnel.total_stride for engine in engines.made] == [1, 2]


def test_a_row_is_what_the_server_saw(engines, source):
    """Latencies as from the server itself, on the same arrivals; sorted, and rounded to microseconds."""
    row = run(make_suite(source)).rows[3]
    kind = Requests(source, COUNT, 101)
    now = [0.0]

    def embed(first, stop):
        now[0] += 0.016 * kind.lengths[first:stop].sum()

    def sleep(seconds):
        now[0] += max(seconds, 1e-9)

    arrivals = poisson_arrivals(row["arrivals_per_second"], COUNT)
    served = serve(arrivals, kind.lengths, BUDGET, embed, clock=lambda: now[0], sleep=sleep)
    assert (row["engine"], row["share"], row["requests"], row["compilations"]) == ("no funnel", 80, COUNT, 0)
    samples = row["latency"]["samples"]
    assert samples == sorted(samples) == [round(sample, 6) for sample in samples]
    np.testing.assert_allclose(samples, np.sort(served.latencies), atol=1e-6)
    assert (row["p50"], row["p90"], row["p99"]) == pytest.approx(tuple(np.quantile(samples, (0.5, 0.9, 0.99))))
    batches = len(served.batches)
    tokens = int(kind.lengths.sum())
    assert 1 < COUNT / batches < 8
    assert row["mean_batch"] == pytest.approx({"sequences": COUNT / batches, "tokens": tokens / batches})
    assert row["busy"] == pytest.approx(tokens * 0.016 / served.seconds)


def test_a_batch_of_the_funnel_counts_whole_windows(engines, source):
    run(make_suite(source))
    filled = {1: 0, 2: 0}
    for stride, lengths in engines.calls:
        rows = sum(-(-length // stride) * stride for length in lengths)
        filled[stride] = max(filled[stride], rows)
    assert filled[1] <= BUDGET
    assert filled[2] <= BUDGET
    assert min(filled.values()) > BUDGET - 9


def test_without_an_offline_rate_nothing_else_can_be_measured(engines, source, monkeypatch):
    monkeypatch.setattr(serving, "in_turns", lambda *_, **__: [][0])
    results = run(make_suite(source))
    assert not results.rows
    assert len(results.content["errors"]) == 1
    assert len(results.content["left_out"]) == 9
    assert "because 'mine.txt: offline' has no row" in results.content["left_out"][0]["reason"]
    assert not any("same_as" in entry for entry in results.content["left_out"])


def test_a_compilation_while_serving_fails_the_cell(engines, source, monkeypatch):
    offline, clocked = run(make_suite(source)).rows[:1], serving.serve

    def compiling(*arguments):
        jax.jit(lambda x: x * 2.75 + 1)(np.ones(3, np.float32))
        return clocked(*arguments)

    monkeypatch.setattr(serving, "serve", compiling)
    again = Results(None, suite="serve", options={}, machine={})
    again.measure_all(itertools.islice(make_suite(source).cells(SimpleNamespace(rows=offline)), 1, 2))
    assert not again.rows
    (entry,) = again.content["errors"]
    assert "programs were compiled while timing" in entry["error"]


def test_options_say_what_was_served(source):
    options = make_suite(source).options()
    assert options["model"].items() >= {"name": "tiny", "weights": "random", "layers": 3, "dtype": "float32"}.items()
    assert options["funnel"].items() >= {"name": "2:1 after 1", "strides": (1, 2)}.items()
    assert [facts["source"] for facts in options["lengths"]] == ["file mine.txt"]
    assert (options["requests"], options["max_batch_tokens"]) == (COUNT, BUDGET)
    assert options["served_by"] == "cpu"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"funnel": FunnelConfig()}, ConfigError, "pool nothing"),
        ({"funnel": FunnelConfig.after(3)}, ConfigError, "after layer 2 at the latest"),
        ({"backend": "abacus"}, BackendUnavailable, "abacus"),
        ({"count": 0}, ConfigError, "requests=0"),
        ({"sources": ("conll", "novels")}, InputError, "conll, sst2"),
        ({"sources": ("conll", "conll"), "count": 1}, ConfigError, "'conll' are given twice"),
        ({"max_batch_tokens": 9}, InputError, "9 tokens, but a batch holds only 9; raise --max-batch-tokens"),
        ({"sources": ("passage",)}, InputError, "tokens, more than the 64 that tiny was made for"),
    ],
)
def test_what_cannot_be_served_is_refused_when_the_suite_is_made(source, options, error, message):
    with pytest.raises(error, match=message):
        make_suite(source, **options)
    assert dataclasses.replace(make_suite(source), max_batch_tokens=10)
