"""The latency suite end to end on a tiny model. Nothing here asserts how long anything takes."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from funnel_benchmarks import measure as measure_module
from funnel_benchmarks import models
from funnel_benchmarks.funnels import funnel_name
from funnel_benchmarks.latency.suite import Batch, Suite
from funnel_benchmarks.models import Model
from funnel_benchmarks.results import Results, read_results
from funnel_engine import Engine, FunnelConfig, HeadConfig
from funnel_engine.weights import random_weights
from funnel_kernels.errors import BackendUnavailable, ConfigError, InputError
from tiny_models import CONFIG

LENGTHS = np.array([5, 3, 8], np.int32)
EQUAL = np.array([6, 6], np.int32)
REPEATS = 2
NO_STEPS = SimpleNamespace(advance=lambda: None)
MODEL = Model("tiny", "random", CONFIG, HeadConfig(), "float32", lambda backend: {})
SUITE = Suite(
    model=MODEL,
    funnels=(FunnelConfig.after(1, pool="mean"), FunnelConfig.after(2, pool="mean")),
    batches=(Batch(LENGTHS, "by hand"), Batch(EQUAL)),
    backend="auto",
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


def loading(weights, **changes):
    """The suite with these weights, and engines of its own."""
    return dataclasses.replace(
        SUITE, model=dataclasses.replace(MODEL, load=lambda backend: weights, made={}), **changes
    )


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    """One run of the suite: its file, the engines, and how often it advanced."""
    path, steps = tmp_path_factory.mktemp("latency") / "out.json", []
    RecordingEngine.made = []
    results = Results(path, suite="latency", options=SUITE.options(), machine={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "Engine", RecordingEngine)
        results.measure_all(loading(weights).cells(SimpleNamespace(advance=lambda: steps.append(1))))
    assert [row["cell"] for row in read_results(path)["rows"]] == [row["cell"] for row in results.rows]
    return results.content, RecordingEngine.made, len(steps)


def test_there_is_a_row_for_every_funnel_on_every_batch(run):
    result, _, steps = run
    assert result["errors"] == []
    ragged, equal = "3 sequences of 3 to 8 tokens, 16 in all: by hand", "2 x 6 tokens"
    first, second = "2:1 after 1, pool mean", "2:1 after 2, pool mean"
    pairs = [(first, ragged), (second, ragged), (first, equal), (second, equal)]
    assert [row["cell"] for row in result["rows"]] == [f"{funnel}; {batch}" for funnel, batch in pairs]
    assert [(row["funnel"]["name"], row["batch"]["name"]) for row in result["rows"]] == pairs
    assert [FunnelConfig(**without_name(row["funnel"])) for row in result["rows"]] == 2 * list(SUITE.funnels)
    assert steps == 4 * (1 + REPEATS)


def without_name(funnel: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in funnel.items() if key != "name"}


def test_every_row_has_all_its_figures_and_they_agree(run):
    for row in run[0]["rows"]:
        for name in ("seconds", "baseline_seconds"):
            assert len(row[name]["samples"]) == 2 * REPEATS
            assert row[name]["median"] == pytest.approx(np.median(row[name]["samples"]))
            assert row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        ratio = row["seconds"]["median"] / row["baseline_seconds"]["median"]
        assert row["ratio"]["median"] == pytest.approx(ratio)
        assert row["ratio"]["low"] <= ratio <= row["ratio"]["high"]
        assert row["saving_percent"] == pytest.approx(100 - 100 * ratio)
        assert row["efficiency"] == pytest.approx(row["ideal_ratio"] / ratio)
        assert row["tokens_per_second"] * row["seconds"]["median"] == pytest.approx(row["batch"]["tokens"])
        assert row["compile_seconds"] > 0
        assert row["baseline_compile_seconds"] > 0
        assert row["peak_memory_gb"]["process"] > 0


def test_ratio_is_funnel_over_baseline_on_a_clock_that_says_how_long_each_takes(weights, monkeypatch):
    seconds = {(): 4.0, (1, 2): 2.0, (1, 1, 2): 3.0}
    now = [0.0]

    class ClockedEngine(Engine):
        def embed(self, inputs: Any, *arguments: Any, **options: Any) -> np.ndarray:
            now[0] += seconds[self.funnel.strides]
            return super().embed(inputs, *arguments, **options)

    monkeypatch.setattr(models, "Engine", ClockedEngine)
    monkeypatch.setattr(measure_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    rows = [measure() for _, measure in loading(weights, batches=SUITE.batches[1:]).cells(NO_STEPS)]
    assert [row["seconds"]["median"] for row in rows] == [2.0, 3.0]
    assert [row["baseline_seconds"]["median"] for row in rows] == [4.0, 4.0]
    assert [row["ratio"]["median"] for row in rows] == [0.5, 0.75]
    assert [row["saving_percent"] for row in rows] == [50.0, 25.0]


def test_flops_and_ideal_ratio_are_those_of_the_funnel(run):
    """Counted by hand for the tiny model: 5, 3 and 8 tokens become 3, 2 and 4 rows; windows of 4 tokens each side."""
    linear = 2 * 24 * 8 * (4 + 2 * 2 + 4) + 6 * 24 * 40  # FLOPs per row: q, k, v, output; MLP
    pairs = {"full": 25 + 9 + 64, "sliding": 25 + 9 + (64 - 2 * (3 + 2 + 1))}  # 8 tokens: 12 pairs lie 5 or more apart
    pooled_pairs = {"full": 9 + 4 + 16, "sliding": 9 + 4 + (16 - 2)}  # rows 0 and 3 are 6 tokens apart
    kinds = ("sliding", "full", "sliding")

    def flops(layers: int) -> int:
        full_length = sum(16 * linear + 4 * 32 * pairs[kind] for kind in kinds[:layers])
        return full_length + sum(9 * linear + 4 * 32 * pooled_pairs[kind] for kind in kinds[layers:])

    for layers, row in zip((1, 2), run[0]["rows"], strict=False):
        assert row["baseline_flops"] == flops(3)
        assert row["ideal_ratio"] == pytest.approx(flops(layers) / flops(3))
        assert row["flops_per_second"] * row["seconds"]["median"] == pytest.approx(flops(layers))


def test_the_head_says_what_was_measured(run):
    options = run[0]["options"]
    assert options["model"].items() >= {"name": "tiny", "weights": "random", "dtype": "float32", "layers": 3}.items()
    assert options["batches"][0] == {
        "name": "3 sequences of 3 to 8 tokens, 16 in all: by hand",
        "source": "by hand",
        "sequences": 3,
        "tokens": 16,
        "shortest": 3,
        "median": 5.0,
        "longest": 8,
    }
    assert [batch["name"] for batch in options["batches"]] == [row["batch"]["name"] for row in run[0]["rows"][::2]]
    assert (options["repeats"], options["order"], options["backend"]) == (REPEATS, "A B B A", "auto")
    assert options["served_by"] == "cpu"
    assert json.loads(json.dumps(options)) == options


def test_padding_is_counted(run):
    """Without a funnel the 16 tokens fill 16 rows; with one they need 6 + 4 + 8, in a bucket of 24."""
    rows = run[0]["rows"]
    assert [row["baseline_padding_waste"] for row in rows] == [0, 0, 0, 0]  # the other 12 fill a bucket of 12
    assert [row["padding_waste"] for row in rows[:2]] == pytest.approx([1 / 3, 1 / 3])


def test_engines_share_weights_and_inputs_and_run_one_packed_call(run, weights):
    engines = run[1]
    assert [engine.funnel.strides for engine in engines] == 2 * [(), (1, 2), (1, 1, 2)]
    buffer = weights["embedding"].unsafe_buffer_pointer()
    warm = 2
    for lengths, (baseline, *funneled) in ((LENGTHS, engines[:3]), (EQUAL, engines[3:])):
        ids, offsets = baseline.inputs[0]
        np.testing.assert_array_equal(np.diff(offsets), lengths)
        assert len(set(ids.tolist())) > 4
        for engine in (baseline, *funneled):
            assert all(each[0] is ids and each[1] is offsets for each in engine.inputs)
            assert engine.stats()["batches"] == engine.stats()["calls"]
            assert engine.params["embedding"].unsafe_buffer_pointer() == buffer
        assert len(baseline.inputs) == warm + 2 * 2 * REPEATS
        assert [len(engine.inputs) for engine in funneled] == [warm + 2 * REPEATS] * 2


def test_a_compilation_while_timing_fails_the_cell(weights, monkeypatch):
    calls = itertools.count()

    class CompilingEngine(Engine):
        def embed(self, inputs: Any, *arguments: Any, **options: Any) -> np.ndarray:
            shape = next(calls) + 1
            jax.jit(lambda x: x * 3.25 + shape)(np.ones(shape, np.float32))
            return super().embed(inputs, *arguments, **options)

    monkeypatch.setattr(models, "Engine", CompilingEngine)
    results = Results(None, suite="latency", options={}, machine={})
    results.measure_all(itertools.islice(loading(weights).cells(NO_STEPS), 1))
    assert not results.rows
    (entry,) = results.content["errors"]
    assert "programs were compiled while timing" in entry["error"]


@pytest.mark.parametrize(
    ("funnel", "name"),
    [
        (FunnelConfig.after(0), "2:1 after 0"),
        (FunnelConfig(strides=(1, 1, 2, 1, 3)), "2:1 after 2, 3:1 after 4"),
        (FunnelConfig.after(2, pool_query_only=True, positions="mid"), "2:1 after 2, pool_query_only, positions mid"),
        (
            FunnelConfig.after(1, stride=4, pool="first", recovery="tile", recovery_site="after_norm"),
            "4:1 after 1, pool first, recovery tile, recovery_site after_norm",
        ),
    ],
)
def test_a_funnel_is_named_by_its_places_and_by_what_is_not_the_default(funnel, name):
    assert funnel_name(funnel) == name


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"funnels": (FunnelConfig((1, 1)),)}, ConfigError, r"strides=\(1, 1\) pool nothing"),
        ({"repeats": 0}, ConfigError, "repeats=0"),
        ({"funnels": (FunnelConfig.after(1), FunnelConfig.after(3))}, ConfigError, "after layer 2 at the latest"),
        ({"backend": "abacus"}, BackendUnavailable, "abacus"),
        ({"batches": (Batch(EQUAL), Batch(np.array([65], np.int32)))}, InputError, "65 tokens, more than the 64"),
    ],
)
def test_a_suite_that_cannot_run_is_refused_when_it_is_made(options, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(SUITE, **options)
