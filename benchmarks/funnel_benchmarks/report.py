"""A result as one HTML page that needs nothing else: no network, no further files."""

import base64
from html import escape
from typing import Any

from funnel_benchmarks.latency.plot import describe_kind, render, series
from funnel_benchmarks.latency.table import compile_seconds, describe_machine, describe_model, describe_peak
from funnel_benchmarks.plot_style import DARK, LIGHT

NARROW = (4.4, 6.6)  # inches, for a telephone

STYLE = """
:root { color-scheme: light dark; --ink: #222222; --paper: #ffffff; --quiet: #5c6370; --line: #dddddd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181d; --quiet: #a3aab8; --line: #3a3f4a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
.quiet { color: var(--quiet); margin-top: 0; }
img { display: block; width: 100%; max-width: 50rem; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
td { vertical-align: top; }
small { display: block; color: var(--quiet); font-weight: normal; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1rem; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 0.5rem; } }
"""

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


def render_html(result: dict[str, Any]) -> str:
    """The whole page of a complete result: the picture, the table, how to read it, and the circumstances."""
    model = result["options"]["model"]
    paragraphs = "".join(f"<p>{escape(text)}</p>\n" for text in HOW_TO_READ)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Funnel latency: {escape(model["name"])}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Latency with a funnel, and without</h1>
<p class="quiet">{escape(describe_model(model))}; {escape(describe_machine(result["machine"]))}</p>
{picture(result)}
<h2>Figures</h2>
<div class="scroll">{table(result["rows"])}</div>
<h2>How to read this</h2>
{paragraphs}<h2>Circumstances</h2>
{facts(result)}
</body>
</html>
"""


def picture(result: dict[str, Any]) -> str:
    """The plot, drawn four times: for light and dark pages, wide and narrow; the browser shows the one that fits."""
    narrow, dark = "(max-width: 40rem)", "(prefers-color-scheme: dark)"
    sources = (
        (f"{narrow} and {dark}", DARK._replace(inches=NARROW, titled=False)),
        (narrow, LIGHT._replace(inches=NARROW, titled=False)),
        (dark, DARK._replace(titled=False)),
    )
    alternatives = "".join(
        f'<source media="{media}" srcset="{data_uri(render(result, "svg", look))}">\n' for media, look in sources
    )
    kind = escape(describe_kind(series(result["rows"])[0]))
    described = f"Latency ratio and saving over the place of the funnel ({kind}); the table has the same figures."
    image = f'<img src="{data_uri(render(result, "svg", LIGHT._replace(titled=False)))}" alt="{described}">'
    return f'<picture>\n{alternatives}{image}\n</picture>\n<p class="quiet">{kind}</p>'


def data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


COLUMNS = (
    ("funnel", "and batch"), ("ratio", "range"), ("ideal", "ratio"), ("efficiency", "ideal / ratio"),
    ("saving", "%"), ("latency", "ms, quartiles"), ("baseline", "ms, quartiles"), ("tokens/s", ""), ("GFLOP/s", ""),
    ("padding", "%"), ("compiling", "s"),
)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    head = "".join(f'<th scope="col">{name}<small>{unit}</small></th>' for name, unit in COLUMNS)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells(row)) + "</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table, in the order of `COLUMNS`."""
    return (
        f"{escape(row['funnel']['name'])}<small>{escape(row['batch']['name'])}</small>",
        spread(row["ratio"], 1, ".3f"),
        f"{row['ideal_ratio']:.3f}",
        f"{row['efficiency']:.3f}",
        f"{row['saving_percent']:.1f}",
        spread(row["seconds"], 1e3, ",.1f"),
        spread(row["baseline_seconds"], 1e3, ",.1f"),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['flops_per_second'] / 1e9:,.1f}",
        f"{100 * row['padding_waste']:.1f}",
        f"{row['compile_seconds']:.1f}",
    )


def spread(value: dict[str, float], factor: float, form: str) -> str:
    """A median, and below it the two bounds."""
    low, median, high = (format(factor * value[name], form) for name in ("low", "median", "high"))
    return f"{median}<small>{low} &ndash; {high}</small>"


def facts(result: dict[str, Any]) -> str:
    """How and where the result was measured, as a list of terms."""
    options, machine, rows = result["options"], result["machine"], result["rows"]
    model = options["model"]
    named = {
        "Model": describe_model(model),
        "Shape": f"{model['family']}, MLP {model['intermediate_size']:,}, {model['heads']} heads of "
        f"{model['head_dim']}, {model['kv_heads']} key/value heads",
        "Weights": model["weights"],
        "Batches": "; ".join(f"{batch['name']}, median {batch['median']:g}" for batch in options["batches"]),
        "Padding without a funnel": f"at most {100 * max(row['baseline_padding_waste'] for row in rows):.1f} % of rows",
        "Method": f"{options['repeats']} times {options['order']} per row, medians of {2 * options['repeats']} runs; "
        f"random token ids, seed {options['seed']}",
        "Compilations while timing": "0",
        "Compiling beforehand": f"{compile_seconds(rows):.1f} s in all",
        "Peak memory": describe_peak(rows),
        "Backend": f"{options['backend']}, served by {options['served_by']}",
        "Devices": ", ".join(machine["devices"]),
        "Processor": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB",
        "System": machine["platform"],
        "Versions": f"Python {machine['python']}, jax {machine['jax']}, jaxlib {machine['jaxlib']}, "
        f"numpy {machine['numpy']}, revision {machine['revision'] or 'unknown'}",
        "Started": ", ".join([result["started"], *(f"gone on {run['started']}" for run in result["resumed"])]),
    }
    items = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in named.items())
    return f"<dl>\n{items}\n</dl>"
