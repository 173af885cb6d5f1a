"""The scaling suite on engines whose clock says how long they take, and once on a real one from the command line."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from funnel_benchmarks import measure, models
from funnel_benchmarks.models import Model
from funnel_benchmarks.results import Results, read_results
from funnel_benchmarks.scaling import command, peak_memory
from funnel_benchmarks.scaling import suite as scaling
from funnel_benchmarks.scaling.slopes import growths
from funnel_benchmarks.scaling.suite import Suite, summary, work
from funnel_engine import FunnelConfig, HeadConfig
from funnel_engine.flops import forward_flops
from funnel_engine.weights import expected_shapes, random_weights
from funnel_kernels.errors import BackendUnavailable, ConfigError, InputError
from tiny_models import CONFIG

WEIGHTS = random_weights(CONFIG, HeadConfig(), "float32", seed=7)
MODEL = Model("tiny", "random", CONFIG, HeadConfig(), "float32", lambda backend: WEIGHTS)
REPEATS = 2


def make_suite(*axes, **options):
    given = {"model": MODEL, "axes": axes, "layer": 1, "most_tokens": 256, "backend": "auto", "repeats": REPEATS}
    return Suite(**(given | options))


@pytest.fixture
def engines(monkeypatch):
    """Engines on a clock of their own: a call takes a second for each layer, and half of it with a funnel."""
    clock = SimpleNamespace(now=0.0, made=[], calls=[])
    lock = threading.Lock()

    class ClockedEngine:
        def __init__(self, config, head, weights, *, funnel, backend, threads, max_batch_tokens):
            assert weights.keys() == expected_shapes(config, head).keys()
            self.config, self.funnel, self.threads, self.budget = config, funnel, threads, max_batch_tokens
            clock.made.append(self)

        def embed(self, inputs):
            with lock:
                clock.calls.append((self, np.diff(inputs[1]).tolist(), threading.get_ident(), inputs[0]))
                clock.now += self.config.num_layers / (2 if self.funnel.strides else 1)

    monkeypatch.setattr(scaling, "Engine", ClockedEngine)
    monkeypatch.setattr(peak_memory.gc, "collect", lambda: 0)  # which takes a while among all that tests have imported
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(scaling, "usable_cores", lambda: 4)
    return clock


def run(suite):
    results = Results(None, suite="scaling", options=suite.options(), machine={})
    steps = []
    results.measure_all(suite.cells(SimpleNamespace(advance=lambda: steps.append(1))))
    assert not results.content["errors"]
    return results, len(steps)


def test_both_engines_run_in_turns_on_the_same_ids(engines):
    results, steps = run(make_suite("tokens"))
    assert steps == 2 * (1 + REPEATS)
    assert [row["cell"] for row in results.rows] == [
        "tokens 128: 1 x 128 tokens, 3 layers",
        "tokens 256: 1 x 256 tokens, 3 layers",
    ]
    order = [call[0].funnel.total_stride for call in engines.calls[: len(engines.calls) // 2]]
    assert order == [1, 1, 2, 2] + [1, 2, 2, 1] * REPEATS  # two of each to compile and to warm up
    for row in results.rows:
        assert row["seconds"]["samples"] == [1.5] * 2 * REPEATS
        assert row["baseline_seconds"]["samples"] == [3.0] * 2 * REPEATS
    ids = [call[3] for call in engines.calls[: len(order)]]
    assert all(np.array_equal(each, ids[0]) for each in ids)
    assert len(set(ids[0].tolist())) > 50
    assert [call[1] for call in engines.calls] == [[128]] * len(order) + [[256]] * len(order)


def test_longer_sequences_than_the_model_s_raise_its_limit(engines):
    run(make_suite("tokens"))
    assert {engine.config.max_positions for engine in engines.made} == {128, 256}
    assert all(engine.budget == engine.config.max_positions for engine in engines.made)
    assert CONFIG.max_positions == 64


def test_rows_have_the_work_of_what_was_called(engines):
    results, _ = run(make_suite("batch", "engines"))
    config = CONFIG
    for row in results.rows:
        lengths = np.full(row["sequences"], row["tokens"], np.int32)
        calls = 2 if row["axis"] == "engines" else 1
        assert row["calls"] == calls
        assert row["flops"] == calls * forward_flops(config, FunnelConfig.after(1), lengths)
        assert row["baseline_flops"] == calls * forward_flops(config, FunnelConfig(), lengths)
        assert row["peak_memory_bytes"]["process"] >= row["peak_memory_bytes"]["before"] > 0
        assert (row["layers"], row["funnel"]) == (3, "2:1 after 1")


def test_shallower_models_have_their_funnel_in_proportion(engines):
    results, _ = run(make_suite("depth", layer=2))
    assert [(row["x"], row["layers"], row["funnel"]) for row in results.rows] == [
        (1, 1, "2:1 after 0"),
        (2, 2, "2:1 after 1"),
        (3, 3, "2:1 after 2"),
    ]
    assert [row["seconds"]["median"] for row in results.rows] == [0.5, 1.0, 1.5]
    assert [engine.config.layer_types for engine in engines.made[::2]] == [CONFIG.layer_types[:n] for n in (1, 2, 3)]


def test_threads_are_those_of_the_engine(engines):
    run(make_suite("threads", "batch"))
    assert [engine.threads for engine in engines.made] == [None] * 10 + [1, 1, 4, 4]


def test_two_engines_are_called_by_two_threads_and_one_twice(engines):
    results, _ = run(make_suite("engines"))
    assert [row["x"] for row in results.rows] == [1, 2]
    assert [row["baseline_seconds"]["median"] for row in results.rows] == [6.0, 6.0]  # the clock knows no parallel work
    assert len(engines.made) == 2 + 4
    assert {engine.budget for engine in engines.made} == {2 * 16}  # the whole batch runs at once
    alone, together = engines.made[0], engines.made[2:4]
    assert {call[2] for call in engines.calls if call[0] is alone} == {threading.get_ident()}
    counts = [sum(call[0] is engine for call in engines.calls) for engine in (alone, *together)]
    assert counts == [2 * (2 + 2 * REPEATS), 2 + 2 * REPEATS, 2 + 2 * REPEATS]
    assert threading.get_ident() not in {call[2] for call in engines.calls if call[0] in together}


def test_what_does_not_fit_is_left_out_and_smaller_sizes_are_measured(engines, monkeypatch):
    rows = {128: 10, 256: 1000}
    monkeypatch.setattr(scaling, "activation_bytes", lambda config, count: rows[count])
    monkeypatch.setattr(scaling, "available_bytes", lambda: 999)
    results, _ = run(make_suite("tokens"))
    assert [row["x"] for row in results.rows] == [128]
    (entry,) = results.content["left_out"]
    assert entry["cell"] == "tokens 256: 1 x 256 tokens, 3 layers"
    assert "activations need about 0.0 GB beside the weights, but 0.0 GB are available" in entry["reason"]


def test_threads_are_left_out_on_a_device(engines, monkeypatch):
    monkeypatch.setattr(scaling, "jax", SimpleNamespace(default_backend=lambda: "gpu"))
    results, _ = run(make_suite("threads", "engines"))
    assert [row["axis"] for row in results.rows] == ["engines"] * 2
    assert [entry["cell"].split(":")[0] for entry in results.content["left_out"]] == ["threads 1", "threads 4"]
    assert "this is a gpu" in results.content["left_out"][0]["reason"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": 3}, ConfigError, "after layer 2 at the latest"),
        ({"repeats": 0}, ConfigError, "repeats=0"),
        ({"backend": "abacus"}, BackendUnavailable, "abacus"),
    ],
)
def test_a_suite_that_cannot_run_is_refused_when_it_is_made(options, error, message):
    with pytest.raises(error, match=message):
        make_suite("tokens", **options)


def invoke(*arguments):
    return CliRunner().invoke(command.scaling, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A real run of one axis, and one that goes on with another: contents and outputs."""
    folder = tmp_path_factory.mktemp("scaling")
    file, plot = folder / "out.json", folder / "out.svg"
    arguments = ["--preset", "tiny", "--dtype", "float32", "--repeats", 1, "--most-tokens", 128, "--json", file]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "preset", lambda name: CONFIG)
        first = invoke(*arguments, "--axis", "depth")
        assert first.exit_code == 0, first.output
        begun = read_results(file)
        second = invoke(*arguments, "--axis", "depth", "--axis", "tokens", "--resume", "--plot", plot)
        assert second.exit_code == 0, second.output
        refused = invoke(*arguments, "--axis", "depth", "--resume", "--layer", 2)
    assert isinstance(refused.exception, InputError)
    assert "options.funnel.name was '2:1 after 1'" in str(refused.exception)
    assert plot.read_text().count('id="marks-') == 2 * 4
    return begun, first.output, read_results(file), second.output


