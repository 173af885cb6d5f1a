"""What the report says about a result of the latency suite, from one made by hand."""

import numpy as np

from funnel_benchmarks.latency.suite import Suite
from funnel_benchmarks.suite import row_line
from latency_results import BATCH, IDEALS, LAYERS, RATIOS, make_result, make_row, with_other_rows


def test_the_summary_begins_with_the_paper_s_figure_beside_ours():
    summary = Suite.section(make_result()).summary
    assert summary.startswith(
        "Saved, beside arXiv:2504.02877 (Gemma 2B on a TPU): 44.0 % after layer 2 (paper: 44 %); 2 x 512 tokens. "
    )
    assert summary.endswith(
        "2:1 after 2 saves 44.0 % of the latency (2 x 512 tokens), where 45.0 % would be ideal. "
        "Efficiency over all 3 rows: median 0.98, from 0.98 to 0.99."
    )


def test_the_title_tells_results_apart():
    result = make_result()
    title = "Latency with a funnel, and without: <tiny & co>, "
    assert Suite.section(result).title == f"{title}2 x 512 tokens"
    result["options"]["batches"] *= 3
    assert Suite.section(result).title == f"{title}3 batches"


def test_the_paper_is_named_once_for_all_batches():
    ratios = {"a": 0.6, "b": 0.7}
    rows = [make_row((1, 1, 2), ratio, 0.5) | {"batch": BATCH | {"name": name}} for name, ratio in ratios.items()]
    summary = Suite.section(make_result() | {"rows": rows}).summary
    ours = "40.0 % after layer 2 (paper: 44 %); a. 30.0 % after layer 2 (paper: 44 %); b. "
    assert summary.startswith(f"Saved, beside arXiv:2504.02877 (Gemma 2B on a TPU): {ours}2:1 after 2 saves 40.0 %")
    other = make_result()
    other["options"]["model"]["layers"] = 24
    assert Suite.section(other).summary.startswith("2:1 after 2 saves 44.0 %")


def test_the_table_has_every_figure_of_every_row():
    (table,) = Suite.section(make_result()).tables
    names = [name for name, _ in table.heads]
    assert names[:7] == ["funnel", "ratio", "ideal", "efficiency", "saving", "latency", "baseline"]
    assert names[7:] == ["tokens/s", "GFLOP/s", "padding", "compiling"]
    assert [row[0].text for row in table.cells] == [f"2:1 after {layer}" for layer in LAYERS]
    first = table.cells[0]
    assert [cell.text for cell in first[1:]] == [
        "0.560",
        "0.550",
        "0.982",
        "44.0",
        "112.0",
        "200.0",
        "9,143",
        "333.0",
        "1.3",
        "1.7",
    ]
    below = {name: cell.below for name, cell in zip(names, first, strict=True) if cell.below}
    assert below == {
        "funnel": "2 x 512 tokens",
        "ratio": "0.540 \u2013 0.610",
        "latency": "106.4 \u2013 123.2",
        "baseline": "198.0 \u2013 203.0",
    }
    values = [cell.value for cell in first[1:]]
    np.testing.assert_allclose(values, [0.56, 0.55, 0.55 / 0.56, 44, 112, 200, 1024 / 0.112, 333, 1.3, 1.7])
    assert first[0].value is None


def test_a_row_is_told_in_one_line_with_the_same_figures():
    result = make_result()
    assert row_line(Suite.section, result, result["rows"][0]) == (
        "2:1 after 2; 2 x 512 tokens: ratio 0.560, ideal 0.550, efficiency 0.982, saving 44.0 %, latency 112.0 ms, "
        "baseline 200.0 ms, tokens/s 9,143, GFLOP/s 333.0, padding 1.3 %, compiling 1.7 s"
    )


def test_one_picture_has_ratios_and_savings_of_rows_like_the_first():
    picture = Suite.section(with_other_rows()).plots[0]
    assert picture.caption.endswith("2 x 512 tokens; max pooling, recovery none")
    ratios, savings = picture.panels
    for panel, measured, ideal in ((ratios, RATIOS, IDEALS), (savings, [44, 27, 10], [45, 28, 12])):
        assert [series.label for series in panel.series] == ["measured (quartiles)", "ideal (FLOPs)"]
        assert all(list(series.at) == list(LAYERS) for series in panel.series)
        values = [getattr(value, "get", {"median": value}.get)("median") for value in panel.series[0].values]
        np.testing.assert_allclose(values, measured)
        np.testing.assert_allclose(panel.series[1].values, ideal)
    low, high = ratios.series[0].values[0]["low"], ratios.series[0].values[0]["high"]
    assert (low, high) == (RATIOS[0] - 0.02, RATIOS[0] + 0.05)
    assert (ratios.references, "2:1" in savings.label) == ({"no funnel": 1.0}, True)
    text = " ".join(picture.facts)
    for part in ("<tiny & co>", "18 layers of width 512", "bfloat16", "2 x 512 tokens", "Imaginary 9000", "2 cores"):
        assert part in text


def test_the_other_has_the_efficiency_of_every_row_with_its_range():
    content = with_other_rows()
    (panel,) = Suite.section(content).plots[1].panels
    assert panel.rows == list(dict.fromkeys(row["funnel"]["name"] for row in content["rows"]))
    seen = {}
    for series in panel.series:
        for place, value in zip(series.at, series.values, strict=True):
            seen[panel.rows[place], series.label] = tuple(value.values())
    assert seen.keys() == {(row["funnel"]["name"], row["batch"]["name"]) for row in content["rows"]}
    for row in content["rows"]:
        bounds = [row["ideal_ratio"] / row["ratio"][bound] for bound in ("high", "median", "low")]
        np.testing.assert_allclose(seen[row["funnel"]["name"], row["batch"]["name"]], bounds)
    looks = {(series.marker, series.hollow) for series in panel.series}
    assert len(looks) == len(panel.series) > 1


def test_the_circumstances_are_those_of_the_suite():
    facts = Suite.section(make_result()).facts
    assert facts["Model"].startswith("<tiny & co>: 18 layers of width 512, 69 M parameters (random), bfloat16")
    assert facts["Method"] == "2 times A B B A per row, medians of 4 runs; random token ids, seed 0"
    assert facts["Backend"] == "auto, served by xla"
    assert facts["Padding without a funnel"] == "at most 0.4 % of rows"
    assert facts["Compiling beforehand"] == "7.6 s in all"
    assert facts["Peak memory"] == "process 0.78 GB"


def test_of_nothing_measured_there_is_nothing_to_show():
    empty = Suite.section(make_result() | {"rows": []})
    assert (empty.plots, empty.filled) == ([], [])
    assert empty.summary == "Nothing was measured."
    assert "Peak memory" not in empty.facts
