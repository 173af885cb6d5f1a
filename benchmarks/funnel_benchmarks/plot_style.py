"""How plots look, and whether there is something to draw them with."""

import importlib.util
import io
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from funnel_benchmarks.results import Row
from funnel_kernels.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def render(draw: Callable[[Look], "Figure"], format: str, look: Look = LIGHT) -> bytes:
    """A picture as "png", "svg" or "pdf"."""
    buffer = io.BytesIO()
    with styled(look):
        metadata = {"Date": None} if format == "svg" else {}
        draw(look).savefig(buffer, format=format, dpi=150, metadata=metadata)
    return buffer.getvalue()


def entitle(figure: "Figure", look: Look, *facts: str) -> None:
    """Says above what was measured where, in lines that fit, if the look has it said."""
    if look.titled:
        lines = [line for fact in facts for line in textwrap.wrap(fact, int(10.5 * look.inches[0]))]
        figure.suptitle("\n".join(lines), x=0.02, ha="left", size="medium")


def whiskers(spreads: Iterable[Row], factor: float = 1.0) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Medians of {low, median, high}, and how far the bounds lie below and above: what `Axes.errorbar` takes."""
    low, median, high = factor * np.array([[each[name] for name in ("low", "median", "high")] for each in spreads]).T
    return median, (median - low, high - median)


def logarithmic_heights(axes: "Axes") -> None:
    """Makes the vertical axis logarithmic, with plain numbers beside it; call it once everything is drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    few = high < 5 * low  # too few powers of ten and their multiples for an axis
    axes.yaxis.set_major_locator(MaxNLocator(4) if few else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
