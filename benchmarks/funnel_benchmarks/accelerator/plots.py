"""The plots of a report. matplotlib is imported where it is used: a machine with an accelerator may not have it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from funnel_benchmarks import plot_style
from funnel_benchmarks.plot_style import LIGHT, whiskers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = dict[str, Any]
THIRD = "#009e73"  # bluish green, of the same palette as the two colours of LIGHT


def render(figure: Callable[[Table], "Figure"], table: Table) -> bytes:
    """A plot as PNG.

    Raises:
        ImportError: there is no matplotlib.
    """
    return plot_style.render(lambda look: figure(table), "png")


def figure_of(table: Table, columns: int, inches: tuple[float, float]) -> tuple["Figure", list[Any]]:
    """An empty figure that says above what was measured where, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    machine = table["machine"]
    title = f"{', '.join(machine['devices'])}, jax {machine['jax']}, {table['started'][:10]}"
    figure.suptitle(
        title + (" (rehearsal sizes)" if table["options"]["small"] else ""), x=0.02, ha="left", size="medium"
    )
    return figure, list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])


def attention(table: Table) -> "Figure":
    """Rates over the length of a sequence, one panel for each pair of head counts."""
    rows = [row for row in table["rows"] if row["kind"] == "dense"]
    heads = sorted({(row["heads"], row["kv_heads"]) for row in rows})
    figure, panels = figure_of(table, len(heads), (9.0, 4.2))
    highest = max(row.get(key, 0) for row in rows for key in ("tflops_per_second", "peer_tflops_per_second"))
    for panel, pair in zip(panels, heads, strict=False):
        chosen = [row for row in rows if (row["heads"], row["kv_heads"]) == pair]
        lines = (("tflops_per_second", "ours", LIGHT.measured), ("peer_tflops_per_second", "cuDNN", LIGHT.ideal))
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


def rows(table: Table) -> "Figure":
    """Bandwidth of each row-wise op as a share of a copy's."""
    names = [row["cell"] for row in table["rows"]]
    figure, (panel,) = figure_of(table, 1, (9.0, 1.6 + 0.28 * len(names)))
    shares = [row["share"] for row in table["rows"]]
    panel.barh(names, shares, color=LIGHT.measured, height=0.7)
    for name, share in zip(names, shares, strict=True):
        panel.annotate(
            f"{share:.2f}", (0, name), xytext=(5, 0), textcoords="offset points", va="center", color=LIGHT.paper
        )
    panel.grid(axis="y", visible=False)
    for goal in {row["goal"] for row in table["rows"]}:
        panel.axvline(goal, color=LIGHT.ideal, linestyle="--", label=f"goal {goal:g}")
    panel.axvline(1.0, color=LIGHT.ink, linestyle=":", label="a copy of as many bytes")
    panel.invert_yaxis()
    panel.set_xlabel("bandwidth / bandwidth of a copy")
    figure.legend(loc="outside lower right", ncols=2)
    return figure


def funnel(table: Table) -> "Figure":
    """Latency ratio over the place of the funnel, measured and ideal, one panel for each batch."""
    batches = list(dict.fromkeys(row["batch"] for row in table["rows"]))
    figure, panels = figure_of(table, len(batches), (9.0, 4.2))
    for panel, batch in zip(panels, batches, strict=False):
        chosen = [row for row in table["rows"] if row["batch"] == batch]
        layers = [row["layer"] for row in chosen]
        ratios, errors = whiskers(row["ratio"] for row in chosen)
        ideals = [row["ideal_ratio"] for row in chosen]
        panel.plot(layers, ideals, color=LIGHT.ideal, linestyle="--", marker="D", label="ideal (FLOPs)")
        panel.errorbar(layers, ratios, errors, color=LIGHT.measured, marker="o", capsize=4, label="measured")
        for row in chosen:
            at = row["layer"], row["ratio"]["median"]
            panel.annotate(f"{row['efficiency']:.3f}", at, xytext=(9, -14), textcoords="offset points")
        panel.axhline(1.0, color=LIGHT.ink, linewidth=1, linestyle=":", label="no funnel")
        panel.set_xticks(layers)
        panel.margins(x=0.2)
        panel.set_ylim(0, max(1.05, *(row["ratio"]["high"] + 0.05 for row in chosen)))
        panel.set_title(f"{batch} tokens; numbers: efficiency", size="medium")
        panel.set_xlabel("full-length layers before the funnel")
        panel.legend(loc="lower right")
    panels[0].set_ylabel("latency with funnel / without")
    return figure


def kernels(table: Table) -> "Figure":
    """The most expensive kernels of a full batch."""
    (row,) = (row for row in table["rows"] if "most_expensive" in row)
    totals = row["most_expensive"]
    figure, (panel,) = figure_of(table, 1, (9.0, 1.4 + 0.34 * len(totals)))
    names = [shortened(total["name"]) for total in totals]
    panel.barh(range(len(totals)), [total["milliseconds"] for total in totals], color=THIRD, height=0.7)
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


# file name -> (the table it is of, whether there is something to draw, what draws it)
PLOTS: dict[str, tuple[str, Callable[[Table], bool], Callable[[Table], "Figure"]]] = {
    "attention.png": ("attention", lambda table: any(row["kind"] == "dense" for row in table["rows"]), attention),
    "rows.png": ("rows", lambda table: bool(table["rows"]), rows),
    "funnel.png": ("funnel", lambda table: bool(table["rows"]), funnel),
    "kernels.png": ("latency", lambda table: any("most_expensive" in row for row in table["rows"]), kernels),
}
