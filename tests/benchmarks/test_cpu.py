"""`funnel_benchmarks.cpu`: the rows, and the command."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from funnel_benchmarks.cpu import __main__ as command
from funnel_benchmarks.cpu import bench as bench_module
from funnel_benchmarks.cpu import process_memory, rows
from funnel_benchmarks.cpu.bench import Bench, against, check_same, judged, speedup
from funnel_benchmarks.cpu.sizes import FULL, SMALL
from funnel_benchmarks.statistics import Spread
from funnel_engine import ConfigError, FunnelError
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.weights import count_parameters


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(SMALL, 1, tmp_path_factory.mktemp("bench"))


@pytest.fixture
def one_thread(monkeypatch):
    """Threads of OpenMP wait for each other actively, which takes long where other tests use the same cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def cell(bench, text):
    (measure,) = (measure for name, measure in rows.rows(bench) if text in name)
    return measure


@pytest.mark.parametrize("sizes", [FULL, SMALL])
def test_rows_have_names_of_their_own_without_commas(sizes, tmp_path):
    names = [name for name, _ in rows.rows(Bench(sizes, 1, tmp_path))]
    assert len(set(names)) == len(names)
    assert not any("," in name for name in names)  # which --only separates texts with
    assert not list(tmp_path.iterdir())  # nothing is made before it is measured


def test_the_full_models_have_their_published_sizes():
    assert read_model_config(FULL.models["gemma-2b"]).num_layers == 18
    four = read_model_config(FULL.models["gemma-2b x 4"])
    assert (four.num_layers, four.hidden_size, four.intermediate_size) == (4, 2048, 16384)
    assert all(read_model_config(fields).attention == "bidirectional" for fields in FULL.models.values())


@pytest.mark.parametrize("peer", ["oneDNN", "PyTorch's oneDNN"])
def test_product(bench, peer, one_thread):
    row = cell(bench, f"linear 32x64x128 bfloat16: {peer}")()
    assert row["goal"] == 0.98
    assert len(row["seconds"]["samples"]) == len(row["other_seconds"]["samples"]) == 2
    flops = 2 * 32 * 64 * 128
    assert row["gflops"] == pytest.approx(flops / row["seconds"]["median"] / 1e9)
    assert row["other_gflops"] == pytest.approx(flops / row["other_seconds"]["median"] / 1e9)
    assert row["measured"]["median"] == pytest.approx(row["gflops"] / row["other_gflops"])
    assert row["difference"] <= rows.PRODUCT_TOLERANCE["bfloat16"]
    assert row["peer"]["result"] == ("float32" if peer == "oneDNN" else "bfloat16")


def test_only_one_product_has_a_goal(bench):
    goals = [measure.args[-1] for name, measure in rows.rows(bench) if name.startswith("linear")]
    assert goals == [0.98, 0.98, None, None, None, None, None, None]


@pytest.mark.slow
@pytest.mark.parametrize(("order", "goal"), [("sorted", 1.5), ("unsorted", 2.5)])
def test_embedding(bench, order, goal, one_thread):
    row = cell(bench, f"gemma-2b x 4 6 conll: Hugging Face {order} eager")()
    lengths = SMALL.batches[1].lengths
    assert row["tokens"] == lengths.sum()
    assert row["goal"] == goal
    assert 0 < row["difference"] <= rows.VECTOR_TOLERANCE
    assert row["measured"]["median"] == pytest.approx(row["other_seconds"]["median"] / row["seconds"]["median"])
    assert row["peer"]["threads"] == 1


def test_threads(bench, monkeypatch):
    made = []
    whole_call = rows.whole_call
    monkeypatch.setattr(rows, "whole_call", lambda *of: made.append(of[1]) or whole_call(*of))
    row = cell(bench, "two against one")()
    assert [engine.threads for engine in made] == [1, 2]
    assert row["measured"]["median"] == pytest.approx(row["other_seconds"]["median"] / row["seconds"]["median"])


