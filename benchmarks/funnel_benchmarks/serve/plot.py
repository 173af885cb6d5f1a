"""A result as a picture: latency over the rate of arrivals."""

from typing import TYPE_CHECKING

from funnel_benchmarks.describe import describe_machine, describe_model
from funnel_benchmarks.plot_style import LIGHT, Look, entitle, logarithmic_heights
from funnel_benchmarks.results import Row
from funnel_benchmarks.serve.names import BASELINE, offline_name, offline_rates, online_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = 2.6  # high
TOP_INCHES = 1.2  # for title and legend


def draw(content: Row, look: Look = LIGHT) -> "Figure":
    """A panel for each kind of requests, one above the other; as wide as the look says, and as high as they need."""
    from matplotlib.figure import Figure  # not with the other imports: an optional dependency that takes a second

    kinds = list(dict.fromkeys(row["lengths"] for row in online_rows(content)))
    figure = Figure(figsize=(look.inches[0], TOP_INCHES + PANEL_INCHES * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    for number, (kind, axes) in enumerate(zip(kinds, panels, strict=True)):
        draw_panel(axes, content, kind, f"marks-{number}", look)
    panels[-1].set_xlabel("arrivals per second")
    columns = 2 if look.inches[0] > 6 else 1
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=columns)
    entitle(figure, look, describe_model(content["options"]["model"]), describe_machine(content["machine"]))
    return figure


def draw_panel(axes: "Axes", content: Row, kind: str, gid: str, look: Look) -> None:
    """Median and 99th percentile of each engine; dotted lines stand at the offline rates.

    Args:
        gid: begins the name of each line.
    """
    funnel, requests = content["options"]["funnel"]["name"], content["options"]["requests"]
    offline = next((offline_rates(row) for row in content["rows"] if row["cell"] == offline_name(kind)), ())
    ways = (BASELINE, "baseline", look.ideal, "D"), (funnel, "funnel", look.measured, "o")
    for index, (engine, name, colour, marker) in enumerate(ways):
        rows = [row for row in online_rows(content) if (row["lengths"], row["engine"]) == (kind, engine)]
        rows.sort(key=lambda row: row["arrivals_per_second"])
        rates = [row["arrivals_per_second"] for row in rows]
        for percentile, style, of in (("p50", "-", ""), ("p99", "--", f" of {requests}")):
            (line,) = axes.plot(
                rates,
                [1e3 * row[percentile] for row in rows],
                color=colour,
                linestyle=style,
                marker=marker,
                markersize=5,
                label=f"{engine}, {percentile}{of}",
            )
            line.set_gid(f"{gid}-{name}-{percentile}")
        for rate in offline[index : index + 1]:
            axes.axvline(rate, color=colour, linestyle=":").set_gid(f"{gid}-{name}-offline")
    axes.set_xlim(left=0)
    logarithmic_heights(axes)
    axes.set_ylabel("latency (ms)")
    axes.set_title(kind, loc="left", size="medium")
