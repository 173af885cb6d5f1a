"""`funnel_benchmarks.accelerator`: report and plots, from tables as a run on a GPU leaves them."""

import copy
import json
import sys

import pytest
from PIL import Image

from funnel_benchmarks.accelerator.__main__ import main
from funnel_benchmarks.accelerator.parts import PARTS
from funnel_benchmarks.accelerator.plots import PLOTS, render
from funnel_benchmarks.accelerator.report import (
    COLUMNS,
    NOTES,
    TITLES,
    file_name,
    read_tables,
    suite_name,
    write_plots,
    write_report,
)
from funnel_benchmarks.results import SCHEMA
from funnel_engine import InputError


def seconds(median, width=0.01):
    return {"low": median * (1 - width), "median": median, "high": median * (1 + width), "samples": [median] * 4}


def dense(heads, kv_heads, length, ours, theirs):
    row = {
        "cell": f"{heads}/{kv_heads} heads, {length} tokens", "kind": "dense", "heads": heads, "kv_heads": kv_heads,
        "length": length, "flops": 10**12, "seconds": seconds(1 / ours), "tflops_per_second": ours, "peer": "cuDNN",
        "goal": 0.9, "took_seconds": 1.0,
    }  # fmt: skip
    if theirs is None:
        return row | {"peer_error": "NotImplementedError: refused"}
    return row | {"peer_seconds": seconds(1 / theirs), "peer_tflops_per_second": theirs, "share": ours / theirs}


def row_op(cell, share):
    return {
        "cell": cell, "bytes_read_and_written": 2 * 10**8, "input_sets": 5, "seconds": seconds(5e-5 / share),
        "copy_seconds": seconds(5e-5), "gb_per_second": 4000 * share, "copy_gb_per_second": 4000.0,
        "share": share, "goal": 0.85, "took_seconds": 1.0,
    }  # fmt: skip


def funnel(batch, layer, ratio, ideal):
    return {
        "cell": f"{batch} tokens, after layer {layer}", "batch": batch, "layer": layer, "seconds": seconds(ratio / 2),
        "baseline_seconds": seconds(0.5), "ratio": {"low": ratio - 0.02, "median": ratio, "high": ratio + 0.02},
        "ideal_ratio": ideal, "efficiency": ideal / ratio, "goal": 0.97, "took_seconds": 1.0,
    }  # fmt: skip


def checked(op, dtype, precision, error, limit, **facts):
    row = {"op": op, "dtype": dtype, "precision": precision, "error": error, "limit": limit}
    row |= {"cell": f"{op}: odd sizes", "same_bits_twice": True, "finite": True, "passed": True, "took_seconds": 1.0}
    return row | facts


KERNELS = [
    {"name": f"gemm_fusion_dot_general_with_a_name_far_longer_than_a_plot_can_show_{i}", "runs": 18,
     "milliseconds": 90.0 - 9 * i, "share": 0.18 - 0.018 * i} for i in range(10)
]  # fmt: skip

