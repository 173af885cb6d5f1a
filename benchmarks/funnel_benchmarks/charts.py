"""Pictures of results, which suites declare as data, and how they look."""

import importlib.util
import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from funnel_benchmarks.results import Row
from funnel_kernels.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


TOP_INCHES = 1.2  # for title and legend
TWO_COLUMNS = 6  # inches of width from which panels stand side by side


class Look(NamedTuple):
    """Colours and size of a picture, and whether it says above what was measured where."""

    measured: str
    ideal: str
    ink: str
    paper: str
    grid: str
    inches: tuple[float, float] = (8.0, 7.4)
    titled: bool = True


# Two colours of Okabe and Ito, which every kind of eye tells apart: blue and vermilion, or lighter ones on dark.
LIGHT = Look(measured="#0072b2", ideal="#d55e00", ink="#222222", paper="#ffffff", grid="#dddddd")
DARK = Look(measured="#56b4e9", ideal="#e69f00", ink="#e6e6e6", paper="#16181d", grid="#3a3f4a")


def require_matplotlib() -> None:
    """Raises `ConfigError` if there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib, which is not installed: pip install 'funnel-engine[bench]'")


@contextmanager
def styled(look: Look) -> Iterator[None]:
    """Matplotlib's settings while a picture is drawn and saved."""
    import matplotlib

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    paper = ("figure.facecolor", "axes.facecolor", "legend.facecolor")
    settings: Any = (
        dict.fromkeys(ink, look.ink)
        | dict.fromkeys(paper, look.paper)
        | {
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": look.grid,
            "legend.edgecolor": look.grid,
            "text.parse_math": False,  # a model may be called anything
            "font.size": 11,
            "svg.hashsalt": "funnel",  # the same picture is the same file
        }
    )
    with matplotlib.rc_context(settings):
        yield


class Series(NamedTuple):
    """One kind of marks in a panel.

    Attributes:
        label: in the legend.
        at: places along the axis of what was varied; in a panel of rows the numbers of the rows.
        values: numbers, or {low, median, high}, which have whiskers.
        colour: the name of one in `Look`.
        marker, line: in matplotlib's letters; empty: none.
        hollow: whether only the rim of the marks is coloured.
    """

    label: str
    at: Sequence[float]
    values: Sequence[Row | float]
    colour: str = "measured"
    marker: str = "o"
    line: str = ""
    hollow: bool = False


class Panel(NamedTuple):
    """Marks around two axes: values upwards over what was varied, or to the right with a named row for each thing.

    Attributes:
        label, value_label: of the axis of what was varied, and of that of values.
        rows: names of rows; empty: values go upwards.
        references: values at which a dashed line stands, by their label in the legend.
        marked: places at which a dotted line stands, by colour.
        log, log_values: axes that are logarithmic. Others begin at 0.
        ticks: places with a number; empty: matplotlib's.
    """

    series: Sequence[Series]
    label: str = ""
    value_label: str = ""
    title: str = ""
    rows: Sequence[str] = ()
    references: dict[str, float] = {}  # noqa: RUF012
    marked: Sequence[tuple[float, str]] = ()
    log: bool = False
    log_values: bool = False
    ticks: Sequence[float] = ()

    @property
    def inches(self) -> float:
        """How high it is."""
        return 0.8 + len(self.rows) * max(0.45, 0.16 * len(self.series)) if self.rows else 2.8