def test_two_engines_at_once(bench, monkeypatch):
    monkeypatch.setattr(rows, "engines", lambda *_: ["first", "second"])
    ran = []
    monkeypatch.setattr(rows, "whole_call", lambda bench, engine: lambda: ran.append(engine) or 1.0)
    row = rows.two_engines(bench)
    assert row["other_seconds"]["samples"] == [1.0, 1.0]
    assert sorted(ran) == 4 * ["first"] + 2 * ["second"]
    assert all(0 < seconds < 0.5 for seconds in row["seconds"]["samples"])  # half of the time that nothing takes


def test_memory_is_that_of_a_process_of_its_own(bench):
    row = cell(bench, "memory")()
    sizes = read_model_config(SMALL.models["gemma-2b"])
    norms = (2 * sizes.num_layers + 1) * sizes.hidden_size
    layer = 64 * (2 + 2 * 1) * 32 + 64 * 64 + 3 * 64 * 128
    parameters = 128 * 64 + 3 * layer + norms
    assert row["weights_gb"] == pytest.approx(2 * parameters / 1e9)
    assert 0.05 < row["peak_gb"]["imported"] <= row["peak_gb"]["loaded"] <= row["peak_gb"]["embedded"]
    assert row["measured"]["median"] == pytest.approx(row["peak_gb"]["embedded"] - row["weights_gb"])
    assert row["met"] == (row["measured"]["median"] <= 1.0)
    assert row["tokens"] == 128
    assert not (bench.folder / "gemma-2b source").exists()


def test_a_process_that_fails_is_an_error(bench, monkeypatch):
    monkeypatch.setattr(rows.process_memory, "__name__", "no_such_module")
    with pytest.raises(FunnelError, match=r"whose memory is measured failed: .*no_such_module"):
        rows.memory(bench)


