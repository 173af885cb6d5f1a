"""A result as a picture: latency ratio and saving over the place of the funnel (cf. Figure 4 of arXiv:2504.02877)."""

import io
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from funnel_benchmarks.latency.table import describe_machine, describe_model
from funnel_benchmarks.plot_style import LIGHT, Look, styled
from funnel_benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render(content: Row, format: str, look: Look = LIGHT) -> bytes:
    """The picture as "png", "svg" or "pdf"."""
    buffer = io.BytesIO()
    with styled(look):
        metadata = {"Date": None} if format == "svg" else {}
        draw(content, look).savefig(buffer, format=format, dpi=150, metadata=metadata)
    return buffer.getvalue()


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
    ratios = [row["ratio"]["median"] for row in rows]
    ideals = [row["ideal_ratio"] for row in rows]
    whiskers = [
        [row["ratio"]["median"] - row["ratio"]["low"] for row in rows],
        [row["ratio"]["high"] - row["ratio"]["median"] for row in rows],
    ]
    figure = Figure(figsize=look.inches, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))

    above.axhline(1.0, color=look.ink, linewidth=1, linestyle=":", label="no funnel")
    above.plot(layers, ideals, color=look.ideal, linestyle="--", marker="D", markersize=5, label="ideal (FLOPs)")
    above.errorbar(layers, ratios, whiskers, color=look.measured, marker="o", capsize=4, label="measured (quartiles)")
    above.set_ylim(0, max(1.05, *(row["ratio"]["high"] + 0.05 for row in rows)))
    above.set_ylabel("latency with funnel / without")
    above.legend(loc="lower right")
    if look.titled:
        lines = title(content, rows[0], characters=int(10.5 * look.inches[0]))
        figure.suptitle("\n".join(lines), x=0.02, ha="left", size="medium")

    savings = [row["saving_percent"] for row in rows]
    ideal_savings = [100 * (1 - ideal) for ideal in ideals]
    below.bar(layers, savings, width=0.55 * min(np.diff(layers), default=1), color=look.measured, label="measured")
    below.plot(
        layers, ideal_savings, label="ideal (FLOPs)",
        color=look.ideal, linestyle="none", marker="D", markersize=7, markeredgecolor=look.paper,
    )  # fmt: skip
    for layer, saving, ideal in zip(layers, savings, ideal_savings, strict=True):
        top = layer, max(saving, ideal, 0)
        below.annotate(f"{saving:.0f} %", top, xytext=(0, 7), textcoords="offset points", ha="center")
    below.margins(y=0.18)
    below.axhline(0, color=look.ink, linewidth=1)
    below.set_ylabel("latency saved (%)")
    stride = rows[0]["funnel"]["strides"][layers[0]]
    below.set_xlabel(f"full-length layers before the {stride}:1 funnel (of {content['options']['model']['layers']})")
    below.set_xticks(layers)
    below.legend(loc="upper right")
    return figure


def describe_kind(row: Row) -> str:
    """Batch and options that all rows of a series share."""
    funnel = row["funnel"]
    queries = ", queries only" if funnel["pool_query_only"] else ""
    return f"{row['batch']['name']}; {funnel['pool']} pooling{queries}, recovery {funnel['recovery'] or 'none'}"


def title(content: Row, row: Row, characters: int) -> list[str]:
    """Model, batch, dtype and machine, in lines of at most so many characters."""
    facts = (
        describe_model(content["options"]["model"]),
        describe_kind(row),
        describe_machine(content["machine"]),
    )
    return [line for fact in facts for line in textwrap.wrap(fact, characters)]
