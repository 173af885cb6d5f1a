"""What all suites' commands share, where it does more than hand on: places of funnels, and the end of a run."""

import dataclasses

import pytest
from matplotlib.figure import Figure

from funnel_benchmarks.charts import Chart
from funnel_benchmarks.latency.command import REPEATS
from funnel_benchmarks.peers.command import peers
from funnel_benchmarks.results import ENOUGH_SAMPLES
from funnel_benchmarks.suite import Cell, Column, Section, Suite, Table, field, markdown, markdown_table
from funnel_benchmarks.suite_command import funnel_place, run
from funnel_kernels.errors import FunnelError
from tiny_models import CONFIG


class Made(Suite):
    """A suite of cells that measure as told; it may draw."""

    name = "made"

    def __init__(self, *measures):
        self.measures = measures

    def options(self):
        return {"count": 2}

    def cells(self, results):
        return [(f"cell {number}", measure) for number, measure in enumerate(self.measures)]

    @staticmethod
    def section(content):
        rows = content["rows"]
        columns = Column("row", lambda row: row["cell"]), Column("height", field("height", ".1f", 100), "cm", "of it")
        facts = {"Count": str(content["options"]["count"]), "Nothing": ""} | ({"Tallest": "3 m"} if rows else {})
        plots = [Drawn("described", "caption", rows)] if rows else []
        return Section("Heights", f"Measured: {len(rows)}.", plots, [Table("", columns, rows)], (), facts)


DRAWN = []


class Drawn(Chart):
    """Remembers which rows it was drawn of."""

    def draw(self, look):
        DRAWN.append([row["cell"] for row in self.panels])
        return Figure()


def row():
    return {"height": 3.0}


def failing():
    raise FunnelError("too hot")


@pytest.mark.parametrize(("given", "layers", "place"), [(None, 24, 4), (None, 3, 1), (0, 24, 0), (5, 6, 5)])
def test_a_funnel_comes_after_a_sixth_of_the_layers_unless_told_otherwise(given, layers, place):
    assert funnel_place(given, dataclasses.replace(CONFIG, layer_types=("full",) * layers)) == place


def test_a_run_tells_circumstances_rows_tables_and_findings_in_this_order(tmp_path, capsys):
    run(Made(row, row), json=tmp_path / "out.json")
    output = capsys.readouterr().out
    parts = (
        "Heights\n",
        "Count: 2\n",
        "Machine: ",
        "cell 0: height 300.0 cm\n",
        "cell 1: height 300.0 cm\n",
        "cm, of it",
        "│ cell 0",
        "│ cell 1",
        "Measured: 2.\n",
        "Tallest: 3 m\n",
        f"figures {tmp_path / 'out.json'}\n",
    )
    places = [output.index(part) for part in parts]
    assert places == sorted(places)
    assert output.count("Count: 2") == 1
    assert "Nothing" not in output


def test_an_older_file_that_stays_is_none_of_the_run_s(tmp_path, capsys):
    file = tmp_path / "out.json"
    file.write_text("old")
    with pytest.raises(SystemExit) as status:
        run(Made(failing), json=file)
    assert status.value.code == 1
    assert file.read_text() == "old"
    assert str(file) not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(Made(failing, row), json=file)
    assert str(file) in capsys.readouterr().out


def test_a_plot_is_of_all_results_in_the_format_of_its_name(tmp_path, capsys):
    for ending, begins in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        run(Made(row, row), plot=tmp_path / f"out{ending}")
        assert DRAWN.pop() == ["cell 0", "cell 1"]
        assert (tmp_path / f"out{ending}").read_bytes().startswith(begins)
        assert f"plot    {tmp_path / f'out{ending}'}\n" in capsys.readouterr().out


def test_the_same_table_in_markdown():
    section = Made.section({"options": {"count": 2}, "rows": [{"cell": "a|b"} | row(), {"cell": "c"}]})
    assert markdown_table(section.tables[0]).splitlines() == [
        "| row | height (cm, of it) |",
        "| --- | --- |",
        "| a\\|b | 300.0 |",
        "| c |  |",
    ]
    table = section.tables[0]
    table = table._replace(caption="All", columns=(*table.columns, Column("x", lambda row: Cell("1", "0 to 2"))))
    assert markdown_table(table).startswith("**All**\n\n| row | height (cm, of it) | x |")
    assert markdown_table(table).endswith("| c |  | 1 (0 to 2) |")
    text = markdown(section, further=["![a picture](a.png)"])
    parts = ["## Heights\n", "Measured: 2.\n", "| row |", "![a picture]", "- Count: 2\n- Tallest: 3 m\n"]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)


def test_suites_take_enough_samples_by_themselves():
    """A B B A gives two of each side. The sweep's `--quick` says that it takes fewer."""
    (repeats,) = [each for each in peers.params if each.name == "repeats"]
    assert 2 * min(repeats.default, REPEATS) >= ENOUGH_SAMPLES
