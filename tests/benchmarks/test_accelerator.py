"""`funnel_benchmarks.accelerator`: the command, on the CPU with small sizes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from funnel_benchmarks.accelerator.__main__ import chosen_parts, main
from funnel_benchmarks.accelerator.bench import Bench
from funnel_benchmarks.accelerator.clock import Clock
from funnel_benchmarks.accelerator.parts import PARTS
from funnel_benchmarks.accelerator.sizes import FULL, SMALL
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_engine.packing import make_plan, row_buckets

ROOTS = ("kernels", "engine", "benchmarks")
REPOSITORY = Path(__file__).resolve().parents[2]

# Only JAX, what JAX cannot do without, and this project can be found.
BLOCKER = """
import sys

allowed = {"numpy", "scipy", "jax", "jaxlib", "ml_dtypes", "opt_einsum", "triton", "jax_triton"}
allowed |= {"funnel_kernels", "funnel_engine", "funnel_benchmarks"} | sys.stdlib_module_names

class Finder:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in allowed or root.startswith("_"):
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Finder, sys.meta_path)
"""


def command(folder, *arguments):
    return [sys.executable, "-m", "funnel_benchmarks.accelerator", "--out", str(folder), *arguments]


def read(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


@pytest.fixture
def bench():
    return Bench(SMALL, "xla", 3, Clock(9.0, time.monotonic()))


@pytest.mark.slow
def test_every_part_runs_where_only_jax_is_installed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    out = tmp_path / "results"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *(str(REPOSITORY / root) for root in ROOTS)])
    run = subprocess.run(
        command(out, "--small", "--backend", "xla", "--seed", "11"),
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    tables = {part: read(out, part) for part in PARTS}
    for part, table in tables.items():
        assert (table["suite"], table["complete"], table["errors"]) == (f"accelerator {part}", True, [])
        assert table["command"].startswith("python -m funnel_benchmarks.accelerator --out results --small")
        assert str(tmp_path) not in json.dumps(table)
        assert table["machine"]["devices"] == ["cpu"]
        assert table["options"] == {"small": True, "seed": 11, "backend": "xla"}
    measured = {part: len(table["rows"]) for part, table in tables.items()}
    assert measured == {
        "check": 11, "ceilings": 2, "attention": 11, "rows": 10, "engine": 3, "funnel": 4, "peer": 0, "latency": 1,
        "ragged": 2, "flags": 0,
    }  # fmt: skip
    assert {entry["reason"] for entry in tables["peer"]["left_out"]} == {"torch is not installed"}
    assert {entry["reason"] for entry in tables["flags"]["left_out"]} == {"not a GPU: JAX runs on cpu"}
    assert all(row["peer_error"] for row in tables["attention"]["rows"] if row["kind"] == "dense")
    assert all(row["error"] <= row["limit"] for row in tables["check"]["rows"])
    assert sum(row["error"] > 0 for row in tables["check"]["rows"]) > 8  # a single key's value is exact
    report = (out / "report.md").read_text()
    assert report in run.stdout
    assert "torch is not installed" in report
    assert report.count("needs matplotlib") == 3
    assert not list(out.glob("*.png"))


def test_only_some_parts_run_and_others_stay(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--small", "--backend", "xla"]
    assert main([*arguments, "--only", "ceilings"]) == 0
    first = read(tmp_path, "ceilings")
    assert main([*arguments, "--only", "latency"]) == 0
    assert read(tmp_path, "ceilings") == first
    assert {file.name for file in tmp_path.iterdir()} == {
        "ceilings.json", "latency.json", "report.md", "results.tar.gz",
    }  # fmt: skip
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert archive.getnames() == ["ceilings.json", "latency.json", "report.md"]
    report = (tmp_path / "report.md").read_text()
    assert "## What the device can do" in report
    assert "one sequence of 16 tokens" in report
    matrix, copy = first["rows"]
    assert matrix["tflops_per_second"] == pytest.approx(2 * 256**3 / matrix["seconds"]["median"] / 1e12)
    assert copy["gb_per_second"] == pytest.approx(2 * 2**20 / copy["seconds"]["median"] / 1e9)
    assert len(matrix["seconds"]["samples"]) == 2 * SMALL.repeats


def test_parts_run_in_order_of_importance():
    assert chosen_parts(None) == list(PARTS)
    assert chosen_parts("peer, check") == ["check", "peer"]
    assert next(iter(PARTS)) == "check"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "check,speed"], r"--only 'check,speed': there is no part 'speed'; choose from check,ceilings,"),
        (["--backend", "abacus"], "backend 'abacus' does not exist in this build"),
        (["--minutes", "-1"], "--minutes -1.0 must not be negative"),
        (["--minutes", "nan"], "--minutes nan must not be negative"),
        (["--report"], "--report: .* holds no tables"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, capsys, arguments, message):
    assert main(["--out", str(tmp_path), *arguments]) == 2
    assert re.search(f"^error: {message}", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert "cannot be made a folder: File exists; choose another" in capsys.readouterr().err


def test_a_foreign_file_is_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "engine.json").write_text('{"schema": 999, "suite": "engine"}')
    assert main(["--out", str(tmp_path), "--small", "--only", "ceilings"]) == 2
    assert "engine.json is not a result file of schema 3: schema is 999" in capsys.readouterr().err
    assert not (tmp_path / "ceilings.json").exists()


def test_without_time_every_cell_is_listed_as_left_out(tmp_path, capsys, bench):
    assert main(["--out", str(tmp_path), "--small", "--minutes", "0", "--seed", "3"]) == 0
    left_out = [entry for part in PARTS for entry in read(tmp_path, part)["left_out"]]
    assert [entry["cell"] for entry in left_out] == [name for cells in PARTS.values() for name, _ in cells(bench)]
    assert {entry["reason"] for entry in left_out} == {"not measured: out of time"}
    assert not any(read(tmp_path, part)["rows"] for part in PARTS)


def test_what_raises_is_written_down_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    def cells(bench):
        yield "first", lambda: {"batch": "1 x 1"}
        yield "second", lambda: [][1]
        yield "third", lambda: {"batch": "1 x 1"}
        raise ValueError("between\ncells")

    monkeypatch.setitem(PARTS, "funnel", cells)
    monkeypatch.setattr("funnel_benchmarks.accelerator.__main__.write_report", lambda folder, tables: "")
    monkeypatch.setattr("funnel_benchmarks.accelerator.__main__.write_plots", lambda folder, tables: None)
    assert main(["--out", str(tmp_path), "--small", "--only", "funnel,flags"]) == 1
    table = read(tmp_path, "funnel")
    assert [row["cell"] for row in table["rows"]] == ["first", "third"]
    assert table["errors"] == [
        {"cell": "second", "error": "IndexError: list index out of range"},
        {"cell": "the rest of the suite", "error": "ValueError: between cells"},
    ]
    assert read(tmp_path, "flags")["complete"]


def test_a_wrong_result_fails_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PARTS, "check", lambda bench: iter([("one", lambda: WRONG)]))
    assert main(["--out", str(tmp_path), "--small", "--only", "check"]) == 1
    assert "1 wrong results" in capsys.readouterr().out


WRONG = {
    "op": "attention", "dtype": "float32", "precision": "highest", "error": 1.0, "limit": 1e-5,
    "same_bits_twice": True, "finite": True, "passed": False,
}  # fmt: skip


def test_a_killed_run_keeps_what_it_has_measured(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--small", "--backend", "xla", "--only", "rows"), stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    with process, contextlib.closing(process.stdout) as output:
        rows = [line for line in (output.readline() for _ in range(4)) if re.search(r": [0-9.]+ s\b", line)]
        process.send_signal(signal.SIGKILL)
    assert len(rows) == 2
    table = read(tmp_path, "rows")
    assert not table["complete"]
    assert [row["cell"] for row in table["rows"]][:2] == [re.search(r"(.*): [0-9.]+ s\b", row)[1] for row in rows]
    assert table["rows"][0]["seconds"]["median"] > 0


def test_a_terminated_run_packs_what_it_has_measured(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--small", "--backend", "xla", "--only", "rows"), stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    with process, contextlib.closing(process.stdout) as output:
        next(line for line in output if re.search(r": [0-9.]+ s\b", line))
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        table = json.load(archive.extractfile("rows.json"))
    assert table["rows"][0]["seconds"]["median"] > 0


# The sizes of a run on an accelerator, which no test can run.


def test_an_engine_runs_every_batch_in_one_call_without_padding():
    for sizes in (FULL, SMALL):
        assert row_buckets(make_plan(sizes.config, NO_FUNNEL), sizes.tokens)[-1] == sizes.tokens
        assert {sequences * tokens for sequences, tokens in sizes.batches} == {sizes.tokens}
        assert max(tokens for _, tokens in sizes.batches) <= sizes.config.max_positions
        assert all(sizes.tokens % length == 0 for length in (*sizes.attention_lengths, *sizes.strided_lengths))
        assert (sizes.ragged_longest + 1) / 2 == sizes.attention_lengths[0]


def test_every_cell_has_a_name_of_its_own():
    full = Bench(FULL, "auto", 0, Clock(0.0, 0.0))
    for part, cells in PARTS.items():
        names = [name for name, _ in cells(full)]
        assert len(set(names)) == len(names) > 0, part


def test_weights_are_random_and_a_layer_has_none_of_another(bench):
    weights = bench.weights
    first, second = (np.asarray(weights[f"layers.{index}.qkv"], np.float32) for index in range(2))
    assert 0.018 < first.std() < 0.022
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05
    assert bench.engine() is bench.engine(NO_FUNNEL)
