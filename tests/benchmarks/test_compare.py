"""`funnel bench compare`: verdicts, what else differs, and the exit status."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from funnel_benchmarks.compare import compare_results, judge
from funnel_benchmarks.measure import spread
from funnel_benchmarks.results import Results, read_results
from funnel_benchmarks.statistics import Spread
from funnel_engine.cli import main

MACHINE = {"cpu": "Imaginary 9000", "cores": 2, "devices": ["cpu"], "jax": "0.10.2", "revision": "abc"}
FACTORS = {"slow": 1.5, "fast": 0.5, "even": 1.0, "noisy": 1.0}
NOISE = {"slow": 0.01, "fast": 0.01, "even": 0.005, "noisy": 0.5}


def samples(name, factor, seed):
    return list(factor * np.random.default_rng(seed).lognormal(sigma=NOISE[name], size=20))


def write(path, factors, seed, **changes):
    """A result with a cell of each name, whose seconds are around its factor."""
    given = {"suite": "latency", "options": {"repeats": 10}, "machine": MACHINE} | changes
    results = Results(path, **given)
    cells = {name: {"seconds": spread(samples(name, factor, seed))} for name, factor in factors.items()}
    results.measure_all([(name, lambda row=row: row) for name, row in cells.items()])
    return path


def run(*arguments):
    result = CliRunner().invoke(main, ["bench", "compare", *(str(argument) for argument in arguments)])
    return result.exit_code, [" ".join(re.sub("[│┃]", " ", line).split()) for line in result.output.splitlines()]


@pytest.fixture
def before(tmp_path):
    return write(tmp_path / "before.json", dict.fromkeys(FACTORS, 1.0), seed=1)


def test_each_figure_has_its_verdict(before, tmp_path):
    after = write(tmp_path / "after.json", FACTORS, seed=2)
    status, lines = run(before, after)
    assert status == 1
    assert lines[-1] == "1 slower, 1 faster, 1 unclear, 1 same; threshold 5 %"
    verdicts = dict(line.split(": seconds ") for line in lines if ": seconds" in line)
    assert {name: text.split()[-1] for name, text in verdicts.items()} == {
        "slow": "slower",
        "fast": "faster",
        "even": "same",
        "noisy": "unclear",
    }
    (slow, *_) = compare_results(read_results(before), read_results(after), 0.05)
    medians = [np.median(samples("slow", factor, seed)) for factor, seed in ((1.0, 1), (1.5, 2))]
    assert (slow.first, slow.second) == pytest.approx(tuple(medians), rel=1e-5)
    assert slow.ratio.median == pytest.approx(medians[1] / medians[0], rel=1e-5)
    low, middle, high = (f"{bound:.3f}" for bound in slow.ratio)
    assert verdicts["slow"] == f"{medians[0]:.4g} {medians[1]:.4g} {middle} {low} - {high} slower"


def test_the_threshold_decides(before, tmp_path):
    after = write(tmp_path / "after.json", {"slow": 1.5}, seed=2)
    assert run(before, after, "--threshold", 0.6)[0] == 0
    assert run(after, before, "--threshold", 0.2)[0] == 0  # faster is no failure
    assert run(before, after, "--threshold", 0.2)[0] == 1


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((1.051, 1.2), "slower"),
        ((1.05, 1.2), "unclear"),
        ((0.5, 0.949), "faster"),
        ((0.5, 0.95), "unclear"),
        ((0.95, 1.05), "same"),
        ((1.01, 1.04), "same"),
        ((0.949, 1.0), "unclear"),
        ((1.0, 1.051), "unclear"),
        ((0.5, 2.0), "unclear"),
    ],
)
def test_a_verdict_depends_on_where_the_whole_interval_lies(interval, verdict):
    low, high = interval
    assert judge(Spread(low, (low + high) / 2, high), 0.05) == verdict


def test_figures_of_one_file_only_are_listed(before, tmp_path):
    after = write(tmp_path / "after.json", {"even": 1.0, "slow": 1.0}, seed=2)
    _, lines = run(before, after)
    assert lines[:2] == ["only in A: fast: seconds", "only in A: noisy: seconds"]
    assert sum(": seconds" in line for line in lines) == 4
    _, lines = run(after, before)
    assert lines[:2] == ["only in B: fast: seconds", "only in B: noisy: seconds"]


def test_another_machine_or_other_options_are_warned_about_and_versions_are_shown(before, tmp_path):
    machine = MACHINE | {"cores": 64, "jax": "0.11.0", "revision": "def", "devices": ["cpu", "cpu"]}
    after = write(tmp_path / "after.json", {"even": 1.0}, seed=2, machine=machine, options={"repeats": 3})
    content = json.loads(after.read_text()) | {"complete": False}
    after.write_text(json.dumps(content))
    status, lines = run(before, after)
    assert status == 0
    assert lines[:6] == [
        "warning: B is not complete: its run was stopped",
        "warning: options.repeats: 10 in A, 3 in B",
        "warning: machine.cores: 2 in A, 64 in B",
        "warning: machine.devices: cpu in A, cpu, cpu in B",
        "machine.jax: 0.10.2 in A, 0.11.0 in B",
        "machine.revision: abc in A, def in B",
    ]
    assert lines[6].startswith("only in A: ")


def test_all_revisions_of_a_file_that_was_gone_on_with_are_shown(before, tmp_path):
    after = write(tmp_path / "after.json", {"even": 1.0}, seed=2)
    write(after, {"even": 1.0, "slow": 1.0}, seed=2, machine=MACHINE | {"revision": "def"}, resume=True)
    _, lines = run(before, after)
    assert lines[0] == "machine.revision: abc in A, abc and def in B"


def test_equal_circumstances_are_not_mentioned(before):
    _, lines = run(before, before)
    assert "figure" in lines[1]
    assert "warning" not in " ".join(lines)


def test_names_are_shown_as_they_are(before, tmp_path):
    content = json.loads(before.read_text())
    content["rows"] = [content["rows"][0] | {"cell": "[red]a[/]"}]
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps(content))
    assert any(line.startswith("[red]a[/]: seconds") for line in run(odd, odd)[1])


def test_what_cannot_be_compared_is_exit_status_2(before, tmp_path):
    other = write(tmp_path / "other.json", {"even": 1.0}, seed=1, suite="kernels")
    without = write(tmp_path / "without.json", {}, seed=1)
    (tmp_path / "cut.json").write_text(before.read_text()[:99])
    for arguments, message in (
        ([before], "Missing argument 'B.json'"),
        ([before, tmp_path / "missing.json"], "cannot read"),
        ([before, tmp_path / "cut.json"], "cut.json is cut short"),
        ([before, other], "suite 'latency' cannot be compared with 'kernels'; give two results of one suite"),
        ([before, without], "the two results have no figure in common; compare two runs of the same cells"),
        ([before, before, "--threshold", "-0.1"], "--threshold -0.1 must be at least 0 and below 1"),
        ([before, before, "--threshold", "1"], "--threshold 1.0 must be at least 0 and below 1"),
        ([before, before, "--threshold", "nan"], "--threshold nan must be at least 0"),
    ):
        status, lines = run(*arguments)
        assert status == 2
        assert message in lines[-1]