def test_a_run_writes_rows_and_ends_with_exponents(resumed):
    begun, output, _, _ = resumed
    assert (begun["suite"], begun["complete"], begun["errors"]) == ("scaling", True, [])
    assert [row["x"] for row in begun["rows"]] == [1, 2, 3]
    assert all(f"\n{row['cell']}: with funnel " in output for row in begun["rows"])
    assert output.count("  [samples of a side: 2; 10") == 3
    assert sum(line.startswith("│ depth  ") for line in output.splitlines()) == 2
    assert all(row["seconds"]["median"] > 0 and len(row["seconds"]["samples"]) == 2 for row in begun["rows"])


def test_resuming_keeps_rows_and_measures_the_other_axis(resumed):
    begun, _, content, output = resumed
    assert content["rows"][:3] == begun["rows"]
    assert [(row["axis"], row["x"]) for row in content["rows"][3:]] == [("tokens", 128)]
    assert not any(f"\n{row['cell']}: " in output for row in begun["rows"])


def test_the_picture_has_a_panel_for_each_axis_with_points_and_work(resumed):
    content = resumed[2]
    (chart,) = Suite.section(content).plots
    assert [panel.label for panel in chart.panels] == ["tokens of one sequence", "layers"]
    depth = chart.panels[1]
    assert depth.log
    assert depth.log_values
    rows = [row for row in content["rows"] if row["axis"] == "depth"]
    series = {each.label: each for each in depth.series}
    assert len(series) == len(depth.series) == 4
    for prefix, name in (("", "with funnel"), ("baseline_", "no funnel")):
        medians = [1e3 * row[f"{prefix}seconds"]["median"] for row in rows]
        points, line = series[name], series[f"{name}: its work"]
        assert list(points.at) == list(line.at) == [1, 2, 3]
        assert [value["median"] for value in points.values] == pytest.approx(medians)
        flops = np.array([row[f"{prefix}flops"] for row in rows], float)
        assert line.values == pytest.approx(medians[-1] * flops / flops[-1])


