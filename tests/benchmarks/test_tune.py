"""`tune`: candidates are held against another backend and timed in turns; the table keeps what is not measured."""

import json
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from funnel_benchmarks import tune
from funnel_benchmarks.statistics import Spread
from funnel_kernels import tuning
from funnel_kernels.errors import BackendUnavailable
from option_grid import target

H100 = target("triton")
ROW_CANDIDATES = tune.row_candidates


@pytest.fixture
def small(monkeypatch):
    """A GPU that Triton's interpreter stands for, and problems that it runs in a second."""
    monkeypatch.setattr(tune, "local_target", lambda backend: H100)
    monkeypatch.setattr(tune, "row_candidates", lambda width: ROW_CANDIDATES(width)[::8])
    monkeypatch.setattr(tune, "TOKENS", 32)
    monkeypatch.setattr(tune, "LENGTH", 16)
    monkeypatch.setattr(tune, "ROWS", 64)
    monkeypatch.setattr(tune, "ROUNDS", 2)
    monkeypatch.setattr(tune, "SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(tune, "ATTENTION_SIZES", {"float32": ((16, 32), (16,), (4,), (1,))})
    monkeypatch.setattr(tune, "static_problems", lambda problem: {})  # which needs Triton's compiler


@pytest.mark.parametrize(
    "make",
    [
        lambda: tune.attention_problem(32, "float32", H100),
        lambda: tune.pool_problem(512, "float32", H100),
        lambda: tune.recover_problem(512, "float32", H100),
    ],
    ids=["attention", "pool_norm", "recover_norm"],
)
def test_every_candidate_of_a_problem_is_timed_and_the_fastest_comes_first(small, make):
    problem, advanced = make(), []
    timings = tune.measure(problem, lambda: advanced.append(1))
    assert len(advanced) == len(timings) == len(problem.candidates) >= 2
    assert {timing.sizes for timing in timings} == set(problem.candidates)
    medians = [timing.seconds.median for timing in timings]
    assert medians == sorted(medians)
    found = tune.entry(problem, timings)
    assert found["sizes"] == timings[0].sizes._asdict()
    assert found["microseconds"] == round(1e6 * medians[0], 2)
    assert found["candidates"] == len(timings)


def problem_of(make):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(64), jnp.float32)
    candidates = [("right",), ("wrong",), ("not a number",), ("too large",)]
    key = tuning.Key("pool_norm", 64, "float32")

    def op(x, *, target):
        return x, 2 * x

    def kernel(x, *, target, sizes):
        return make(sizes)(x)

    return tune.Problem(key, "64", (x,), op, kernel, {}, candidates, lambda sizes: None, H100)


def test_candidates_that_are_wrong_or_do_not_compile_are_dropped_with_the_reason(small):
    def make(sizes):
        def run(x):
            if sizes == ("too large",):
                raise RuntimeError("out of resource: shared memory\nRequired: 999")
            factor = {"right": 2, "wrong": 2.1, "not a number": float("nan")}[sizes[0]]
            return x, factor * x

        return run

    best, *others = tune.measure(problem_of(make), lambda: None)
    assert best.sizes == ("right",)
    assert [other.seconds for other in others] == [None] * 3
    assert [other.problem for other in others] == [
        "is wrong: relative error 5.0e-02",
        "is wrong: relative error inf",
        "does not run: out of resource: shared memory",
    ]


def test_what_is_refused_by_the_compiler_never_runs(small, monkeypatch):
    def make(sizes):
        assert sizes == ("right",)
        return lambda x: (x, 2 * x)

    refused = {(name,): "spills 48 bytes" for name in ("wrong", "not a number", "too large")}
    monkeypatch.setattr(tune, "static_problems", lambda problem: refused)
    advanced = []
    best, *others = tune.measure(problem_of(make), lambda: advanced.append(1))
    assert best.sizes == ("right",)
    assert {other.sizes: other.problem for other in others} == refused
    assert len(advanced) == 4


def test_what_does_not_fit_hoppers_shared_memory_is_no_candidate(monkeypatch):
    monkeypatch.setattr(tune, "TOKENS", 32)
    candidates = tune.attention_problem(256, "bfloat16", H100).candidates
    assert len(candidates) == 18  # of 36
    assert (128, 64, 8, 2) in candidates
    assert (128, 64, 8, 3) not in candidates