ROWS = {
    "check": [
        checked("attention", "bfloat16", "default", 2e-3, 1e-2),
        checked("attention", "bfloat16", "default", 4e-3, 1e-2, cell="attention: even sizes"),
        checked("pool_norm", "float32", "highest", 3e-5, 1e-5, passed=False),
        checked("recover_norm", "float32", "highest", 1e-7, 1e-5, passed=False, same_bits_twice=False),
        checked("recover_norm", "float32", "highest", None, 1e-5, passed=False, finite=False, cell="not finite"),
    ],
    "ceilings": [
        {"cell": "bfloat16 product", "seconds": seconds(1.4e-3), "flops": 2 * 8192**3, "tflops_per_second": 780.0},
        {"cell": "copy of 4.29 GB", "seconds": seconds(2e-3), "bytes_read_and_written": 1, "gb_per_second": 4300.0},
    ],
    "attention": [
        *(dense(8, 1, 2**power, 300 + 25 * power, 250 + 30 * power) for power in (9, 11, 13, 14)),
        *(dense(16, 16, 2**power, 280 + 25 * power, None if power == 14 else 240.0) for power in (9, 11, 13, 14)),
        dense(8, 1, 2048, 500.0, 540.0) | {"cell": "queries on stride 2", "kind": "variant", "peer": "own dense"},
    ],
    "rows": [
        *(row_op(f"pool_norm max, stride {stride}, width {width}", 0.9 + 0.01 * stride)
          for width in (768, 2048) for stride in (2, 4)),
        *(row_op(f"recover_norm {mode}, stride {stride}, width {width}", 0.7 + 0.1 * stride)
          for width in (768, 2048) for stride in (2, 4) for mode in ("tile", "sum", "mean", "max")),
    ],
    "engine": [
        {"cell": "128 x 512 tokens", "seconds": seconds(0.5), "flops": 10**14, "tokens_per_second": 131072.0,
         "tflops_per_second": 546.0, "compile_seconds": 31.0, "goal": 0.65},
    ],
    "funnel": [
        funnel(batch, layer, ideal + 0.02, ideal)
        for batch in ("128 x 512", "8 x 8192") for layer, ideal in ((2, 0.56), (8, 0.72), (14, 0.89))
    ],
    "peer": [
        {"cell": "Hugging Face Gemma", "attention": "sdpa", "versions": {"torch": "2.11.0"}, "seconds": seconds(0.5),
         "peer_seconds": seconds(0.7), "tokens_per_second": 131072.0, "peer_tokens_per_second": 93623.0,
         "speedup": {"low": 1.3, "median": 1.4, "high": 1.5}, "goal": 1.2},
    ],
    "latency": [
        {"cell": "one sequence of 128 tokens", "seconds": seconds(4e-3)},
        {"cell": "device busy", "seconds": seconds(3.2e-3), "busy_share": 0.95, "busy_milliseconds": 3.0,
         "kernels": 300, "goal": 0.9},
        {"cell": "where the time goes", "seconds": seconds(0.5), "busy_share": 0.99, "busy_milliseconds": 495.0,
         "kernels": 400, "most_expensive": KERNELS},
    ],
    "ragged": [
        {"cell": "conll", "sequences": 3000, "tokens": 65536, "seconds": seconds(0.6), "equal_seconds": seconds(0.5),
         "tokens_per_second": 109226.0, "equal_tokens_per_second": 131072.0, "share": 0.833, "goal": 0.85},
    ],
    "flags": [
        {"cell": "xla_gpu_some_flag=True", "seconds": seconds(0.49), "baseline_seconds": seconds(0.5),
         "ratio": {"low": 0.96, "median": 0.98, "high": 1.0}},
    ],
}  # fmt: skip


