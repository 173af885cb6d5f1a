"""The report of a run on a device, from tables as a run on a GPU leaves them."""

import copy
import json

import pytest
from click.testing import CliRunner
from PIL import Image

from funnel_benchmarks.device.parts import PARTS
from funnel_benchmarks.plot_style import render
from funnel_benchmarks.report.command import report
from funnel_benchmarks.report.markdown import write_markdown
from funnel_benchmarks.results import SCHEMA


def seconds(median, width=0.01):
    return {"low": median * (1 - width), "median": median, "high": median * (1 + width), "samples": [median] * 4}


def dense(heads, kv_heads, length, ours, theirs):
    row = {
        "cell": f"{heads}/{kv_heads} heads, {length} tokens",
        "kind": "dense",
        "heads": heads,
        "kv_heads": kv_heads,
        "length": length,
        "flops": 10**12,
        "seconds": seconds(1 / ours),
        "tflops_per_second": ours,
        "peer": "cuDNN",
        "goal": 0.9,
        "took_seconds": 1.0,
    }
    if theirs is None:
        return row | {"peer_error": "NotImplementedError: refused"}
    return row | {"peer_seconds": seconds(1 / theirs), "peer_tflops_per_second": theirs, "share": ours / theirs}


def row_op(cell, share):
    return {
        "cell": cell,
        "bytes_read_and_written": 2 * 10**8,
        "input_sets": 5,
        "seconds": seconds(5e-5 / share),
        "copy_seconds": seconds(5e-5),
        "gb_per_second": 4000 * share,
        "copy_gb_per_second": 4000.0,
        "share": share,
        "goal": 0.85,
        "took_seconds": 1.0,
    }


def funnel(batch, layer, ratio, ideal):
    return {
        "cell": f"{batch} tokens, after layer {layer}",
        "batch": batch,
        "layer": layer,
        "seconds": seconds(ratio / 2),
        "baseline_seconds": seconds(0.5),
        "ratio": {"low": ratio - 0.02, "median": ratio, "high": ratio + 0.02},
        "ideal_ratio": ideal,
        "efficiency": ideal / ratio,
        "goal": 0.97,
        "took_seconds": 1.0,
    }


def checked(op, dtype, precision, error, limit, **facts):
    row = {"op": op, "dtype": dtype, "precision": precision, "error": error, "limit": limit}
    row |= {"cell": f"{op}: odd sizes", "same_bits_twice": True, "finite": True, "passed": True, "took_seconds": 1.0}
    return row | facts