def test_peak_bytes_are_read_from_the_status(tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t  99 kB\nVmHWM:\t   12 kB\nVmRSS:\t 5 kB\n")
    assert process_memory.peak_bytes(tmp_path / "status") == 12 * 1024
    assert process_memory.peak_bytes() > 2**20


def test_funnel(bench):
    row = cell(bench, "funnel after 2")()
    assert (row["funnel"]["name"], row["goal"], row["unit"]) == ("2:1 after 2", 0.97, "efficiency")
    assert row["batch"]["name"] == "2 x 32 tokens"
    for name, other in (("low", "high"), ("median", "median"), ("high", "low")):
        assert row["measured"][name] == pytest.approx(row["ideal_ratio"] / row["ratio"][other])
    model, weights = bench.whole
    assert sum(weight.size for name, weight in weights.items() if "norm" in name) == 7 * 64
    assert count_parameters({"embedding": weights["embedding"].shape}) == 128 * 64
    assert model.config.num_layers == 3


def test_against_alternates(monkeypatch):
    order = []

    class Other:
        facts = {"version": "1"}  # noqa: RUF012

        def sample(self):
            order.append("b")
            return 3.0

    monkeypatch.setattr(bench_module, "timed", lambda call: lambda: order.append(call()) or 2.0)
    row = against(lambda: "a", Other(), 2, 1.4)
    assert "".join(order) == "abbaabba"
    assert row["measured"] == {"low": 1.5, "median": 1.5, "high": 1.5}
    assert row["met"] is True
    assert row["peer"] == {"version": "1"}


def test_speedup_is_slow_over_fast():
    row = speedup([4.0, 6.0], [2.0, 2.0], 3.0)
    assert row["measured"] == {"low": 2.25, "median": 2.5, "high": 2.75}
    assert (row["unit"], row["met"]) == ("times", False)
    assert row["seconds"]["median"] == 2.0
    assert row["other_seconds"]["samples"] == [4.0, 6.0]


def test_goals():
    figure = Spread(0.9, 1.0, 1.1)
    assert judged("times", figure, 1.0)["met"] is True
    assert judged("times", figure, 1.01)["met"] is False
    assert judged("GB", figure, 1.01, at_most=True)["met"] is True
    assert judged("GB", figure, 0.99, at_most=True)["met"] is False
    assert judged("times", figure, None)["met"] is None


def test_results_must_agree():
    theirs = np.array([[3.0, 4.0], [0.0, 2.0]])
    ours = np.array([[3.0, 4.0], [0.1, 2.0]])
    assert check_same(ours, theirs, 0.06) == pytest.approx(0.05)
    with pytest.raises(FunnelError, match=r"differ by 0\.05 of their size, where 0\.04 may be"):
        check_same(ours, theirs, 0.04)
    with pytest.raises(FunnelError, match=r"\(1, 2\) where ours is \(2, 2\)"):
        check_same(theirs, theirs[:1], 1.0)
    with pytest.raises(FunnelError, match="differ by nan"):
        check_same(theirs * np.nan, theirs, 1.0)


def run(monkeypatch, tmp_path, cells, *options):
    monkeypatch.setattr(command, "rows", lambda bench: iter(cells))
    file = tmp_path / "cpu.json"
    done = CliRunner().invoke(command.main, ["--json", str(file), *options])
    return done, json.loads(file.read_text()) if file.exists() else None


FAST = {"seconds": {"median": 0.002}, "other_seconds": {"median": 3.0}} | judged("times", Spread(1.0, 1.5, 2.0), 1.2)
SLOW = judged("efficiency", Spread(0.7, 0.8, 0.9), 0.97)


def test_the_command_writes_and_shows_every_row(monkeypatch, tmp_path):
    cells = [("fast", lambda: FAST), ("slow", lambda: SLOW)]
    done, content = run(monkeypatch, tmp_path, cells, "--repeats", "3", "--small")
    assert done.exit_code == 0, done.output
    assert [row["cell"] for row in content["rows"]] == ["fast", "slow"]
    assert content["complete"]
    assert content["options"].items() >= {"small": True, "repeats": 3}.items()
    assert {"cpu", "cores", "jax", "torch", "transformers", "onednn-cpu-gomp"} <= set(content["machine"])
    shown = [" ".join(line.replace("│", " ").split()) for line in done.output.splitlines()]
    assert "fast 2.00 3,000.00 1.500 times 1.000 - 2.000 1.2" in shown
    assert "slow 0.800 efficiency 0.700 - 0.900 0.97 missed" in shown


def test_a_row_that_fails_is_written_down_and_the_next_is_measured(monkeypatch, tmp_path):
    def fails():
        raise FunnelError("something else")

    done, content = run(monkeypatch, tmp_path, [("bad", fails), ("fast", lambda: FAST)])
    assert done.exit_code == 1
    assert content["errors"] == [{"cell": "bad", "error": "FunnelError: something else"}]
    assert [row["cell"] for row in content["rows"]] == ["fast"]


def test_only_some_rows(monkeypatch, tmp_path):
    cells = [(name, lambda: FAST) for name in ("one a", "two b", "three ab")]
    _, content = run(monkeypatch, tmp_path, cells, "--only", "two, three")
    assert [row["cell"] for row in content["rows"]] == ["two b", "three ab"]


def test_a_row_that_there_is_not(monkeypatch, tmp_path):
    done, content = run(monkeypatch, tmp_path, [("one", lambda: FAST)], "--only", "one,four")
    assert done.exit_code == 1
    assert "--only 'one,four': no row's name contains 'four'; the rows are\n  one" in done.output
    assert content is None
    with pytest.raises(ConfigError):
        command.chosen([], "x")


def test_a_file_of_another_kind_is_refused(tmp_path):
    done = CliRunner().invoke(command.main, ["--json", str(tmp_path / "cpu.txt")])
    assert done.exit_code == 1
    assert ".json" in done.output
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_not_installed_has_no_version():
    assert command.version_of("no-such-package") is None
    assert command.version_of("click").startswith("8.")