class Chart(NamedTuple):
    """A picture.

    Attributes:
        described: its content in words, for those who cannot see it.
        caption: the line below it.
        panels: in lines of `columns`, or one below the other where there is not enough width.
        facts: lines above it.
    """

    described: str
    caption: str
    panels: Sequence[Panel]
    facts: Sequence[str] = ()
    columns: int = 1

    def draw(self, look: Look) -> "Figure":
        """As wide as the look says, and as high as needed. Each series has a `gid` "marks-PANEL-SERIES"."""
        from matplotlib.figure import Figure  # an optional dependency that takes a second

        columns = min(self.columns if look.inches[0] > TWO_COLUMNS else 1, len(self.panels))
        lines = [self.panels[start : start + columns] for start in range(0, len(self.panels), columns)]
        heights = [max(panel.inches for panel in line) for line in lines]
        figure = Figure(figsize=(look.inches[0], TOP_INCHES + sum(heights)), layout="constrained")
        everything = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights).flat
        legend: dict[str, Any] = {}
        for number, axes in enumerate(everything):
            if number < len(self.panels):
                draw_panel(axes, self.panels[number], look, f"marks-{number}")
                handles, labels = axes.get_legend_handles_labels()
                legend |= dict(zip(labels, handles, strict=True))
            else:
                axes.set_visible(False)
        columns = 2 if look.inches[0] > TWO_COLUMNS else 1
        figure.legend(legend.values(), legend.keys(), loc="outside lower left", ncols=columns)
        if look.titled:
            fitting = (textwrap.wrap(fact, int(10.5 * look.inches[0])) for fact in self.facts)
            figure.suptitle("\n".join(line for fact in fitting for line in fact), x=0.02, ha="left", size="medium")
        return figure


def draw_panel(axes: "Axes", panel: Panel, look: Look, gid: str) -> None:
    across = bool(panel.rows)
    for number, series in enumerate(panel.series):
        colour, median, errors = getattr(look, series.colour), *whiskers(series.values)
        at = np.array(series.at, float)
        if across:  # so that the series of a row do not hide each other
            at += 0.7 * ((number + 0.5) / len(panel.series) - 0.5)
        whisker: Any = {"xerr" if across else "yerr": errors}
        marks = axes.errorbar(
            *((median, at) if across else (at, median)),
            **whisker,
            label=series.label,
            color=colour,
            markerfacecolor=look.paper if series.hollow else colour,
            marker=series.marker,
            linestyle=series.line,
            linewidth=1.2,
            markersize=6,
            capsize=3,
        )
        marks.lines[0].set_gid(f"{gid}-{number}")
    for number, (label, value) in enumerate(panel.references.items()):
        line = (axes.axvline if across else axes.axhline)(value, color=look.ideal, linestyle="--", label=label)
        line.set_gid(f"{gid}-reference-{number}")
    for number, (place, colour) in enumerate(panel.marked):
        axes.axvline(place, color=getattr(look, colour), linestyle=":").set_gid(f"{gid}-marked-{number}")
    axes.set_title(panel.title, loc="left", size="medium")
    axes.set_xlabel(panel.value_label if across else panel.label)
    axes.set_ylabel("" if across else panel.value_label)
    if across:
        width = int(12 + 2.5 * look.inches[0])
        axes.set_yticks(range(len(panel.rows)), ["\n".join(textwrap.wrap(name, width)) for name in panel.rows])
        axes.set_ylim(len(panel.rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
    if panel.log:
        axes.set_xscale("log")
        axes.minorticks_off()
    if panel.ticks:
        axes.set_xticks(panel.ticks, [f"{tick:,g}" for tick in panel.ticks])
    if panel.log_values:
        logarithmic_heights(axes)
    elif not across:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))


def whiskers(values: Sequence[Row | float]) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """Medians, and how far the bounds lie below and above; None for plain numbers."""
    if not all(isinstance(value, dict) for value in values):
        return np.array(values, float), None
    low, median, high = np.array([[value[name] for name in ("low", "median", "high")] for value in values]).T  # type: ignore[index]
    return median, (median - low, high - median)


def times(factor: float, figure: Row) -> Row:
    """{low, median, high} in another unit."""
    return {name: factor * figure[name] for name in ("low", "median", "high")}


def render(chart: Chart, format: str, look: Look = LIGHT) -> bytes:
    """A picture as "png", "svg" or "pdf"."""
    buffer = io.BytesIO()
    with styled(look):
        metadata = {"Date": None} if format == "svg" else {}
        chart.draw(look).savefig(buffer, format=format, dpi=150, metadata=metadata)
    return buffer.getvalue()


def logarithmic_heights(axes: "Axes") -> None:
    """Makes the vertical axis logarithmic, with plain numbers beside it; call it once everything is drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    few = high < 5 * low  # too few powers of ten and their multiples for an axis
    axes.yaxis.set_major_locator(MaxNLocator(4) if few else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
