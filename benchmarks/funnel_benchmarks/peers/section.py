"""What the report says of a result: how many times as fast the engine is as each peer, by lengths of sequences."""

from typing import TYPE_CHECKING

from funnel_benchmarks.peers.suite import SCENARIOS
from funnel_benchmarks.peers.table import describe_lengths, describe_model
from funnel_benchmarks.plot_style import Look, whiskers
from funnel_benchmarks.report.section import Cell, Plot, Section, Table, number, spread
from funnel_benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"batch": "all sequences", "one": "one sequence after another"}
COLUMNS = {
    "batch": (
        ("peer", "and lengths"), ("dtype", "peer's below"), ("times as fast", "quartiles"), ("latency", "ms"),
        ("peer's", "ms"), ("tokens/s", ""), ("peer's", "tokens/s"), ("GFLOP/s", "useful"), ("peer's", "GFLOP/s"),
        ("apart", "relative"),
    ),
    "one": (
        ("peer", "and lengths"), ("dtype", "peer's below"), ("times as fast", "quartiles"), ("p50", "ms"),
        ("peer's p50", "ms"), ("p90", "ms"), ("peer's p90", "ms"), ("apart", "relative"),
    ),
}  # fmt: skip
READING = (
    "Both sides have the same random weights and inputs, and begin with token ids on the host "
    "(sentence-transformers with texts, and then so does the engine) and end with vectors on the host. They take "
    "turns, A B B A, the peer in a process of its own that sleeps in between. Times as fast is the median of the "
    "ratios of calls made side by side, with their quartiles; below 1 the peer is faster.",
    "All sequences: one call of ours, which packs them; the peer gets padded batches, but for llama.cpp, which packs "
    "too. A peer computes in bfloat16 where the processor multiplies it and in float32 elsewhere, but for ONNX Runtime "
    "(always float32) and llama.cpp (always bfloat16). Work on padding is not counted as useful. One sequence after "
    "another: latencies of single sequences, p50 and p90 over all of them.",
    "Apart is the greatest relative difference between a vector of ours and the peer's: rounding to bfloat16 in other "
    "places. A peer that is further apart than 0.05 computes something else, and is not timed.",
)


def section(content: Row) -> Section:
    rows, options = content["rows"], content["options"]
    shown = [scenario for scenario in SCENARIOS if any(row["scenario"] == scenario for row in rows)]
    versions = {row["peer"]: ", ".join(f"{name} {value}" for name, value in row["facts"].items()) for row in rows}
    order = "" if options["order"] == "sorted" else f", batches {options['order']}"
    return Section(
        title=f"Against other engines: {options['preset']}, {', '.join(options['lengths'])}{order}",
        summary="; ".join(summary(rows, scenario) for scenario in shown),
        plots=[plot(rows, scenario) for scenario in shown],
        tables=[table(rows, scenario, options["dtype"]) for scenario in shown],
        reading=READING,
        facts={
            "Model": describe_model(options),
            "Lengths": "; ".join(describe_lengths(name, facts) for name, facts in options["lengths"].items()),
            "Peers' batches": f"at most {options['batch_size']} sequences, {options['order']} by length",
            "Repeats": f"{options['repeats']} times A B B A",
            **versions,
        },
    )


def summary(rows: list[Row], scenario: str) -> str:
    """Between which factors ours lies, over all peers and lengths of a scenario."""
    factors = {row["speedup"]["median"]: row for row in rows if row["scenario"] == scenario}
    least, most = factors[min(factors)], factors[max(factors)]
    ends = " to ".join(
        f"{row['speedup']['median']:.2f} ({row['peer']}, {row['lengths']})"
        for row in (least, most)[: 1 + (least is not most)]
    )
    return f"{TITLES[scenario].capitalize()}: {ends} times as fast as the peer"


def plot(rows: list[Row], scenario: str) -> Plot:
    mine = [row for row in rows if row["scenario"] == scenario]
    words = "; ".join(f"{row['peer']}, {row['lengths']}: {row['speedup']['median']:.2f}" for row in mine)
    return Plot(
        draw=lambda look: draw(mine, look),
        described=f"How many times as fast the engine is, {TITLES[scenario]}: {words}.",
        caption=f"{TITLES[scenario].capitalize()}: how many times as fast the engine is as each peer, with quartiles.",
    )


def draw(rows: list[Row], look: Look) -> "Figure":
    """A bar for each peer and kind of lengths, from 0; a line where both are as fast."""
    from matplotlib.figure import Figure  # an optional dependency that takes a second

    names = [f"{row['peer']}\n{row['lengths']}" for row in rows]
    median, errors = whiskers(row["speedup"] for row in rows)
    figure = Figure(figsize=(look.inches[0], 1.1 + 0.48 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, median, xerr=errors, color=look.measured, ecolor=look.ink, capsize=3, height=0.6)
    for place, (row, bar) in enumerate(zip(rows, bars, strict=True)):
        bar.set_gid(f"marks-bar-{place}")
        text, end = f"{row['speedup']['median']:.2f}", row["speedup"]["high"]
        axes.annotate(text, (end, place), xytext=(6, 0), textcoords="offset points", va="center")
    axes.axvline(1.0, color=look.ideal, linewidth=1.5, linestyle="--", gid="marks-equal")
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("times as fast as the peer")
    return figure


def table(rows: list[Row], scenario: str, dtype: str) -> Table:
    make = batch_cells if scenario == "batch" else one_cells
    made = [
        (*first_cells(row, dtype), *make(row), number(row["difference"], ".3f"))
        for row in rows
        if row["scenario"] == scenario
    ]
    return Table(TITLES[scenario].capitalize(), COLUMNS[scenario], made)


def first_cells(row: Row, dtype: str) -> tuple[Cell, ...]:
    return Cell(row["peer"], row["lengths"]), Cell(dtype, row["facts"]["dtype"]), spread(row["speedup"], 1, ".2f")


def batch_cells(row: Row) -> tuple[Cell, ...]:
    return (
        number(1e3 * row["seconds"]["median"], ",.1f"),
        number(1e3 * row["peer_seconds"]["median"], ",.1f"),
        number(row["tokens_per_second"], ",.0f"),
        number(row["peer_tokens_per_second"], ",.0f"),
        number(row["flops_per_second"] / 1e9, ",.1f"),
        number(row["peer_flops_per_second"] / 1e9, ",.1f"),
    )


def one_cells(row: Row) -> tuple[Cell, ...]:
    figures = row["seconds"]["median"], row["peer_seconds"]["median"], row["p90"], row["peer_p90"]
    return tuple(number(1e3 * seconds, ",.1f") for seconds in figures)
