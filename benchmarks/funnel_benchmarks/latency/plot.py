"""A result as pictures: latency ratio and saving over the place of the funnel (cf. Figure 4 of arXiv:2504.02877), and
the efficiency of all that was measured."""

import itertools
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from funnel_benchmarks.describe import describe_machine, describe_model
from funnel_benchmarks.plot_style import LIGHT, Look, entitle, whiskers
from funnel_benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Marks of batches in one picture: shape, and whether it is filled.
MARKS = (("o", True), ("D", False), ("s", True), ("^", False), ("v", True), ("P", False))


def series(rows: list[Row]) -> list[Row]:
    """The rows that are drawn: those that differ from the first only in the place of their one funnel, in rising order.

    A sweep has many more kinds of rows than a picture shows; its first kind is the paper's.
    """

    def kind(row: Row) -> tuple[object, ...]:
        funnel = {name: value for name, value in row["funnel"].items() if name not in ("name", "strides")}
        return row["batch"]["name"], [stride for stride in row["funnel"]["strides"] if stride > 1], funnel

    return sorted((row for row in rows if kind(row) == kind(rows[0])), key=layers_before)


def layers_before(row: Row) -> int:
    """Full-length layers before the first funnel."""
    return next(layer for layer, stride in enumerate(row["funnel"]["strides"]) if stride > 1)


def draw(content: Row, look: Look = LIGHT) -> "Figure":
    """Above: measured latency ratio with whiskers from quartiles, and the ideal one. Below: the saving in per cent."""
    from matplotlib.figure import Figure  # not with the other imports: an optional dependency that takes a second

    rows = series(content["rows"])
    layers = [layers_before(row) for row in rows]
    ratios, errors = whiskers(row["ratio"] for row in rows)
    ideals = [row["ideal_ratio"] for row in rows]
    figure = Figure(figsize=look.inches, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))

    above.axhline(1.0, color=look.ink, linewidth=1, linestyle=":", label="no funnel")
    (ideal_line,) = above.plot(
        layers, ideals, color=look.ideal, linestyle="--", marker="D", markersize=5, label="ideal (FLOPs)"
    )
    ideal_line.set_gid("marks-ideal-ratio")
    measured_line, _, _ = above.errorbar(
        layers, ratios, errors, color=look.measured, marker="o", capsize=4, label="measured (quartiles)"
    )
    measured_line.set_gid("marks-ratio")
    above.set_ylim(0, max(1.05, *(row["ratio"]["high"] + 0.05 for row in rows)))
    above.set_ylabel("latency with funnel / without")
    above.legend(loc="lower right")
    model, machine = describe_model(content["options"]["model"]), describe_machine(content["machine"])
    entitle(figure, look, model, describe_kind(rows[0]), machine)

    savings = [row["saving_percent"] for row in rows]
    ideal_savings = [100 * (1 - ideal) for ideal in ideals]
    bars = below.bar(
        layers, savings, width=0.55 * min(np.diff(layers), default=1), color=look.measured, label="measured"
    )
    for layer, bar in zip(layers, bars, strict=True):
        bar.set_gid(f"marks-saving-{layer}")
    (ideal_marks,) = below.plot(
        layers,
        ideal_savings,
        label="ideal (FLOPs)",
        color=look.ideal,
        linestyle="none",
        marker="D",
        markersize=7,
        markeredgecolor=look.paper,
    )
    ideal_marks.set_gid("marks-ideal-saving")
    for layer, saving, ideal in zip(layers, savings, ideal_savings, strict=True):
        top = layer, max(saving, ideal, 0)
        below.annotate(f"{saving:.0f}", top, xytext=(0, 7), textcoords="offset points", ha="center")
    below.margins(y=0.18)
    below.axhline(0, color=look.ink, linewidth=1)
    below.set_ylabel("latency saved (%)")
    stride = rows[0]["funnel"]["strides"][layers[0]]
    below.set_xlabel(f"full-length layers before the {stride}:1 funnel (of {content['options']['model']['layers']})")
    below.set_xticks(layers)
    below.legend(loc="upper right")
    return figure


def draw_efficiency(content: Row, look: Look = LIGHT) -> "Figure":
    """A line for each funnel, with a mark for each batch at its efficiency; whiskers from the range of the ratio.

    As wide as the look says, and as high as the funnels need.
    """
    from matplotlib.figure import Figure

    rows = content["rows"]
    funnels = list(dict.fromkeys(row["funnel"]["name"] for row in rows))
    batches = list(dict.fromkeys(row["batch"]["name"] for row in rows))
    labels = [textwrap.wrap(funnel, int(12 + 2.5 * look.inches[0])) for funnel in funnels]
    inches = max(0.05 + 0.19 * max(map(len, labels)), 0.13 * len(batches))  # that each funnel takes
    figure = Figure(figsize=(look.inches[0], 1.5 + 0.25 * len(batches) + inches * len(funnels)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1.0, color=look.ideal, linestyle="--", label="ideal (FLOPs)").set_gid("marks-ideal")
    offsets = 0.7 * ((np.arange(len(batches)) + 0.5) / len(batches) - 0.5)
    for index, (batch, offset, (marker, filled)) in enumerate(zip(batches, offsets, itertools.cycle(MARKS))):
        chosen = [row for row in rows if row["batch"]["name"] == batch]
        places = [funnels.index(row["funnel"]["name"]) + offset for row in chosen]
        low, middle, high = (
            np.array([row["ideal_ratio"] / row["ratio"][bound] for row in chosen])
            for bound in ("high", "median", "low")
        )
        points, _, _ = axes.errorbar(
            middle,
            places,
            xerr=(middle - low, high - middle),
            label="\n".join(textwrap.wrap(batch, 40)),
            color=look.measured,
            linestyle="none",
            marker=marker,
            capsize=3,
            linewidth=1,
            markerfacecolor=look.measured if filled else look.paper,
        )
        points.set_gid(f"marks-efficiency-{index}")
    axes.set_yticks(range(len(funnels)), ["\n".join(label) for label in labels])
    axes.set_ylim(len(funnels) - 0.4, -0.6)
    axes.tick_params(top=True, labeltop=True)  # the bottom may be far away
    axes.set_xlabel("efficiency")
    figure.legend(loc="outside upper right")
    return figure


def describe_kind(row: Row) -> str:
    """Batch and options that all rows of a series share."""
    funnel = row["funnel"]
    queries = ", queries only" if funnel["pool_query_only"] else ""
    return f"{row['batch']['name']}; {funnel['pool']} pooling{queries}, recovery {funnel['recovery'] or 'none'}"