SPILLS = """
from funnel_benchmarks import static_gpu, tune
from funnel_kernels import Target

tune.TOKENS = 32
static_gpu.compile_all = lambda work, jobs: {(it.name, gpu): static_gpu.compile_for(gpu, it) for gpu, it in work}
problem = tune.attention_problem(256, "bfloat16", Target("triton", "gpu", "NVIDIA H100", "9.0"))
chosen = [sizes for sizes in problem.candidates if sizes in ((128, 32, 4, 2), (64, 32, 8, 2))]
print(tune.static_problems(problem._replace(candidates=chosen)))
"""


@pytest.mark.slow
def test_what_spills_registers_is_found_without_running_it():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SPILLS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    spilling = r"\{Sizes\(block_q=128, block_k=32, warps=4, stages=2\): 'spills \d+ bytes'\}"
    assert re.fullmatch(spilling, done.stdout.strip()), done.stdout


def test_if_no_candidate_is_right_nothing_is_written(small, tmp_path):
    problem = problem_of(lambda sizes: lambda x: (x, 3 * x))
    with pytest.raises(
        BackendUnavailable, match="pool_norm 64 float32: no candidate runs and is right; the first is wr"
    ):
        tune.tune(problem, tmp_path / "table.json")
    assert not list(tmp_path.iterdir())


def test_an_entry_replaces_the_one_with_its_key_and_keeps_the_others(tmp_path):
    file = tmp_path / "table.json"
    entries = [
        {"op": op, "width": width, "dtype": "float32", "sizes": {"block_rows": rows, "warps": 4}, "microseconds": 1.0}
        for op, width, rows in [
            ("recover_norm", 64, 1),
            ("pool_norm", 64, 2),
            ("pool_norm", 128, 3),
            ("pool_norm", 64, 4),
        ]
    ]
    for one in entries:
        tune.merge(file, one, "NVIDIA H200")
    table = json.loads(file.read_text())
    assert table["device"] == "NVIDIA H200"
    assert set(table["versions"]) == set(tune.PACKAGES)
    assert [(one["op"], one["width"], one["sizes"]["block_rows"]) for one in table["entries"]] == [
        ("pool_norm", 64, 4),
        ("pool_norm", 128, 3),
        ("recover_norm", 64, 1),
    ]
    tuning.read_table.cache_clear()
    assert tuning.read_table(file)[tuning.Key("pool_norm", 128, "float32")] == {"block_rows": 3, "warps": 4}


def test_every_preset_and_dtype_has_its_problems_with_candidates():
    keys = [key for key, _ in tune.problems(H100)]
    assert len(set(keys)) == len(keys)
    assert {key.width for key in keys if key.op == "attention"} == {64, 128, 256}
    for key in keys:
        if key.op != "attention":
            assert len(tune.row_candidates(key.width)) >= 5
            assert tuning.Key("attention", 256, key.dtype) in keys


def test_the_command_tunes_what_it_is_asked_for(small, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "TUNED", tmp_path / "tuned")
    done = CliRunner().invoke(tune.main, ["--op", "pool_norm", "--width", "1024", "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    (file,) = (tmp_path / "tuned").iterdir()
    (one,) = json.loads(file.read_text())["entries"]
    assert (one["op"], one["width"], one["dtype"]) == ("pool_norm", 1024, "float32")
    assert done.output.startswith("pool_norm 1024 float32: block_rows ")


def test_without_a_gpu_there_is_nothing_to_tune(tmp_path):
    done = CliRunner().invoke(tune.main, ["--table", str(tmp_path / "table.json")])
    assert done.exit_code == 1
    assert "nothing to tune: JAX runs on cpu; on a machine with an NVIDIA GPU" in done.output
    assert not list(tmp_path.iterdir())


def test_a_table_that_cannot_be_written_is_refused_before_anything_is_measured(small, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    done = CliRunner().invoke(tune.main, ["--table", str(tmp_path / "nowhere" / "table.json")])
    assert done.exit_code == 1
    assert "is not a directory; make it first" in done.output


def test_microseconds_are_rounded_to_hundredths():
    assert tune.microseconds(tune.Timing((), Spread(0.0, 1.23456e-5, 1.0), "")) == 12.35
