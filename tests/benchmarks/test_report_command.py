"""`funnel bench report`: from a folder of result files to a page."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import funnel_benchmarks
from funnel_benchmarks.charts import Chart
from funnel_benchmarks.report import command
from funnel_benchmarks.report.command import report
from funnel_benchmarks.report.suites import SUITES
from funnel_benchmarks.suite import Section
from funnel_kernels.errors import ConfigError, InputError
from html_page import Page
from latency_results import make_result, with_other_rows


def run(*arguments: object):
    return CliRunner().invoke(report, [str(argument) for argument in arguments])


def changed(*path, value=None):
    """A result of the latency suite with another value at a place; None: with nothing there."""
    content = copy.deepcopy(make_result())
    *parents, last = path
    place = content
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


# Files that cannot be shown -> their content, and what is said about them.
BROKEN = {
    "cut.json": ('{"schema": 3, "su', "cut.json is cut short or is not JSON"),
    "old.json": (json.dumps(make_result() | {"schema": 2}), "old.json is not a result file of schema 3: schema is 2"),
    "list.json": ("[]", "list.json is not a result file of schema 3: it is not an object"),
    "binary.json": (b"\x80\x81", "binary.json is not a result file"),
    "other.json": (
        json.dumps(make_result() | {"suite": "<cpu>"}),
        "other.json is of suite '<cpu>', which the report does not know",
    ),
    **{
        name: (json.dumps(content), f"{name} does not contain what suite 'latency' writes ({reason}")
        for name, content, reason in (
            ("no-model.json", changed("options", "model"), "KeyError: 'model'"),
            ("no-ratio.json", changed("rows", 0, "ratio"), "KeyError: 'ratio'"),
            ("text.json", changed("rows", 1, "saving_percent", value="<b>"), "TypeError"),
            ("strides.json", changed("rows", 0, "funnel", "strides", value=[1, 1]), "StopIteration"),
            ("order.json", changed("rows", 2, "ratio", value={"low": 2, "median": 1, "high": 1.5}), "ValueError"),
            ("funnel.json", changed("rows", 0, "funnel", value=["2:1"]), "AttributeError"),
            ("option.json", changed("rows", 0, "funnel", "colour", value="red"), "TypeError"),
            ("batch.json", changed("options", "batches", value=7), "TypeError"),
            ("half.json", changed("rows", 0, "batch", "name", value="\ud800"), "UnicodeEncodeError"),
            ("control.json", changed("rows", 1, "funnel", "name", value="a\0b"), "ParseError"),
        )
    },
}


@pytest.fixture
def folder(tmp_path):
    """Two results that can be shown, and files of other kinds, which do not count."""
    (tmp_path / "a.json").write_text(json.dumps(make_result()))
    (tmp_path / "b.json").write_text(json.dumps(with_other_rows() | {"started": "2027-01-01T00:00:00Z"}))
    (tmp_path / "notes.txt").write_text("none")
    return tmp_path


def plain(content):
    """A section that takes no time to draw."""
    return Section(f"of {content['suite']}", "", [], [], (), {"Rows": str(len(content["rows"]))})


@pytest.fixture
def plainly(monkeypatch):
    """Shows all results plainly; of suites in this order."""
    monkeypatch.setattr(command, "SUITES", dict.fromkeys(("late", "latency", "early"), SimpleNamespace(section=plain)))


def test_all_results_are_on_one_page_with_the_names_of_their_files(folder, plainly):
    result = run(folder)
    assert (result.exit_code, result.output) == (0, f"{folder / 'report.html'}: 2 of 2 results\n")
    page = Page((folder / "report.html").read_text())
    assert len(page.all("article")) == 2
    _, first, second = page.text.split("of latency\n")[-3:]
    assert first.startswith("a.json; cpu; Imaginary 9000, 2 cores, 25.3 GB; 2026-01-02T03:04:05Z\n")
    assert second.startswith("b.json; cpu; Imaginary 9000, 2 cores, 25.3 GB; 2027-01-01T00:00:00Z\n")
    assert "Rows3\n" in first
    assert "Rows8\n" in second
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json", "notes.txt", "report.html"]


def test_the_page_is_written_where_output_says(folder, plainly, tmp_path_factory):
    output = tmp_path_factory.mktemp("elsewhere") / "page.html"
    assert run(folder, "--output", output).exit_code == 0
    assert output.read_text().startswith("<!DOCTYPE html>")
    assert not (folder / "report.html").exists()


def test_files_that_cannot_be_shown_are_a_line_each_and_the_others_are_shown(folder, monkeypatch):
    monkeypatch.setitem(command.SUITES, "plain", SimpleNamespace(section=plain))
    for name in "ab":
        (folder / f"{name}.json").write_text(json.dumps(make_result() | {"suite": "plain"}))
    for name, (content, _) in BROKEN.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run(folder)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == len(BROKEN)
    for line, name in zip(lines, sorted(BROKEN), strict=True):
        assert line.startswith("left out: ")
        assert BROKEN[name][1] in line
    assert result.stdout == f"{folder / 'report.html'}: 2 of {2 + len(BROKEN)} results\n"
    page = Page((folder / "report.html").read_text())
    assert len(page.all("article")) == 2
    assert not any(name in page.text for name in BROKEN)


def test_a_picture_that_cannot_be_drawn_leaves_out_its_file_only(folder, monkeypatch):
    def fail(self, look):
        raise RuntimeError(f"no ink in {look.inches}")

    class Broken(Chart):
        draw = fail

    broken = Section("title", "summary", [Broken("described", "caption", [])], [], (), {})
    sections = iter((broken, plain(make_result())))
    monkeypatch.setitem(command.SUITES, "latency", SimpleNamespace(section=lambda content: next(sections)))
    result = run(folder)
    assert result.exit_code == 1
    assert "a.json does not contain what suite 'latency' writes (RuntimeError: no ink" in result.stderr
    assert len(Page((folder / "report.html").read_text()).all("article")) == 1


def test_results_stand_in_the_order_of_the_suites(folder, plainly):
    (folder / "a.json").write_text(json.dumps(make_result() | {"suite": "early"}))
    (folder / "c.json").write_text(json.dumps(make_result() | {"suite": "late"}))
    assert run(folder).exit_code == 0
    page = Page((folder / "report.html").read_text())
    files = [page.text.rindex(f"{name}.json; cpu") for name in "cba"]
    assert files == sorted(files)
    assert [link["href"] for link in page.all("a")] == ["#result-3", "#result-2", "#result-1"]


def test_a_folder_without_results_is_refused_and_nothing_is_written(tmp_path):
    for content in (None, "{}"):
        if content is not None:
            (tmp_path / "empty.json").write_text(content)
        result = run(tmp_path)
        assert isinstance(result.exception, InputError)
        assert "has no result that can be shown" in str(result.exception)
        assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing is not a directory"),
        ([".", "--output", "page.txt"], "must end in .html or .md"),
        ([".", "--output", "missing/page.html"], "is not a directory; make it first"),
    ],
)
def test_bad_arguments_are_refused(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    result = run(*arguments)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_without_matplotlib_there_is_one_line_with_the_remedy(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run(folder)
    assert isinstance(result.exception, ConfigError)
    assert "pip install 'funnel-engine[bench]'" in str(result.exception)


def test_every_suite_is_in_the_report():
    package = Path(funnel_benchmarks.__file__).parent
    suites = {f"funnel_benchmarks.{path.parent.name}.suite" for path in package.glob("*/suite.py")}
    assert {suite.__module__ for suite in SUITES.values()} >= suites
    assert all(suite.name == name for name, suite in SUITES.items())
