"""The latency suite end to end on a tiny model. Nothing here asserts how long anything takes."""

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funnel_benchmarks import latency
from funnel_benchmarks.latency import Suite, counting_compilations, run_suite
from funnel_engine import Engine, HeadConfig
from funnel_engine.weights import random_weights
from funnel_kernels.errors import BackendUnavailable, ConfigError, FunnelError, InputError
from tiny_models import CONFIG

LENGTHS = np.array([5, 3, 8], np.int32)
REPEATS = 2
SUITE = Suite(
    model="tiny",
    weights="random",
    config=CONFIG,
    head=HeadConfig(),
    dtype="float32",
    layers=(1, 2),
    stride=2,
    pool="mean",
    recovery=None,
    backend="auto",
    lengths=LENGTHS,
    lengths_source="by hand",
    repeats=REPEATS,
)


class RecordingEngine(Engine):
    """Remembers every engine that was made, and what each was asked to embed."""

    made: list["RecordingEngine"]

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.inputs: list[tuple[np.ndarray, np.ndarray]] = []
        self.made.append(self)

    def embed(self, inputs: Any, *arguments: Any, **options: Any) -> np.ndarray:
        self.inputs.append(inputs)
        return super().embed(inputs, *arguments, **options)


@pytest.fixture(scope="module")
def weights() -> Mapping[str, jax.Array]:
    return jax.tree.map(jax.device_put, random_weights(CONFIG, HeadConfig(), "float32", seed=7))


@pytest.fixture(scope="module")
def run(weights):
    """One run of the suite: its result, the JSON after each callback, the engines, and how often it advanced."""
    seen, steps = [], []
    RecordingEngine.made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "Engine", RecordingEngine)
        result = run_suite(
            SUITE, weights, on_result=lambda result: seen.append(json.dumps(result)), advance=lambda: steps.append(1)
        )
    return result, [json.loads(text) for text in seen], RecordingEngine.made, len(steps)


