"""What the report says about a result of `funnel bench latency`."""

from functools import partial

import numpy as np

from funnel_benchmarks.describe import describe_backend, describe_model
from funnel_benchmarks.latency.paper import PAPER, beside_paper
from funnel_benchmarks.latency.plot import describe_kind, draw, draw_efficiency, series
from funnel_benchmarks.latency.table import compile_seconds, describe_peak
from funnel_benchmarks.report.section import Cell, Plot, Section, Table, number, spread
from funnel_benchmarks.results import Row

HOW_TO_READ = (
    "2:1 after L means: L full-length layers, then each pair of neighbouring token vectors is pooled into one, and "
    "all later layers work on the shorter sequence. The earlier the funnel, the more work it saves.",
    "Ratio is the median latency with the funnel over the median latency of the same engine without it; 0.6 means "
    "that 40 % of the time is saved. Both ran in turns on the same inputs, so each row has a baseline of its own. "
    "Whiskers and ranges are quartiles; those of the ratio are the least and greatest that both latencies' quartiles "
    "allow.",
    "Ideal is the ratio of the floating-point operations: what the ratio would be if pooling, bookkeeping and memory "
    "traffic were free and smaller matrix products ran at the same rate. Efficiency is ideal over measured; 1 means "
    "that the funnel saves all that it can, and more than 1 that the rest runs better on fewer rows, or noise.",
    "Latency is from token ids on the host to vectors on the host. Turning text into tokens is not in it, nor is "
    "compiling, which is done once beforehand.",
)
COLUMNS = (
    ("funnel", "and batch"), ("ratio", "range"), ("ideal", "ratio"), ("efficiency", "ideal / ratio"),
    ("saving", "%"), ("latency", "ms, quartiles"), ("baseline", "ms, quartiles"), ("tokens/s", ""), ("GFLOP/s", ""),
    ("padding", "%"), ("compiling", "s"),
)  # fmt: skip


def section(content: Row) -> Section:
    """Saving against ideal and paper, the efficiency of every row, and all figures."""
    rows, batches = content["rows"], content["options"]["batches"]
    lengths = batches[0]["name"] if len(batches) == 1 else f"{len(batches)} batches"
    return Section(
        title=f"Latency with a funnel, and without: {content['options']['model']['name']}, {lengths}",
        summary=summary(content),
        plots=plots(content) if rows else [],
        tables=[Table("", COLUMNS, [cells(row) for row in rows])] if rows else [],
        reading=HOW_TO_READ,
        facts=facts(content),
    )


def summary(content: Row) -> str:
    rows = content["rows"]
    if not rows:
        return "Nothing was measured."
    best = max(rows, key=lambda row: row["saving_percent"])
    efficiencies = [row["efficiency"] for row in rows]
    known = [line.removeprefix(f"saved, beside {PAPER}: ") for line in beside_paper(content)]
    sentences = (
        *([f"Saved, beside {PAPER}: {'. '.join(known)}"] if known else []),
        f"{best['funnel']['name']} saves {best['saving_percent']:.1f} % of the latency ({best['batch']['name']}), "
        f"where {100 * (1 - best['ideal_ratio']):.1f} % would be ideal",
        f"Efficiency over all {len(rows)} rows: median {np.median(efficiencies):.2f}, from {min(efficiencies):.2f} to "
        f"{max(efficiencies):.2f}",
    )
    return "".join(f"{sentence}. " for sentence in sentences).rstrip()


def plots(content: Row) -> list[Plot]:
    kind = describe_kind(series(content["rows"])[0])
    return [
        Plot(
            partial(draw, content),
            f"Latency ratio and saving over the place of the funnel ({kind}); the table has the same figures.",
            f"Latency and saving over the place of the funnel: {kind}",
        ),
        Plot(
            partial(draw_efficiency, content),
            "Efficiency of every funnel on every batch; the table has the same figures.",
            "Efficiency of all that was measured: ideal ratio / measured ratio",
        ),
    ]


def cells(row: Row) -> tuple[Cell, ...]:
    """One row of the table, in the order of `COLUMNS`."""
    return (
        Cell(row["funnel"]["name"], row["batch"]["name"]),
        spread(row["ratio"], 1, ".3f"),
        number(row["ideal_ratio"], ".3f"),
        number(row["efficiency"], ".3f"),
        number(row["saving_percent"], ".1f"),
        spread(row["seconds"], 1e3, ",.1f"),
        spread(row["baseline_seconds"], 1e3, ",.1f"),
        number(row["tokens_per_second"], ",.0f"),
        number(row["flops_per_second"] / 1e9, ",.1f"),
        number(100 * row["padding_waste"], ".1f"),
        number(row["compile_seconds"], ".1f"),
    )


def facts(content: Row) -> dict[str, str]:
    """How it was measured."""
    options, rows = content["options"], content["rows"]
    model = options["model"]
    named = {
        "Model": describe_model(model),
        "Shape": f"{model['family']}, MLP {model['intermediate_size']:,}, {model['heads']} heads of "
        f"{model['head_dim']}, {model['kv_heads']} key/value heads",
        "Weights": model["weights"],
        "Batches": "; ".join(f"{batch['name']}, median {batch['median']:g}" for batch in options["batches"]),
        "Method": f"{options['repeats']} times {options['order']} per row, medians of {2 * options['repeats']} runs; "
        f"random token ids, seed {options['seed']}",
        "Compilations while timing": "0",
        "Backend": describe_backend(options),
    }
    if rows:
        waste = max(row["baseline_padding_waste"] for row in rows)
        named |= {
            "Padding without a funnel": f"at most {100 * waste:.1f} % of rows",
            "Compiling beforehand": f"{compile_seconds(rows):.1f} s in all",
            "Peak memory": describe_peak(rows),
        }
    return named
