"""Result files: whole after every cell, gone on with, and refused where they are not what they should be."""

import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from funnel_benchmarks import results as results_module
from funnel_benchmarks.json_lines import document
from funnel_benchmarks.measure import spread
from funnel_benchmarks.results import (
    SCHEMA,
    LeftOut,
    Results,
    differences,
    error_text,
    fewest_samples,
    figures,
    read_results,
)
from funnel_kernels.errors import FunnelError, InputError

MACHINE = {"cpu": "Imaginary 9000", "cores": 2, "devices": ["cpu"], "jax": "0.10.2"}
OPTIONS = {"model": {"name": "tiny"}, "repeats": 3, "lengths": (4, 8)}


def make(path, **changes):
    given = {"suite": "latency", "options": OPTIONS, "machine": MACHINE} | changes
    return Results(path, **given)


def cell(name, seconds=1.5):
    return name, lambda: {"seconds": spread([seconds, 2 * seconds])}


def refusing(error):
    def measure():
        raise error

    return measure


def lines_without_times(text):
    return re.sub(r"[0-9.]+ s", "T s", text).splitlines()


def saved(path):
    return json.loads(path.read_text())


@pytest.fixture
def file(tmp_path):
    """A result of the cells "a" and "b", with one that was left out and one that failed."""
    path = tmp_path / "old.json"
    make(path, facts={"command": "x"}).measure_all(
        [cell("a"), cell("b"), ("c", refusing(LeftOut("no GPU here"))), ("d", refusing(FunnelError("too hot")))]
    )
    return path


def test_a_file_has_every_field(file):
    content = saved(file)
    head = ["schema", "suite", "started", "options", "machine", "resumed", "command"]
    assert list(content) == [*head, "complete", "rows", "left_out", "errors"]
    assert (content["schema"], content["suite"], content["command"]) == (SCHEMA, "latency", "x")
    assert content["complete"] is True
    assert content["options"] == OPTIONS | {"lengths": [4, 8]}
    assert content["machine"] == MACHINE
    assert [row["cell"] for row in content["rows"]] == ["a", "b"]
    assert content["rows"][0]["seconds"] == {"low": 1.875, "median": 2.25, "high": 2.625, "samples": [1.5, 3.0]}
    assert content["rows"][0]["took_seconds"] >= 0
    assert content["left_out"] == [{"cell": "c", "reason": "no GPU here"}]
    assert content["errors"] == [{"cell": "d", "error": "FunnelError: too hot"}]
    assert read_results(file) == content


def test_a_row_is_a_line_of_numbers_of_six_digits(tmp_path):
    path = tmp_path / "new.json"
    figure = spread([0.123456789, 12345678.9])
    results = make(path)
    results.measure_all([(name, lambda: {"seconds": figure, "flops": 123456789, "share": 2 / 3}) for name in "ab"])
    lines = path.read_text().splitlines()
    (first, second) = (index for index, line in enumerate(lines) if line.startswith('{"cell"'))
    assert (lines[first - 1], second, lines[second + 1]) == ('"rows": [', first + 1, "],")
    assert len(lines) == len(saved(path)) + 5
    row = json.loads(lines[second])
    assert row.pop("took_seconds") >= 0
    figure = {"low": 3086420.0, "median": 6172840.0, "high": 9259260.0, "samples": [0.123457, 12345700.0]}
    assert row == {"cell": "b", "seconds": figure, "flops": 123456789, "share": 0.666667}
    assert results.rows[1]["share"] == 2 / 3
    assert saved(path) == read_results(path)


def test_the_files_of_this_project_can_be_read():
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    files = sorted(folder.glob("*/*.json"))
    assert files
    for file in files:
        content = read_results(file)
        assert document(content) == file.read_text()
        assert all(line.count('"cell"') < 2 for line in file.read_text().splitlines())
    for file in folder.glob("static-*.json"):
        table = json.loads(file.read_text())
        for _, targets in table["rows"]:
            assert {len(figures) for figures in targets.values()} == {len(table["columns"])}


def test_a_line_says_when_a_row_has_too_few_samples_to_be_quoted(tmp_path, capsys):
    def row(ours, baseline):
        return lambda: {"seconds": spread([1.0] * ours), "baseline_seconds": spread([2.0] * baseline)}

    results = make(tmp_path / "new.json", show=lambda row: row["cell"])
    results.measure_all([("a", row(10, 10)), ("b", row(10, 9)), ("c", row(2, 10)), ("d", lambda: {"bytes": 7})])
    assert capsys.readouterr().out.splitlines() == [
        "a",
        "b  [samples of a side: 9; 10 are needed to quote it]",
        "c  [samples of a side: 2; 10 are needed to quote it]",
        "d",
    ]
    assert [fewest_samples(row) for row in results.rows] == [10, 9, 2, None]