def table(part):
    return {
        "schema": SCHEMA, "suite": suite_name(part), "started": "2030-01-02T03:04:05Z", "resumed": [],
        "options": {"small": False, "seed": 7, "backend": "auto"}, "command": "python -m x --out y",
        "served_by": {"attention": "triton"},
        "machine": {"devices": ["Some GPU"], "jax": "0.11.2", "driver": None, "platform_version": "a\nb"},
        "complete": True, "rows": copy.deepcopy(ROWS[part]), "left_out": [], "errors": [],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """What a whole run leaves, less the report."""
    for part in PARTS:
        (tmp_path / file_name(part)).write_text(json.dumps(table(part)))
    return tmp_path


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def report(folder):
    return write_report(folder, read_tables(folder, PARTS))


def test_every_part_has_a_section_with_its_figures(folder, capsys):
    assert main(["--out", str(folder), "--report"]) == 0
    text = (folder / "report.md").read_text()
    assert text in capsys.readouterr().out
    for part, title in TITLES.items():
        assert NOTES[part] in section(text, title)
    rates = section(text, TITLES["attention"])
    assert (
        "| 8/1 heads, 512 tokens | 1.905 (1.886 - 1.924) | 525.0 | cuDNN | 520.0 | 1.010 (goal 0.9: reached) |" in rates
    )
    assert (
        "| 16/16 heads, 16384 tokens | 1.587 (1.571 - 1.603) | 630.0 | cuDNN | NotImplementedError: refused | - |"
        in rates
    )
    assert "| 546.0 | 0.700 (goal 0.65: reached) |" in section(text, TITLES["engine"])  # of 780
    assert "| 0.580 (0.560 - 0.600) | 0.560 | 0.966 (goal 0.97: missed) |" in section(text, TITLES["funnel"])
    assert "| 54.3 | 3,680 | 4,000 | 0.920 (goal 0.85: reached) |" in section(text, TITLES["rows"])
    assert "| 1.400 (goal 1.2: reached) | torch 2.11.0 |" in section(text, TITLES["peer"])
    assert "show_9` | 18 | 9.000 | 1.8 |" in section(text, TITLES["latency"])
    assert "driver: not there" in text
    assert "platform_version: a b" in text


def test_wrong_results_are_counted_and_named(folder):
    text = report(folder)
    assert "- 3 wrong results, 0 measurements failed, 0 left out" in text
    check = section(text, TITLES["check"])
    assert "| attention | bfloat16, default | 2 | 4.00e-03 | 0.01 | 0 |" in check
    assert "| pool_norm | float32, highest | 1 | 3.00e-05 | 1e-05 | 1 |" in check
    assert "- WRONG: pool_norm: odd sizes: error 3.00e-05 (limit 1e-05)\n" in check
    assert "- WRONG: recover_norm: odd sizes: error 1.00e-07 (limit 1e-05), another result the second time" in check
    assert "| recover_norm | float32, highest | 2 | inf | 1e-05 | 2 |" in check
    assert "- WRONG: not finite: error inf (limit 1e-05), not finite" in check


def test_what_failed_was_left_out_or_stopped_is_named(folder):
    changed = table("peer") | {"rows": [], "complete": False}
    changed["left_out"] = [{"cell": "sdpa", "reason": "torch is not installed"}]
    changed["errors"] = [{"cell": "flash", "error": "RuntimeError: no | memory"}]
    (folder / "peer.json").write_text(json.dumps(changed))
    text = report(folder)
    assert "1 measurements failed, 1 left out" in text
    assert "- stopped before the end of: peer" in text
    peers = section(text, TITLES["peer"])
    assert "- Left out: sdpa: torch is not installed" in peers
    assert "- FAILED: flash: RuntimeError: no | memory" in peers


def test_without_the_ceilings_the_engine_has_no_share_of_them(folder):
    (folder / "ceilings.json").unlink()
    assert "| 546.0 | - | 31.0 |" in section(report(folder), TITLES["engine"])


def test_two_runs_are_told_apart(folder):
    (folder / "flags.json").write_text(
        json.dumps(table("flags") | {"options": {"small": False, "seed": 8, "backend": "auto"}})
    )
    circumstances = report(folder).split("## Circumstances")[1]
    assert "flags (2030-01-02T03:04:05Z):\n\n- command: `python -m x --out y`\n- seed 8" in circumstances
    assert circumstances.count("- command:") == 2


def test_every_plot_is_drawn_and_shown(folder):
    tables = read_tables(folder, PARTS)
    write_plots(folder, tables)
    text = write_report(folder, tables)
    for file in PLOTS:
        with Image.open(folder / file) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 400
        assert f"]({file})" in text


def test_a_plot_follows_its_figures(folder):
    """The picture changes with the numbers that it shows, and with nothing else."""
    for file, (part, _, figure) in PLOTS.items():
        original, changed = table(part), table(part)
        assert render(figure, original) == render(figure, table(part))
        for row in changed["rows"]:
            for key in ("tflops_per_second", "share", "efficiency", "ratio"):
                if isinstance(row.get(key), (int, float)):
                    row[key] *= 0.8
            for total in row.get("most_expensive", []):
                total["milliseconds"] /= 2
        assert render(figure, changed) != render(figure, original), file


def test_without_matplotlib_the_report_says_so_and_no_old_plot_stays(folder, monkeypatch):
    (folder / "rows.png").write_bytes(b"old")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it raises ImportError
    tables = read_tables(folder, PARTS)
    write_plots(folder, tables)
    assert not list(folder.glob("*.png"))
    assert write_report(folder, tables).count("(needs matplotlib)") == len(PLOTS)


def test_empty_tables_make_a_report_without_plots(folder):
    for part in PARTS:
        (folder / f"{part}.json").write_text(json.dumps(table(part) | {"rows": []}))
    assert main(["--out", str(folder), "--report"]) == 0
    assert not list(folder.glob("*.png"))


def test_a_file_of_another_part_is_refused(folder):
    (folder / "rows.json").write_text(json.dumps(table("flags")))
    with pytest.raises(
        InputError, match=r"rows\.json is of suite 'accelerator flags', not 'accelerator rows'; remove it"
    ):
        read_tables(folder, PARTS)


def test_every_part_has_a_title_a_note_and_columns():
    assert set(TITLES) == set(NOTES) == set(PARTS)
    assert set(COLUMNS) | {"check", "engine"} == set(PARTS)
