"""`funnel bench all`, `check` and `ceilings`, on the CPU with small sizes."""

import contextlib
import itertools
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
from click.testing import CliRunner

from funnel_benchmarks.device.bench import Bench
from funnel_benchmarks.device.clock import Clock
from funnel_benchmarks.device.command import chosen_parts
from funnel_benchmarks.device.parts import PARTS
from funnel_benchmarks.device.sizes import FULL, SMALL
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_engine.cli import main as funnel
from funnel_engine.packing import make_plan, row_buckets

ROOTS = ("kernels", "engine", "benchmarks")
REPOSITORY = Path(__file__).resolve().parents[2]

# Only JAX, click, rich, what they cannot do without, and this project can be found.
BLOCKER = """
import sys

allowed = {"numpy", "scipy", "jax", "jaxlib", "ml_dtypes", "opt_einsum", "triton", "jax_triton"}
allowed |= {"click", "rich", "markdown_it", "mdurl", "pygments"}
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
    return [sys.executable, "-m", "funnel_benchmarks.bench", "all", "--out", str(folder), *arguments]


def run(*arguments):
    return CliRunner().invoke(funnel, ["bench", *(str(argument) for argument in arguments)])


def read(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


@pytest.fixture
def bench():
    return Bench(SMALL, "xla", 3, Clock(9.0, time.monotonic()))


@pytest.mark.slow
def test_every_part_runs_where_only_jax_click_and_rich_are_installed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    out = tmp_path / "results"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *(str(REPOSITORY / root) for root in ROOTS)])
    ran = subprocess.run(
        command(out, "--small", "--backend", "xla", "--seed", "11"),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    tables = {part: read(out, part) for part in PARTS}
    for part, table in tables.items():
        assert (table["suite"], table["complete"], table["errors"]) == (f"device {part}", True, [])
        assert str(tmp_path) not in json.dumps(table)
        assert table["machine"]["devices"] == ["cpu"]
        assert table["options"].items() >= {"small": True, "seed": 11, "backend": "xla"}.items()
        assert set(table["options"]["served_by"].values()) == {"xla"}
    measured = {part: len(table["rows"]) for part, table in tables.items()}
    assert measured == {
        "check": 11,
        "ceilings": 2,
        "attention": 11,
        "rows": 10,
        "engine": 3,
        "funnel": 4,
        "peer": 0,
        "latency": 1,
        "ragged": 2,
        "flags": 0,
    }
    assert {entry["reason"] for entry in tables["peer"]["left_out"]} == {"torch is not installed"}
    assert {entry["reason"] for entry in tables["flags"]["left_out"]} == {"not a GPU: JAX runs on cpu"}
    assert all(row["peer_error"] for row in tables["attention"]["rows"] if row["kind"] == "dense")
    assert all(row["error"] <= row["limit"] for row in tables["check"]["rows"])
    assert sum(row["error"] > 0 for row in tables["check"]["rows"]) > 8  # a single key's value is exact
    report = (out / "report.md").read_text()
    assert "torch is not installed" in report
    assert report.count("needs matplotlib") == 3
    assert not list(out.glob("*.png"))


def test_only_some_parts_run_and_others_stay(tmp_path):
    arguments = ["all", "--out", tmp_path, "--small", "--backend", "xla"]
    assert run(*arguments, "--only", "ceilings").exit_code == 0
    first = read(tmp_path, "ceilings")
    result = run(*arguments, "--only", "latency")
    assert result.exit_code == 0, result.output
    assert f"archive {tmp_path / 'results.tar.gz'}\n" in result.output
    assert read(tmp_path, "ceilings") == first
    assert {file.name for file in tmp_path.iterdir()} == {
        "ceilings.json",
        "latency.json",
        "report.md",
        "results.tar.gz",
    }
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert archive.getnames() == ["ceilings.json", "latency.json", "report.md"]
    report = (tmp_path / "report.md").read_text()
    assert "## What the device can do" in report
    assert "one sequence of 16 tokens" in report
    matrix, copy = first["rows"]
    assert matrix["tflops_per_second"] == pytest.approx(2 * 256**3 / matrix["seconds"]["median"] / 1e12, rel=1e-5)
    assert copy["gb_per_second"] == pytest.approx(2 * 2**20 / copy["seconds"]["median"] / 1e9, rel=1e-4)
    assert len(matrix["seconds"]["samples"]) == 2 * SMALL.repeats


def test_checks_and_ceilings_have_commands_of_their_own(tmp_path):
    for part, minutes, rows, left_out in (("check", 0, 0, 11), ("ceilings", 0, 0, 2), ("ceilings", 9, 2, 0)):
        arguments = (part, "--small", "--backend", "xla", "--seed", 5, "--json", tmp_path / f"{part}.json", "--resume")
        result = run(*arguments, "--minutes", minutes)
        assert result.exit_code == 0, result.output
        table = read(tmp_path, part)
        assert (table["suite"], table["complete"]) == (f"device {part}", True)
        assert (len(table["rows"]), len(table["left_out"])) == (rows, left_out)


def test_the_engine_is_compared_with_the_matrix_product_in_the_same_folder(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(
        PARTS["engine"], "measurements", staticmethod(lambda bench: rates.append(bench.matrix_rate) or [])
    )
    for only in ("engine", "ceilings", "engine"):
        assert run("all", "--out", tmp_path, "--small", "--only", only).exit_code == 0
    assert rates == [None, read(tmp_path, "ceilings")["rows"][0]["tflops_per_second"]]


def test_parts_run_in_order_of_importance():
    assert chosen_parts(None) == list(PARTS)
    assert chosen_parts("peer, check") == ["check", "peer"]
    assert next(iter(PARTS)) == "check"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "check,speed"], r"--only 'check,speed': 'speed' is not a part; choose from check,ceilings,"),
        (["--backend", "abacus"], "backend 'abacus' does not exist in this build"),
        (["--minutes", "-1"], "--minutes -1.0 is not 0 or more; give the minutes"),
        (["--minutes", "nan"], "--minutes nan is not 0 or more"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, arguments, message):
    result = run("all", "--out", tmp_path, *arguments)
    assert result.exit_code == 2
    assert re.search(f"^Error: {message}", result.stderr)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("all", "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot be made a folder: File exists; choose another" in result.stderr


def test_a_foreign_file_is_refused_before_anything_is_measured(tmp_path):
    arguments = ("all", "--out", tmp_path, "--small", "--minutes", 0, "--only")
    (tmp_path / "engine.json").write_text('{"schema": 999, "suite": "engine"}')
    result = run(*arguments, "ceilings")
    assert result.exit_code == 2
    assert "engine.json is not a result file of schema 3: schema is 999" in result.stderr
    assert not (tmp_path / "ceilings.json").exists()
    (tmp_path / "engine.json").unlink()
    assert run(*arguments, "flags").exit_code == 0
    (tmp_path / "flags.json").rename(tmp_path / "rows.json")
    result = run(*arguments, "ceilings")
    assert result.exit_code == 2
    assert "rows.json is of suite 'device flags', not 'device rows'; remove it" in result.stderr


def test_without_time_every_cell_is_listed_as_left_out(tmp_path, bench):
    assert run("all", "--out", tmp_path, "--small", "--minutes", 0, "--seed", 3).exit_code == 0
    left_out = [entry for part in PARTS for entry in read(tmp_path, part)["left_out"]]
    assert [entry["cell"] for entry in left_out] == [
        name for part in PARTS.values() for name, _ in part.measurements(bench)
    ]
    assert {entry["reason"] for entry in left_out} == {"not measured: out of time"}
    assert not any(read(tmp_path, part)["rows"] for part in PARTS)


def test_what_raises_is_written_down_and_the_rest_goes_on(tmp_path, monkeypatch):
    def cells(bench):
        yield "first", lambda: {"tokens": 1}
        yield "second", lambda: [][1]
        yield "third", lambda: {"tokens": 1}
        raise ValueError("between\ncells")

    monkeypatch.setattr(PARTS["ragged"], "measurements", staticmethod(cells))
    assert run("all", "--out", tmp_path, "--small", "--only", "ragged,flags").exit_code == 1
    table = read(tmp_path, "ragged")
    assert [row["cell"] for row in table["rows"]] == ["first", "third"]
    assert table["errors"] == [
        {"cell": "second", "error": "IndexError: list index out of range"},
        {"cell": "the rest of the suite", "error": "ValueError: between cells"},
    ]
    assert read(tmp_path, "flags")["complete"]


def test_a_wrong_result_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(PARTS["check"], "measurements", staticmethod(lambda bench: iter([("one", lambda: WRONG)])))
    result = run("all", "--out", tmp_path, "--small", "--only", "check")
    assert result.exit_code == 1
    assert "Wrong results" in result.output
    assert "1 wrong results" in (tmp_path / "report.md").read_text()


WRONG = {
    "op": "attention",
    "dtype": "float32",
    "precision": "highest",
    "error": 1.0,
    "limit": 1e-5,
    "same_bits_twice": True,
    "finite": True,
    "passed": False,
}


MEASURED = re.compile(r"^(.*): time [0-9.,]+ us, ")


def test_a_killed_run_keeps_what_it_has_measured(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--small", "--backend", "xla", "--only", "rows"), stdout=subprocess.PIPE, text=True
    )
    with process, contextlib.closing(process.stdout) as output:
        rows = list(itertools.islice((line for line in output if MEASURED.search(line)), 2))
        process.send_signal(signal.SIGKILL)
    table = read(tmp_path, "rows")
    assert not table["complete"]
    assert [row["cell"] for row in table["rows"]][:2] == [MEASURED.search(row)[1] for row in rows]
    assert table["rows"][0]["seconds"]["median"] > 0


def test_a_terminated_run_packs_what_it_has_measured(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--small", "--backend", "xla", "--only", "rows"), stdout=subprocess.PIPE, text=True
    )
    with process, contextlib.closing(process.stdout) as output:
        next(line for line in output if MEASURED.search(line))
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
    for part, suite in PARTS.items():
        names = [name for name, _ in suite.measurements(full)]
        assert len(set(names)) == len(names) > 0, part


def test_weights_are_random_and_a_layer_has_none_of_another(bench):
    weights = bench.weights
    first, second = (np.asarray(weights[f"layers.{index}.qkv"], np.float32) for index in range(2))
    assert 0.018 < first.std() < 0.022
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05
    assert bench.engine() is bench.engine(NO_FUNNEL)