KERNELS = [
    {
        "name": f"gemm_fusion_dot_general_with_a_name_far_longer_than_a_plot_can_show_{i}",
        "runs": 18,
        "milliseconds": 90.0 - 9 * i,
        "share": 0.18 - 0.018 * i,
    }
    for i in range(10)
]

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
        *(
            row_op(f"pool_norm max, stride {stride}, width {width}", 0.9 + 0.01 * stride)
            for width in (768, 2048)
            for stride in (2, 4)
        ),
        *(
            row_op(f"recover_norm {mode}, stride {stride}, width {width}", 0.7 + 0.1 * stride)
            for width in (768, 2048)
            for stride in (2, 4)
            for mode in ("tile", "sum", "mean", "max")
        ),
    ],
    "engine": [
        {
            "cell": "128 x 512 tokens",
            "seconds": seconds(0.5),
            "flops": 10**14,
            "tokens_per_second": 131072.0,
            "tflops_per_second": 546.0,
            "matrix_share": 0.7,
            "compile_seconds": 31.0,
            "goal": 0.65,
        },
    ],
    "funnel": [
        funnel(batch, layer, ideal + 0.02, ideal)
        for batch in ("128 x 512", "8 x 8192")
        for layer, ideal in ((2, 0.56), (8, 0.72), (14, 0.89))
    ],
    "peer": [
        {
            "cell": "Hugging Face Gemma",
            "attention": "sdpa",
            "versions": {"torch": "2.11.0"},
            "seconds": seconds(0.5),
            "peer_seconds": seconds(0.7),
            "tokens_per_second": 131072.0,
            "peer_tokens_per_second": 93623.0,
            "speedup": {"low": 1.3, "median": 1.4, "high": 1.5},
            "goal": 1.2,
        },
    ],
    "latency": [
        {"cell": "one sequence of 128 tokens", "seconds": seconds(4e-3)},
        {
            "cell": "device busy",
            "seconds": seconds(3.2e-3),
            "busy_share": 0.95,
            "busy_milliseconds": 3.0,
            "kernels": 300,
            "goal": 0.9,
        },
        {
            "cell": "where the time goes",
            "seconds": seconds(0.5),
            "busy_share": 0.99,
            "busy_milliseconds": 495.0,
            "kernels": 400,
            "most_expensive": KERNELS,
        },
    ],
    "ragged": [
        {
            "cell": "conll",
            "sequences": 3000,
            "tokens": 65536,
            "seconds": seconds(0.6),
            "equal_seconds": seconds(0.5),
            "tokens_per_second": 109226.0,
            "equal_tokens_per_second": 131072.0,
            "share": 0.833,
            "goal": 0.85,
        },
    ],
    "flags": [
        {
            "cell": "xla_gpu_some_flag=True",
            "seconds": seconds(0.49),
            "baseline_seconds": seconds(0.5),
            "ratio": {"low": 0.96, "median": 0.98, "high": 1.0},
        },
    ],
}


def table(part):
    options = {"small": False, "seed": 7, "backend": "auto", "served_by": {"attention": "triton"}}
    return {
        "schema": SCHEMA,
        "suite": PARTS[part].name,
        "started": "2030-01-02T03:04:05Z",
        "resumed": [],
        "options": options,
        "machine": {"devices": ["Some GPU"], "jax": "0.11.2", "driver": None, "platform_version": "a\nb"},
        "complete": True,
        "rows": copy.deepcopy(ROWS[part]),
        "left_out": [],
        "errors": [],
    }


@pytest.fixture
def folder(tmp_path):
    """What a whole run leaves, less the report."""
    for part in PARTS:
        (tmp_path / f"{part}.json").write_text(json.dumps(table(part)))
    return tmp_path


def section(text, part):
    return text.split(f"## {PARTS[part].title}\n")[1].split("\n## ")[0]


def made(folder):
    return write_markdown([folder / f"{part}.json" for part in PARTS], folder / "report.md")


def plots():
    """Each part with a plot, and the plot."""
    return {part: plot for part, suite in PARTS.items() for plot in suite.section(table(part)).plots}


def test_every_part_has_a_section_with_its_figures(folder):
    output = folder / "all.md"
    result = CliRunner().invoke(report, [str(folder), "--output", str(output)])
    assert (result.exit_code, result.output) == (0, f"{output}: {len(PARTS)} of {len(PARTS)} results\n")
    text = output.read_text()
    for part, suite in PARTS.items():
        assert suite.note in section(text, part)
    rates = section(text, "attention")
    assert (
        "| 8/1 heads, 512 tokens | 1.905 (1.886 \u2013 1.924) | 525.0 | cuDNN | 520.0 | 1.010 (goal 0.9: reached) |"
    ) in rates
    assert (
        "| 16/16 heads, 16384 tokens | 1.587 (1.571 \u2013 1.603) | 630.0 | cuDNN | NotImplementedError: refused |  |"
    ) in rates
    assert "| 546.0 | 0.700 (goal 0.65: reached) |" in section(text, "engine")
    assert "| 0.580 (0.560 \u2013 0.600) | 0.560 | 0.966 (goal 0.97: missed) |" in section(text, "funnel")
    assert "| 3,680 | 4,000 | 0.920 (goal 0.85: reached) |" in section(text, "rows")
    assert "| 1.400 (goal 1.2: reached) | torch 2.11.0 |" in section(text, "peer")
    assert "show_9 | 18 | 9.000 | 1.8 |" in section(text, "latency")
    assert "platform_version a b" in text
    assert "- attention: triton\n" in text


