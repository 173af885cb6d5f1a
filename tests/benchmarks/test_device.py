"""`funnel bench all`, `check` and `ceilings`, on the CPU with small sizes."""

import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from funnel_benchmarks.device import parts
from funnel_benchmarks.device.command import chosen_parts
from funnel_benchmarks.device.parts import FULL, PARTS, SMALL, Run
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_benchmarks.kernels import check
from funnel_benchmarks.kernels.cases import CUDNN
from funnel_benchmarks.report.suites import SUITES
from funnel_benchmarks.results import Results
from funnel_engine.cli import main as funnel
from funnel_engine.flops import forward_flops
from funnel_engine.packing import make_plan, row_buckets

ROOTS = ("kernels", "engine", "serving", "benchmarks")
REPOSITORY = Path(__file__).resolve().parents[2]

# Only JAX, click, rich, what they cannot do without, and this project can be found.
BLOCKER = """
import sys

allowed = {"numpy", "scipy", "jax", "jaxlib", "ml_dtypes", "opt_einsum", "triton", "jax_triton"}
allowed |= {"click", "rich", "markdown_it", "mdurl", "pygments"}
allowed |= {"funnel_kernels", "funnel_engine", "funnel_serving", "funnel_benchmarks"} | sys.stdlib_module_names

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


# Of each part of a rehearsal: those of the kernels suite have two ceilings, and attention its cuDNN.
CELLS = {"check": 11, "ceilings": 2, "attention": 2 + 9, "rows": 2 + 10, "engine": 2 + 2, "funnel": 2}
CELLS |= {"peer": 2, "latency": 3, "ragged": 2 + 2, "flags": 5}
RUN = Run(extent=SMALL, backend="xla", seed=3, until=math.inf)


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
    for table in tables.values():
        assert (table["complete"], table["errors"]) == (True, [])
        assert str(tmp_path) not in json.dumps(table)
        assert table["machine"]["devices"] == ["cpu"]
    assert tables["check"]["options"]["seed"] == 11
    assert {
        row["backend"] for part in ("check", "rows", "engine", "ragged") for row in tables[part]["rows"] if "op" in row
    } == {"xla"}
    measured = {part: len(table["rows"]) for part, table in tables.items()}
    assert measured == CELLS | {"attention": 2 + 7, "peer": 0, "latency": 1, "flags": 0}
    reasons = {part: {entry["reason"] for entry in table["left_out"]} for part, table in tables.items()}
    assert reasons["peer"] == {"torch is not installed: pip install 'funnel-engine[peers]'"}
    assert reasons["flags"] == {"not a GPU: JAX runs on cpu"}
    assert len(tables["attention"]["left_out"]) == 2
    assert all("cudnn" in reason.lower() for reason in reasons["attention"])
    assert all(row["error"] <= row["limit"] for row in tables["check"]["rows"])
    assert sum(row["error"] > 0 for row in tables["check"]["rows"]) > 8  # a single key's value is exact
    report = (out / "report.md").read_text()
    assert "torch is not installed" in report
    plots = sum(len(SUITES[table["suite"]].section(table).plots) for table in tables.values())
    assert report.count("needs matplotlib") == plots >= 5
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
    assert "## Kernels: what this machine can do at best" in report
    assert "one sequence of 16 tokens" in report
    matrix, copy = first["rows"]
    assert matrix["rate"] == pytest.approx(matrix["work"] / matrix["seconds"]["median"], rel=1e-5)
    assert copy["rate"] == pytest.approx(2 * 2**18 / copy["seconds"]["median"], rel=1e-4)
    assert len(matrix["seconds"]["samples"]) == 2 * SMALL.repeats


def test_checks_and_ceilings_have_commands_of_their_own(tmp_path):
    for part, minutes, rows, left_out in (("check", 0, 0, 11), ("ceilings", 0, 0, 2), ("ceilings", 9, 2, 0)):
        seed = ("--seed", 5) if part == "check" else ()
        result = run(part, "--small", *seed, "--json", tmp_path / f"{part}.json", "--resume", "--minutes", minutes)
        assert result.exit_code == 0, result.output
        table = read(tmp_path, part)
        assert (table["suite"], table["complete"]) == ({"ceilings": "kernels"}.get(part, part), True)
        assert (len(table["rows"]), len(table["left_out"])) == (rows, left_out)


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


def test_without_time_every_cell_is_listed_as_left_out(tmp_path):
    assert run("all", "--out", tmp_path, "--small", "--minutes", 0, "--seed", 3).exit_code == 0
    tables = {part: read(tmp_path, part) for part in PARTS}
    assert {part: len(table["left_out"]) for part, table in tables.items()} == CELLS | {
        "attention": 2 + 10  # by the best backend, and at one length by XLA
    }
    assert {entry["reason"] for table in tables.values() for entry in table["left_out"]} == {
        "not measured: out of time"
    }
    assert not any(table["rows"] for table in tables.values())


def test_a_part_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    def failing(run, json):
        results = Results(json, suite="check", options=run_options, machine={"devices": ["cpu"]})
        results.measure_all([("first", lambda: WRONG), ("second", lambda: [][1])])
        raise SystemExit(1)

    run_options = {"seed": 1, "backend": "xla"}
    monkeypatch.setitem(PARTS, "check", failing)
    assert run("all", "--out", tmp_path, "--small", "--only", "check,flags").exit_code == 1
    assert "1 wrong results, 1 measurements failed, 5 left out" in (tmp_path / "report.md").read_text()
    assert read(tmp_path, "flags")["complete"]


WRONG = {
    "op": "attention",
    "backend": "xla",
    "dtype": "float32",
    "precision": "highest",
    "error": 1.0,
    "limit": 1e-5,
    "same_bits_twice": True,
    "finite": True,
    "passed": False,
}


MEASURED = re.compile(r"^(.*): share [0-9.,]+, ")


def test_a_terminated_run_packs_what_it_has_measured(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--small", "--backend", "xla", "--only", "rows"), stdout=subprocess.PIPE, text=True
    )
    with process, contextlib.closing(process.stdout) as output:
        rows = list(itertools.islice((line for line in output if MEASURED.search(line)), 2))
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        table = json.load(archive.extractfile("rows.json"))
    assert not table["complete"]
    assert [row["cell"] for row in table["rows"]][2:4] == [MEASURED.search(row)[1] for row in rows]
    assert table["rows"][0]["seconds"]["median"] > 0


# The sizes of a run on an accelerator, which no test can run.


def test_an_engine_runs_every_batch_in_one_call_without_padding():
    for extent in (FULL, SMALL):
        config = Run(extent=extent, backend="xla", seed=0, until=0).model.config
        assert row_buckets(make_plan(config, NO_FUNNEL), extent.tokens)[-1] == extent.tokens
        assert {sequences * tokens for sequences, tokens in extent.batches} == {extent.tokens}
        assert max(tokens for _, tokens in extent.batches) <= config.max_positions
        assert all(extent.tokens % length == 0 for length in (*extent.lengths, *extent.strided))


def test_every_case_has_a_name_of_its_own():
    full = Run(extent=FULL, backend="cpu", seed=0, until=0)
    for make in (parts.attention_cases, parts.row_cases, parts.engine_cases, parts.ragged_cases):
        names = [(case.name, CUDNN in case.backends) for case in make(full)]
        assert len(set(names)) == len(names) >= 2


def test_attention_counts_the_pairs_that_are_seen():
    names = {case: case.name.removesuffix(", 4 heads of 32 on 1") for case in parts.attention_cases(RUN)}
    cases = {name.partition(" on ")[2]: case for case, name in names.items()}
    seen = sum(min(128, i + 9) - max(0, i - 8) for i in range(128)) * (SMALL.tokens // 128)
    assert cases["128 tokens with a window of 16"].flops == 4 * 32 * 4 * seen
    assert cases["stride 2 of 32 tokens"].flops == 4 * 32 * 4 * SMALL.tokens * 32 // 2
    for percent in SMALL.padding:
        dense = 4 * 32 * 4 * SMALL.tokens * 32
        assert cases[f"32 tokens with {percent} % padding"].flops / dense == pytest.approx(1 - percent / 100, abs=0.13)


def test_ragged_sequences_fill_the_batch_and_padding_is_no_work():
    for lengths in parts.ragged_lengths(SMALL.tokens, SMALL.lengths[0]).values():
        assert lengths.sum() == SMALL.tokens
        assert len(set(lengths.tolist())) > 3
    full, *padded = parts.engine_cases(RUN)
    conll, passage = parts.ragged_cases(RUN)
    assert full.flops == forward_flops(RUN.model.config, NO_FUNNEL, RUN.batch.lengths)
    for case, percent in zip(padded, SMALL.padding, strict=True):
        assert case.flops / full.flops == pytest.approx(1 - percent / 100, abs=0.01)
        assert np.asarray(case.make("xla")()).shape == (SMALL.tokens, 64)
    assert all(case.name.endswith("256 tokens") for case in (conll, passage))
    assert conll.make("xla").func.__self__ is full.make("xla").func.__self__  # one engine, and one program


def test_the_best_backend_that_serves_the_model_is_named(monkeypatch):
    run = Run(extent=SMALL, backend="auto", seed=0, until=0)
    monkeypatch.setattr(parts, "backends_here", lambda: ("triton", "xla"))
    assert run.served == "xla"  # there is no GPU here
    assert RUN.served == "xla"
    assert Run(extent=SMALL, backend="cpu", seed=0, until=0).served == "cpu"


def test_on_hopper_both_kernels_of_attention_are_measured_and_engines_have_the_default(monkeypatch):
    monkeypatch.setattr(parts, "runs_mosaic", lambda: True)
    monkeypatch.setattr(check, "runs_mosaic", lambda: True)
    run = Run(extent=SMALL, backend="auto", seed=0, until=0)
    assert run.served == "auto"
    backends = [case.backends for case in parts.attention_cases(run) if CUDNN not in case.backends]
    assert set(backends) == {("mosaic", "triton"), ("mosaic", "triton", "xla")}
    assert Run(extent=SMALL, backend="triton", seed=0, until=0).served == "triton"
    names = [name for name, _ in check.cells(check.make_check("auto", False, 0))]
    attention = [name for name in names if name.startswith("attention")]
    assert sum(", triton, bfloat16" in name for name in attention) * 4 == len(attention) == 44
    assert len(set(names)) == len(names)