def test_every_row_has_all_its_figures_and_they_agree(run):
    result, *_ = run
    assert [row["layer"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        for spread, samples in (("latency", "samples"), ("baseline_latency", "baseline_samples")):
            assert len(row[samples]) == 2 * REPEATS
            assert min(row[samples]) > 0
            assert row[spread]["median"] == pytest.approx(np.median(row[samples]))
            assert row[spread]["low"] <= row[spread]["median"] <= row[spread]["high"]
        ratio = row["latency"]["median"] / row["baseline_latency"]["median"]
        assert row["stride"] == 2
        assert row["ratio"]["median"] == pytest.approx(ratio)
        assert row["ratio"]["low"] <= ratio <= row["ratio"]["high"]
        assert row["saving_percent"] == pytest.approx(100 - 100 * ratio)
        assert row["efficiency"] == pytest.approx(row["ideal_ratio"] / ratio)
        assert row["tokens_per_second"] * row["latency"]["median"] == pytest.approx(16)
        assert row["compile_seconds"] > 0


def test_ratio_is_funnel_over_baseline_on_a_clock_that_says_how_long_each_takes(weights, monkeypatch):
    seconds = {(): 4.0, (1, 2): 2.0, (1, 1, 2): 3.0}
    now = [0.0]

    class ClockedEngine(Engine):
        def embed(self, inputs: Any, *arguments: Any, **options: Any) -> np.ndarray:
            now[0] += seconds[self.funnel.strides]
            return super().embed(inputs, *arguments, **options)

    clock = SimpleNamespace(perf_counter=lambda: now[0], strftime=time.strftime, gmtime=time.gmtime)
    monkeypatch.setattr(latency, "Engine", ClockedEngine)
    monkeypatch.setattr(latency, "time", clock)
    result = run_suite(SUITE, weights, on_result=lambda result: None, advance=lambda: None)
    assert [row["latency"]["median"] for row in result["rows"]] == [2.0, 3.0]
    assert [row["baseline_latency"]["median"] for row in result["rows"]] == [4.0, 4.0]
    assert [row["ratio"]["median"] for row in result["rows"]] == [0.5, 0.75]
    assert [row["saving_percent"] for row in result["rows"]] == [50.0, 25.0]


def test_flops_and_ideal_ratio_are_those_of_the_funnel(run):
    """Counted by hand for the tiny model: 5, 3 and 8 tokens become 3, 2 and 4 rows; windows of 4 tokens each side."""
    result, *_ = run
    linear = 2 * 24 * 8 * (4 + 2 * 2 + 4) + 6 * 24 * 40  # FLOPs per row: q, k, v, output; MLP
    pairs = {"full": 25 + 9 + 64, "sliding": 25 + 9 + (64 - 2 * (3 + 2 + 1))}  # 8 tokens: 12 pairs lie 5 or more apart
    pooled_pairs = {"full": 9 + 4 + 16, "sliding": 9 + 4 + (16 - 2)}  # rows 0 and 3 are 6 tokens apart
    kinds = ("sliding", "full", "sliding")

    def flops(layers: int) -> int:
        full_length = sum(16 * linear + 4 * 32 * pairs[kind] for kind in kinds[:layers])
        return full_length + sum(9 * linear + 4 * 32 * pooled_pairs[kind] for kind in kinds[layers:])

    assert result["header"]["baseline_flops"] == flops(3)
    for row in result["rows"]:
        assert row["ideal_ratio"] == pytest.approx(flops(row["layer"]) / flops(3))
        assert row["flops_per_second"] * row["latency"]["median"] == pytest.approx(flops(row["layer"]))


def test_the_header_says_what_was_measured(run):
    header = run[0]["header"]
    assert (header["model"], header["weights"], header["dtype"], header["pool"]) == (
        "tiny",
        "random",
        "float32",
        "mean",
    )
    assert header["lengths"] == {
        "source": "by hand", "sequences": 3, "tokens": 16, "shortest": 3, "median": 5.0, "longest": 8,
    }  # fmt: skip
    assert header["compilations_while_timing"] == 0
    assert header["baseline_compile_seconds"] > 0
    assert header["peak_memory_gb"]["process"] > 0
    assert header["served_by"] == "cpu"


def test_padding_is_counted(run):
    """Without a funnel the 16 tokens fill 16 rows; with one they need 6 + 4 + 8, in a bucket of 32."""
    result, *_ = run
    assert result["header"]["baseline_padding_waste"] == 0
    assert [row["padding_waste"] for row in result["rows"]] == [0.5, 0.5]


def test_results_are_handed_out_as_they_come(run):
    result, seen, _, steps = run
    assert [len(each["rows"]) for each in seen] == [0, 1, 2]
    assert [each["complete"] for each in seen] == [False, False, True]
    assert seen[-1] == result  # and all of it is plain JSON
    assert steps == 2 * (1 + REPEATS)


def test_engines_share_weights_and_inputs_and_run_one_packed_call(run, weights):
    baseline, *funneled = engines = run[2]
    assert [engine.funnel.strides for engine in engines] == [(), (1, 2), (1, 1, 2)]
    ids, offsets = baseline.inputs[0]
    np.testing.assert_array_equal(np.diff(offsets), LENGTHS)
    assert len(set(ids.tolist())) > 4
    buffer = weights["embedding"].unsafe_buffer_pointer()
    for engine in engines:
        assert all(each[0] is ids and each[1] is offsets for each in engine.inputs)
        assert engine.stats()["batches"] == engine.stats()["calls"]
        assert engine.params["embedding"].unsafe_buffer_pointer() == buffer
    warm = 2
    assert len(baseline.inputs) == warm + 2 * 2 * REPEATS
    assert [len(engine.inputs) for engine in funneled] == [warm + 2 * REPEATS] * 2


def test_a_compilation_while_timing_fails_the_run_and_shows_in_the_result(weights, monkeypatch):
    calls = itertools.count()

    class CompilingEngine(Engine):
        def embed(self, inputs: Any, *arguments: Any, **options: Any) -> np.ndarray:
            shape = next(calls) + 1
            jax.jit(lambda x: x * 3.25 + shape)(np.ones(shape, np.float32))
            return super().embed(inputs, *arguments, **options)

    monkeypatch.setattr(latency, "Engine", CompilingEngine)
    seen = []
    with pytest.raises(FunnelError, match="programs were compiled while timing layer 1"):
        run_suite(SUITE, weights, on_result=lambda result: seen.append(json.dumps(result)), advance=lambda: None)
    last = json.loads(seen[-1])
    assert last["header"]["compilations_while_timing"] >= 4 * REPEATS
    assert not last["complete"]
    assert len(last["rows"]) == 1


def test_compilations_are_counted_wherever_they_happen():
    function = jax.jit(lambda x: jnp.sin(x) * 1.625)
    with counting_compilations() as compiled:
        function(np.ones(3, np.float32))
    assert len(compiled) == 1
    with counting_compilations() as compiled:
        function(np.ones(3, np.float32))
    assert not compiled
    with counting_compilations() as compiled:
        function.lower(np.ones(4, np.float32)).compile()
    assert len(compiled) == 1
    function(np.ones(5, np.float32))
    assert len(compiled) == 1  # no longer listening


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stride": 1}, ConfigError, "stride=1 pools nothing"),
        ({"repeats": 0}, ConfigError, "repeats=0"),
        ({"layers": (1, 3)}, ConfigError, "after layer 2 at the latest"),
        ({"pool": "median"}, ConfigError, "median"),
        ({"recovery": "guess"}, ConfigError, "guess"),
        ({"backend": "abacus"}, BackendUnavailable, "abacus"),
        ({"lengths": np.array([65], np.int32)}, InputError, "65 tokens, more than the 64"),
    ],
)
def test_a_suite_that_cannot_run_is_refused_when_it_is_made(options, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(SUITE, **options)