def test_the_work_of_threads_is_divided_among_them(resumed):
    row = resumed[2]["rows"][0] | {"x": 4, "flops": 100, "baseline_flops": 200}
    assert work(row | {"axis": "threads"}, "baseline_") == 50
    assert work(row | {"axis": "engines"}, "") == 100


def test_the_section_has_exponents_and_all_figures(resumed):
    content = resumed[2]
    exponents, rows = Suite.section(content).tables
    names = [(row[0].text, row[0].below) for row in exponents.cells]
    assert names == [("depth", "with funnel"), ("depth", "no funnel")]
    assert [row[0].text for row in rows.cells] == [f"{row['axis']} {row['x']}" for row in content["rows"]]
    first, cells_of_first = content["rows"][0], rows.cells[0]
    assert cells_of_first[0].below == "2 x 8 tokens, 1 layers"
    assert cells_of_first[1].value == pytest.approx(1e3 * first["seconds"]["median"])
    assert cells_of_first[6].value == first["peak_memory_bytes"]["process"]


def test_the_summary_names_what_grows_faster_than_its_work(resumed):
    content = resumed[2]
    rows = [
        row
        | {"flops": 10**6 * row["x"], "baseline_flops": 10**6 * row["x"]}
        | {"seconds": {"median": float(row["x"] ** 2)}, "baseline_seconds": {"median": float(row["x"])}}
        for row in content["rows"][:3]
    ]
    assert summary(rows, list(growths(rows))) == (
        "A cost grows faster than its work along depth (with funnel). With the funnel, depth: latency grows with the "
        "power 2.00 of the size, its work with 1.00."
    )
    assert summary(rows[:2], []) == "2 sizes were measured, too few along one axis for an exponent."
    nothing = Suite.section(content | {"rows": []})
    assert (nothing.summary, nothing.plots, nothing.filled) == ("Nothing was measured.", [], [])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--preset", "gemma-9"], ConfigError, "choose one of gemma-2b"),
        (["--depth", "25"], ConfigError, "has 24 layers; take 1 to 24"),
        (["--layer", "24"], ConfigError, "after layer 23 at the latest"),
        (["--resume"], ConfigError, "--resume adds to the file of --json; name that file"),
        (["--json", "out.txt"], InputError, "must end in .json"),
        (["--plot", "out.gif"], InputError, "must end in .png"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(monkeypatch, arguments, error, message):
    monkeypatch.setattr(models, "random_weight", None)
    result = invoke(*arguments)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


@pytest.mark.parametrize("arguments", [["--axis", "height"], ["--most-tokens", "127"], ["--repeats", "0"]])
def test_what_click_knows_is_a_usage_error(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output