def test_the_file_is_whole_after_every_cell(tmp_path):
    path, seen = tmp_path / "new.json", []

    def looking():
        seen.append(saved(path) if path.exists() else None)
        return {}

    make(path).measure_all([(name, looking) for name in "abc"])
    assert seen[0] is None
    assert [[row["cell"] for row in content["rows"]] for content in seen[1:]] == [["a"], ["a", "b"]]
    assert not any(content["complete"] for content in seen[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]


def test_without_a_file_results_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = make(None)
    results.measure_all([cell("a")])
    assert results.content["complete"]
    assert not list(tmp_path.iterdir())


def test_an_old_file_is_replaced_by_the_first_row_and_not_before(file):
    old = file.read_text()

    def old_is_there():
        return {"old": file.read_text() == old}

    nothing = [("a", refusing(LeftOut("no"))), ("b", refusing(FunnelError("no")))]
    make(file, options={"other": 1}).measure_all(nothing)
    assert file.read_text() == old
    make(file, options={"other": 1}).measure_all([*nothing, ("c", old_is_there), ("d", old_is_there)])
    content = saved(file)
    assert [row["old"] for row in content["rows"]] == [True, False]
    assert content["options"] == {"other": 1}
    assert content["left_out"]


def test_going_on_measures_only_what_is_missing(file):
    before, ran, complete = saved(file), [], []

    def measured(name):
        return name, lambda: ran.append(name) or complete.append(saved(file)["complete"]) or {"again": name}

    later = MACHINE | {"jax": "0.11.0"}
    make(file, machine=later, resume=True).measure_all([measured(name) for name in "abcde"])
    content = read_results(file)
    assert ran == ["c", "d", "e"]
    assert complete == [True, False, False]  # the file is as it was until there is a new row
    assert content["rows"][:2] == before["rows"]
    assert [row["cell"] for row in content["rows"]] == list("abcde")
    assert (content["left_out"], content["errors"], content["complete"]) == ([], [], True)
    assert content["started"] == before["started"]
    assert content["machine"] == MACHINE
    assert [(run["machine"], run["rows"]) for run in content["resumed"]] == [(later, 2)]


def test_going_on_with_fewer_cells_keeps_the_rest(file):
    make(file, resume=True).measure_all([cell("c")])
    content = saved(file)
    assert [row["cell"] for row in content["rows"]] == ["a", "b", "c"]
    assert [entry["cell"] for entry in content["errors"]] == ["d"]


def test_going_on_without_a_file_begins_one(tmp_path):
    make(tmp_path / "new.json", resume=True).measure_all([cell("a")])
    assert saved(tmp_path / "new.json")["resumed"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "kernels"}, "suite was 'latency' and is 'kernels' now"),
        ({"options": OPTIONS | {"repeats": 5}}, "options.repeats was 3 and is 5 now"),
        ({"options": OPTIONS | {"model": {"name": "big"}}}, "options.model.name was 'tiny' and is 'big' now"),
        ({"options": OPTIONS | {"seed": 1}}, "options.seed was None and is 1 now"),
        ({"machine": MACHINE | {"cores": 64}}, "machine.cores was 2 and is 64 now"),
        ({"machine": MACHINE | {"cpu": "abacus"}}, "machine.cpu was 'Imaginary 9000' and is 'abacus' now"),
        ({"machine": MACHINE | {"devices": []}}, r"machine.devices was \['cpu'\] and is \[\] now"),
    ],
)
def test_a_file_of_another_kind_is_not_gone_on_with(file, changes, message):
    old = file.read_text()
    with pytest.raises(InputError, match=rf"old\.json cannot be resumed: {message}; .* write to another file"):
        make(file, resume=True, **changes)
    assert file.read_text() == old


def test_a_file_that_is_cut_short_is_not_gone_on_with(file):
    for length in (0, 1, 50, len(file.read_text()) - 3):
        cut = file.read_text()[:length]
        broken = file.with_name("cut.json")
        broken.write_text(cut)
        with pytest.raises(InputError, match=r"cut\.json is cut short or is not JSON .*again, without --resume"):
            make(broken, resume=True)
        assert broken.read_text() == cut


