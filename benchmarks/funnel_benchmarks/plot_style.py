"""How plots look, and whether there is something to draw them with."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from funnel_kernels.errors import ConfigError


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
