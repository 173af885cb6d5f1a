"""A result as a picture: latency over each size, beside its work."""

from typing import TYPE_CHECKING

from funnel_benchmarks.describe import describe_machine, describe_model
from funnel_benchmarks.plot_style import LIGHT, Look, entitle, logarithmic_heights, whiskers
from funnel_benchmarks.results import Row
from funnel_benchmarks.scaling.axes import AXES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = 2.8  # high
TOP_INCHES = 1.2  # for title and legend
MANY = 7  # sizes: every other one has its number
TWO_COLUMNS = 6  # inches of width from which panels stand side by side


def draw(content: Row, look: Look = LIGHT) -> "Figure":
    """A panel for each axis; as wide as the look says, and as high as they need."""
    from matplotlib.figure import Figure  # not with the other imports: an optional dependency that takes a second

    axes = [axis for axis in AXES if any(row["axis"] == axis for row in content["rows"])]
    columns = min(len(axes), 2 if look.inches[0] > TWO_COLUMNS else 1)
    lines = -(-len(axes) // columns)
    figure = Figure(figsize=(look.inches[0], TOP_INCHES + PANEL_INCHES * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axis, panel in zip(axes, panels, strict=False):
        draw_panel(panel, [row for row in content["rows"] if row["axis"] == axis], axis, look)
    for panel in panels[len(axes) :]:
        panel.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=columns)
    entitle(figure, look, describe_model(content["options"]["model"]), describe_machine(content["machine"]))
    return figure


def draw_panel(panel: "Axes", rows: list[Row], axis: str, look: Look) -> None:
    """Medians with whiskers from quartiles, and for each engine its work as a line through the last median."""
    from matplotlib.ticker import FixedLocator, NullLocator

    rows = sorted(rows, key=lambda row: row["x"])
    sizes = [row["x"] for row in rows]
    for prefix, name, colour, marker in (
        ("baseline_", "no funnel", look.ideal, "D"),
        ("", "with funnel", look.measured, "o"),
    ):
        medians, errors = whiskers((row[f"{prefix}seconds"] for row in rows), 1e3)
        works = [work(row, prefix) for row in rows]
        scaled = [medians[-1] * each / works[-1] for each in works]
        gid = f"marks-{axis}-{prefix or 'funnel_'}"
        (line,) = panel.plot(sizes, scaled, color=colour, linestyle="--", linewidth=1, label=f"{name}: its work")
        line.set_gid(f"{gid}work")
        points, _, _ = panel.errorbar(
            sizes, medians, errors, color=colour, linestyle="none", marker=marker, markersize=5, capsize=4, label=name
        )
        points.set_gid(f"{gid}latency")
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(sizes[:: -1 if len(sizes) < MANY else -2]))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panel.xaxis.set_minor_locator(NullLocator())
    logarithmic_heights(panel)
    panel.set_xlabel(AXES[axis])
    panel.set_ylabel("latency (ms)")


def work(row: Row, prefix: str) -> float:
    """FLOPs, and on the axis of threads those of each thread."""
    flops: int = row[f"{prefix}flops"]
    return flops / row["x"] if row["axis"] == "threads" else flops