def test_wrong_results_are_counted_and_named(folder):
    text = made(folder)
    assert "- 3 wrong results, 0 measurements failed, 0 left out" in text
    check = section(text, "check")
    assert "| attention | bfloat16, default | 2 | 4.00e-03 | 0.01 | 0 |" in check
    assert "| pool_norm | float32, highest | 1 | 3.00e-05 | 1e-05 | 1 |" in check
    assert "| recover_norm | float32, highest | 2 | inf | 1e-05 | 2 |" in check
    wrong = check.split("**Wrong results**")[1]
    assert "| pool_norm: odd sizes | 3.00e-05 | 1e-05 | yes | yes |" in wrong
    assert "| recover_norm: odd sizes | 1.00e-07 | 1e-05 | no | yes |" in wrong
    assert "| not finite | inf | 1e-05 | yes | no |" in wrong


def test_what_failed_was_left_out_or_stopped_is_named(folder):
    changed = table("peer") | {"rows": [], "complete": False}
    changed["left_out"] = [{"cell": "sdpa", "reason": "torch is not installed"}]
    changed["errors"] = [{"cell": "flash", "error": "RuntimeError: no | memory"}]
    (folder / "peer.json").write_text(json.dumps(changed))
    text = made(folder)
    assert "1 measurements failed, 1 left out" in text
    assert "- stopped before the end of: device peer" in text
    peers = section(text, "peer")
    assert "- Left out: sdpa: torch is not installed" in peers
    assert "- Failed: flash: RuntimeError: no | memory" in peers


def test_without_the_ceilings_the_engine_has_no_share_of_them(folder):
    changed = table("engine")
    del changed["rows"][0]["matrix_share"]
    (folder / "engine.json").write_text(json.dumps(changed))
    assert "| 546.0 |  | 31.0 |" in section(made(folder), "engine")


def test_every_part_tells_its_own_circumstances(folder):
    changed = table("flags")
    changed["options"]["seed"] = 8
    (folder / "flags.json").write_text(json.dumps(changed))
    text = made(folder)
    assert "- Seed: 8\n" in section(text, "flags")
    assert text.count("- Seed: 7\n") == len(PARTS) - 1


def test_every_plot_is_drawn_and_shown(folder):
    text = made(folder)
    assert set(plots()) == {"attention", "rows", "funnel", "latency"}
    for part in plots():
        with Image.open(folder / f"{part}.png") as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 400
        assert f"]({part}.png)" in section(text, part)


@pytest.mark.parametrize("part", ["attention", "rows", "funnel", "latency"])
def test_a_plot_follows_its_figures(part):
    """The picture changes with the numbers that it shows, and with nothing else."""

    def drawn(content):
        (plot,) = PARTS[part].section(content).plots
        return render(plot.draw, "png")

    original, changed = table(part), table(part)
    assert drawn(original) == drawn(table(part))
    for row in changed["rows"]:
        for key in ("tflops_per_second", "share", "efficiency", "ratio"):
            if isinstance(row.get(key), (int, float)):
                row[key] *= 0.8
        for total in row.get("most_expensive", []):
            total["milliseconds"] /= 2
    assert drawn(changed) != drawn(original)


def test_without_matplotlib_the_report_says_so_and_no_old_plot_stays(folder, monkeypatch):
    (folder / "rows.png").write_bytes(b"old")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = made(folder)
    assert not list(folder.glob("*.png"))
    assert text.count("(needs matplotlib)") == len(plots())


def test_empty_tables_make_a_report_without_plots(folder):
    for part in PARTS:
        (folder / f"{part}.json").write_text(json.dumps(table(part) | {"rows": []}))
    assert "Right or wrong" in made(folder)
    assert not list(folder.glob("*.png"))