def test_a_run_that_is_killed_goes_on_where_it_stopped(tmp_path):
    """The second cell is killed while it measures; the next run has the first one's row and measures the others."""
    script = textwrap.dedent("""
        import os, pathlib, signal, sys
        from funnel_benchmarks.results import Results

        def measure(name):
            if name == sys.argv[2]:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"process": os.getpid()}

        results = Results(pathlib.Path(sys.argv[1]), suite="s", options={}, machine={}, resume=True)
        results.measure_all([(name, lambda name=name: measure(name)) for name in "abc"])
    """)
    path = tmp_path / "killed.json"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, str(path)]
    killed = subprocess.run([*command, "b"], capture_output=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    content = read_results(path)
    assert ([row["cell"] for row in content["rows"]], content["complete"]) == (["a"], False)
    subprocess.run([*command, ""], check=True, capture_output=True, env=environment)
    again = read_results(path)
    assert ([row["cell"] for row in again["rows"]], again["complete"]) == (["a", "b", "c"], True)
    assert again["rows"][0] == content["rows"][0]
    assert again["rows"][1]["process"] != content["rows"][0]["process"]


def test_what_cannot_be_written_or_read_again_fails_its_cell_only(tmp_path, capsys):
    path = tmp_path / "new.json"
    bad = [{"x": float("nan")}, {"x": {1, 2}}, {"seconds": spread([0.0, 1.0])}, {"seconds": {"samples": []}}]
    make(path).measure_all([*((f"bad {index}", lambda row=row: row) for index, row in enumerate(bad)), cell("good")])
    content = read_results(path)
    assert [row["cell"] for row in content["rows"]] == ["good"]
    assert [entry["cell"] for entry in content["errors"]] == [f"bad {index}" for index in range(4)]


def test_a_wrong_result_or_an_error_is_a_failure():
    for cells, failed in (
        ([cell("a")], False),
        ([("a", lambda: {"passed": True}), ("b", refusing(LeftOut("no")))], False),
        ([cell("a"), ("b", lambda: {"passed": False})], True),
        ([cell("a"), ("b", refusing(FunnelError("no")))], True),
    ):
        results = make(None)
        results.measure_all(cells)
        assert results.failed is failed


def test_a_mistake_is_shown_with_its_place_and_a_refusal_in_one_line(capsys):
    make(None).measure_all([("a", lambda: [][1]), ("b", refusing(FunnelError("too\nhot")))])
    output = capsys.readouterr()
    assert "in <lambda>" in output.err
    assert output.err.count("Traceback") == 1
    assert output.out.splitlines() == [
        "a: FAILED: IndexError: list index out of range",
        "b: FAILED: FunnelError: too hot",
    ]


def test_naming_cells_may_fail_and_those_named_are_measured(capsys):
    def cells():
        yield cell("a")
        raise ValueError("between\ncells")

    results = make(None)
    results.measure_all(cells())
    assert [row["cell"] for row in results.rows] == ["a"]
    assert results.content["errors"] == [{"cell": "the rest of the suite", "error": "ValueError: between cells"}]


def test_two_cells_of_one_name_are_refused_before_any_is_measured():
    results = make(None)
    with pytest.raises(ValueError, match="two cells are called 'a'"):
        results.measure_all([cell("a"), cell("b"), cell("a")])
    assert not results.rows


def test_elsewhere_than_on_a_terminal_there_is_a_line_for_each_cell(capsys):
    cells = [("a", dict), ("[b]", lambda: {"passed": False}), ("c", refusing(LeftOut("no GPU")))]
    expected = ["a: T s", "[b]: T s, WRONG", "c: left out: no GPU"]
    make(None).measure_all(cells)
    assert lines_without_times(capsys.readouterr().out) == expected
    screen = io.StringIO()
    make(None, console=Console(file=screen)).measure_all(cells)
    assert lines_without_times(screen.getvalue()) == expected
    make(None, show=lambda row: f"<{row['cell']}>").measure_all(cells[:1])
    assert capsys.readouterr().out == "<a>\n"


def test_on_a_terminal_the_run_shows_how_far_it_is():
    screen = io.StringIO()
    results = make(None, console=Console(file=screen, force_terminal=True, width=100))
    results.measure_all([("the first", lambda: results.advance() or {}), ("the second", dict)], steps=2)
    assert "time left" in screen.getvalue()
    assert "the first: " in screen.getvalue()


def test_progress_counts_steps_and_finished_cells(monkeypatch):
    """Four cells of five steps: a cell that tells of fewer counts as whole when the next one begins."""
    bars, done = [], []
    monkeypatch.setattr(
        results_module, "Progress", lambda *args, **options: bars.append(Progress(*args, **options)) or bars[0]
    )
    results = make(None)

    def cell(steps):
        done.append(bars[0].tasks[0].completed)
        for _ in range(steps):
            results.advance()
        return {}

    results.measure_all([(str(steps), partial(cell, steps)) for steps in (5, 2, 0, 1)], steps=5)
    (task,) = bars[0].tasks
    assert (done, task.completed, task.total) == ([0, 5, 10, 15], 16, 20)


def change(content, place, value):
    changed = copy.deepcopy(content)
    *outer, last = place
    inner = changed
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return changed


ROW = {"cell": "a", "seconds": spread([1.0, 2.0])}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["schema"], 2, "schema is 2"),
        (["schema"], None, "schema is None"),
        (["suite"], 3, "suite is not a text"),
        (["started"], None, "started is not a text"),
        (["options"], [], "options is not an object"),
        (["machine"], "AMD", "machine is not an object"),
        (["resumed"], {}, "resumed is not a list"),
        (["resumed"], [{"started": "now"}], r"resumed\[0\].machine is not an object"),
        (["complete"], 1, "complete is not true or false"),
        (["rows"], {}, "rows is not a list"),
        (["rows"], [ROW, []], r"rows\[1\] is not an object"),
        (["rows"], [ROW, {}], r"rows\[1\].cell is not a text"),
        (["rows"], [ROW, ROW], "cell 'a' is there twice"),
        (["left_out", 0, "reason"], 5, r"left_out\[0\].reason is not a text"),
        (["errors"], [{"cell": "d"}], r"errors\[0\].error is not a text"),
        (["rows", 0, "seconds", "samples"], "1 2", "the samples of seconds of cell 'a' is not a list"),
        (["rows", 0, "seconds", "samples"], [], "seconds of cell 'a' has no samples"),
        (["rows", 0, "seconds", "samples", 1], "2", "seconds of cell 'a' contains '2'; it must be a number above 0"),
        (["rows", 0, "seconds", "samples", 1], True, "contains True"),
        (["rows", 0, "seconds", "samples", 1], -1.0, "contains -1.0"),
        (["rows", 0, "seconds", "median"], None, "contains None"),
        (["rows", 0, "peer"], {"inner": {"samples": [0]}}, "peer.inner of cell 'a' contains None"),
        (["rows", 0, "seconds", "samples", 0], 10**400, "contains 1000"),
        (["rows", 0, "note"], float("nan"), "it contains NaN"),
        (["rows", 0, "note"], float("-inf"), "it contains -Infinity"),
    ],
)
def test_a_file_with_wrong_content_is_refused_with_place_and_remedy(file, place, value, message):
    file.write_text(json.dumps(change(saved(file), place, value)))
    with pytest.raises(InputError, match=rf"old\.json is not a result file of schema 3: .*{message}.*measure again"):
        read_results(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "it is not an object"),
        (b'{"schema": 1e999}', "it contains 1e999, which is too large"),
        (b"\xff{}", "codec can't decode"),
        (b"[" * 100_000 + b"]" * 100_000, "recursion"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, content, message):
    (tmp_path / "odd.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"odd\.json is not a result file of schema 3: .*{message}"):
        read_results(tmp_path / "odd.json")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*missing\.json: No such file or directory; name a file"):
        read_results(tmp_path / "missing.json")
    with pytest.raises(InputError, match="Is a directory"):
        read_results(tmp_path)


def test_figures_are_found_wherever_they_are():
    row = {
        "cell": "a",
        "seconds": {"samples": [1]},
        "ratio": {"low": 1},
        "peer": {"memory": {"bytes": {"samples": [2]}}},
    }
    assert list(figures(row)) == [("seconds", {"samples": [1]}), ("peer.memory.bytes", {"samples": [2]})]


def test_differences_name_the_place():
    first = {"a": 1, "b": {"c": [1], "d": 2}, "gone": 0}
    second = {"a": 1, "b": {"c": [1, 2], "d": 2}, "new": {"x": 1}}
    assert list(differences(first, second)) == [("b.c", [1], [1, 2]), ("gone", 0, None), ("new", None, {"x": 1})]


def test_an_error_is_one_line():
    assert error_text(ValueError("a\n  b" + 1000 * "c")) == "ValueError: a b" + 497 * "c"
