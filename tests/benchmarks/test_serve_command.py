"""`funnel bench serve` from the command line to the report, once with a tiny engine. Nothing here asserts a time."""

import copy

import pytest
from click.testing import CliRunner

from funnel_benchmarks import models
from funnel_benchmarks.measure import spread
from funnel_benchmarks.results import figures, read_results
from funnel_benchmarks.serve import command
from funnel_benchmarks.serve.suite import Suite
from funnel_benchmarks.suite import row_line
from funnel_kernels.errors import ConfigError, InputError
from tiny_models import CONFIG


def invoke(*arguments: object):
    return CliRunner().invoke(command.serve, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The content of a result file, and what the command printed."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "mine.txt").write_text("3\n5\n9\n")
    arguments = ["--preset", "tiny", "--dtype", "float32", "--lengths", folder / "mine.txt", "--requests", 12]
    arguments += ["--max-batch-tokens", 20, "--json", folder / "out.json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "preset", lambda name: CONFIG)
        first = invoke(*arguments, "--plot", folder / "out.png")
        assert first.exit_code == 0, first.output
        content = read_results(folder / "out.json")
        again = invoke(*arguments, "--resume")
    assert again.exit_code == 0, again.output
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder) not in (folder / "out.json").read_text()
    return content, first.output, read_results(folder / "out.json"), again.output


def test_a_run_writes_every_cell_and_prints_a_line_for_each(run):
    content, output, _, _ = run
    assert (content["suite"], content["complete"], content["errors"]) == ("serve", True, [])
    assert content["options"]["funnel"]["name"] == "2:1 after 1"
    assert len(content["rows"]) + len(content["left_out"]) == 10
    online = [row for row in content["rows"] if "latency" in row]
    assert len(online) >= 6
    for row in online:
        assert len(row["latency"]["samples"]) == 12
        assert 0 < row["busy"] <= 1
        assert f"\n{row['cell']}: arrivals/s " in output
    assert [name for row in content["rows"] for name, _ in figures(row)].count("latency") == len(online)


def test_a_line_tells_how_long_the_next_ones_will_take(run):
    row = {"baseline_seconds": spread([100.0]), "baseline_requests_per_second": 10.0, "requests_per_second": 20.0}
    row |= {"cell": "conll: offline", "lengths": "conll"}
    assert row_line(Suite.section, run[0], row) == (
        "conll: offline: with funnel 20.0 requests/s, without 10.0 requests/s, ratio 2.00, rows take 200, 125, 105; "
        "100, 62, 53 s"
    )
    heads = dict(Suite.section(run[0] | {"rows": [row]}).tables[0].heads)
    assert heads["rows take"] == "s, at 50, 80, 95 % without; with"


def test_resuming_measures_no_row_again(run):
    content, _, resumed, output = run
    assert resumed["rows"] == content["rows"]
    assert not any(f"\n{row['cell']}: " in output for row in content["rows"])


def test_the_picture_has_a_line_for_each_engine_and_percentile(run):
    content = run[0]
    (chart,) = Suite.section(content).plots
    (panel,) = chart.panels
    lines = {series.label: series for series in panel.series}
    for engine in ("no funnel", "2:1 after 1"):
        rows = [row for row in content["rows"] if row.get("engine") == engine]
        rows.sort(key=lambda row: row["arrivals_per_second"])
        for percentile, of in (("p50", ""), ("p99", " of 12")):
            line = lines.pop(f"{engine}, {percentile}{of}")
            assert line.at == [row["arrivals_per_second"] for row in rows]
            assert line.values == pytest.approx([1e3 * row[percentile] for row in rows])
    assert not lines
    offline = content["rows"][0]
    rates = offline["baseline_requests_per_second"], offline["requests_per_second"]
    assert panel.marked == [(rates[0], "ideal"), (rates[1], "measured")]
    assert (panel.log_values, panel.title) == (True, "mine.txt")


def test_the_section_says_what_both_engines_do_at_one_rate(run):
    content = copy.deepcopy(run[0])
    offline = content["rows"][0]
    offline["baseline_requests_per_second"], offline["requests_per_second"] = 40.0, 60.0
    for row in content["rows"]:
        if (row.get("share"), row.get("share_of")) == (80, "no funnel"):
            row["arrivals_per_second"] = 32.0
            row["p99"] = 0.5 if row["engine"] == "no funnel" else 0.125
    said = Suite.section(content)
    assert said.summary == (
        "mine.txt: 60.0 requests a second with the funnel, 40.0 without; at 32.0 arrivals a second p99 of 12 is 125 ms "
        "with it, 500 ms without."
    )
    rates, latencies = said.tables
    assert [cell.text for cell in rates.cells[0][:4]] == ["mine.txt", "60.0", "40.0", "1.50"]
    assert len(latencies.rows) == len(content["rows"]) - 1
    assert ("p99 of 12", "ms") in latencies.heads
    assert "32.0" in [row[1].text for row in latencies.cells]


def test_of_nothing_the_section_says_so(run):
    content = run[0] | {"rows": []}
    said = Suite.section(content)
    assert (said.summary, said.plots, said.filled) == ("Nothing was measured.", [], [])
    only_offline = Suite.section(content | {"rows": run[0]["rows"][:1]})
    assert only_offline.plots == []
    assert "arrivals" not in only_offline.summary


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--preset", "gemma-9"], ConfigError, "choose one of gemma-2b"),
        (["--depth", "25"], ConfigError, "has 24 layers; take 1 to 24"),
        (["--depth", "4", "--layer", "4"], ConfigError, "after layer 3 at the latest"),
        (["--lengths", "novels"], InputError, "conll, sst2"),
        (["--max-batch-tokens", "100"], InputError, "a batch holds only 100; raise --max-batch-tokens"),
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


def test_no_requests_are_a_usage_error():
    result = invoke("--requests", 0)
    assert result.exit_code == 2
    assert "--requests" in result.output
