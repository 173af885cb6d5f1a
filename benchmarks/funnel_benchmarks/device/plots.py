"""The plots of the parts. matplotlib is imported where it is used: a machine with an accelerator may not have it."""

from typing import TYPE_CHECKING, Any

from funnel_benchmarks.plot_style import LIGHT, Look, entitle, whiskers
from funnel_benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_of(content: Row, look: Look, columns: int, height: float) -> tuple["Figure", list[Any]]:
    """An empty figure that says above what was measured where, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(look.inches[0], height), layout="constrained")
    machine, rehearsal = content["machine"], " (rehearsal sizes)" if content["options"]["small"] else ""
    devices = ", ".join(machine["devices"])
    entitle(figure, look, f"{devices}, jax {machine['jax']}, {content['started'][:10]}{rehearsal}")
    return figure, list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])


def attention(content: Row, look: Look = LIGHT) -> "Figure":
    """Rates over the length of a sequence, one panel for each pair of head counts."""
    rows = [row for row in content["rows"] if row["kind"] == "dense"]
    heads = sorted({(row["heads"], row["kv_heads"]) for row in rows})
    figure, panels = figure_of(content, look, len(heads), 4.2)
    highest = max(row.get(key, 0) for row in rows for key in ("tflops_per_second", "peer_tflops_per_second"))
    for panel, pair in zip(panels, heads, strict=False):
        chosen = [row for row in rows if (row["heads"], row["kv_heads"]) == pair]
        lines = (("tflops_per_second", "ours", look.measured), ("peer_tflops_per_second", "cuDNN", look.ideal))
        for key, name, color in lines:
            points = [(row["length"], row[key]) for row in chosen if key in row]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", color=color, label=name)
        lengths = [row["length"] for row in chosen]
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [str(length) for length in lengths])
        panel.set_title(f"{pair[0]} query heads, {pair[1]} of keys and values", size="medium")
        panel.set_xlabel("tokens a sequence")
        panel.set_ylim(0, 1.08 * highest)
        panel.legend(loc="lower right")
    panels[0].set_ylabel("useful TFLOP/s")
    return figure


def rows(content: Row, look: Look = LIGHT) -> "Figure":
    """Bandwidth of each row-wise op as a share of a copy's."""
    names = [row["cell"] for row in content["rows"]]
    figure, (panel,) = figure_of(content, look, 1, 1.6 + 0.28 * len(names))
    shares = [row["share"] for row in content["rows"]]
    bars = panel.barh(names, shares, color=look.measured, height=0.7)
    for place, (name, share, bar) in enumerate(zip(names, shares, bars, strict=True)):
        bar.set_gid(f"marks-{place}")
        panel.annotate(
            f"{share:.2f}", (0, name), xytext=(5, 0), textcoords="offset points", va="center", color=look.paper
        )
    panel.grid(axis="y", visible=False)
    for goal in {row["goal"] for row in content["rows"]}:
        panel.axvline(goal, color=look.ideal, linestyle="--", label=f"goal {goal:g}")
    panel.axvline(1.0, color=look.ink, linestyle=":", label="a copy of as many bytes")
    panel.invert_yaxis()
    panel.set_xlabel("bandwidth / bandwidth of a copy")
    figure.legend(loc="outside lower right", ncols=2)
    return figure


def funnel(content: Row, look: Look = LIGHT) -> "Figure":
    """Latency ratio over the place of the funnel, measured and ideal, one panel for each batch."""
    batches = list(dict.fromkeys(row["batch"] for row in content["rows"]))
    figure, panels = figure_of(content, look, len(batches), 4.2)
    for panel, batch in zip(panels, batches, strict=False):
        chosen = [row for row in content["rows"] if row["batch"] == batch]
        layers = [row["layer"] for row in chosen]
        ratios, errors = whiskers(row["ratio"] for row in chosen)
        ideals = [row["ideal_ratio"] for row in chosen]
        panel.plot(layers, ideals, color=look.ideal, linestyle="--", marker="D", label="ideal (FLOPs)")
        panel.errorbar(layers, ratios, errors, color=look.measured, marker="o", capsize=4, label="measured")
        for row in chosen:
            at = row["layer"], row["ratio"]["median"]
            panel.annotate(f"{row['efficiency']:.3f}", at, xytext=(9, -14), textcoords="offset points")
        panel.axhline(1.0, color=look.ink, linewidth=1, linestyle=":", label="no funnel")
        panel.set_xticks(layers)
        panel.margins(x=0.2)
        panel.set_ylim(0, max(1.05, *(row["ratio"]["high"] + 0.05 for row in chosen)))
        panel.set_title(f"{batch} tokens; numbers: efficiency", size="medium")
        panel.set_xlabel("full-length layers before the funnel")
        panel.legend(loc="lower right")
    panels[0].set_ylabel("latency with funnel / without")
    return figure


def kernels(content: Row, look: Look = LIGHT) -> "Figure":
    """The most expensive kernels of a full batch."""
    (row,) = (row for row in content["rows"] if "most_expensive" in row)
    totals = row["most_expensive"]
    figure, (panel,) = figure_of(content, look, 1, 1.4 + 0.34 * len(totals))
    names = [shortened(total["name"]) for total in totals]
    panel.barh(range(len(totals)), [total["milliseconds"] for total in totals], color=look.measured, height=0.7)
    panel.set_yticks(range(len(totals)), names)
    for place, total in enumerate(totals):
        text = f"{100 * total['share']:.1f} %"
        panel.annotate(text, (total["milliseconds"], place), xytext=(4, 0), textcoords="offset points", va="center")
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("milliseconds in all, and share of all kernels' time")
    return figure


def shortened(name: str) -> str:
    """A kernel's name in what a plot has room for."""
    return name if len(name) <= 48 else f"{name[:30]}...{name[-15:]}"
