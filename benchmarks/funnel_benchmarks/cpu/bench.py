"""What the rows of a run share: sizes, models, engines with their weights, and how two calls are compared."""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from funnel_benchmarks.cpu.sizes import Sizes
from funnel_benchmarks.engine_costs import timed
from funnel_benchmarks.measure import compiling_nothing, spread
from funnel_benchmarks.models import Model, checkpoint_model
from funnel_benchmarks.peers.checkpoint import write_random_model
from funnel_benchmarks.peers.peer import Peer
from funnel_benchmarks.results import Row
from funnel_benchmarks.statistics import Spread, interleave, quartiles, ratio
from funnel_engine import Engine, convert
from funnel_kernels.errors import FunnelError

BACKEND = "auto"


@dataclasses.dataclass
class Bench:
    """One run.

    Attributes:
        repeats: how often A B B A is run for each row.
        folder: for checkpoints; it is the caller's to remove.
        engines: by model, made when first asked for.
    """

    sizes: Sizes
    repeats: int
    folder: Path
    engines: dict[str, Engine] = dataclasses.field(default_factory=dict)

    def source(self, name: str) -> Path:
        """The model with random weights as Hugging Face reads it, made when first asked for."""
        folder = self.folder / f"{name} source"
        if not folder.exists():
            write_random_model(folder, self.sizes.models[name])
        return folder

    def checkpoint(self, name: str) -> Path:
        """The same model as `convert` writes it."""
        folder = self.folder / name
        if not folder.exists():
            convert(self.source(name), folder)
        return folder

    @functools.cached_property
    def whole_checkpoint(self) -> Path:
        """Of "gemma-2b". Nothing else needs its source, and disks are finite."""
        folder = self.checkpoint("gemma-2b")
        shutil.rmtree(self.source("gemma-2b"))
        return folder

    def engine(self, name: str) -> Engine:
        if name not in self.engines:
            self.engines[name] = Engine.load(self.checkpoint(name), backend=BACKEND)
        return self.engines[name]

    @functools.cached_property
    def whole(self) -> tuple[Model, Mapping[str, Any]]:
        """The model "gemma-2b", and its weights as the engine wants them."""
        model = checkpoint_model(self.whole_checkpoint, None)
        return model, model.load(Console(quiet=True), BACKEND)


def against(call: Callable[[], Any], peer: Peer, repeats: int, goal: float | None) -> Row:
    """Times our call and the peer's in turns: how many times as fast ours is, which should be `goal` at least."""
    ours = timed(call)
    with compiling_nothing():
        seconds, peer_seconds = interleave(ours, peer.sample, repeats, lambda: None)
    return speedup(peer_seconds, seconds, goal) | {"peer": peer.facts}


def speedup(slow: list[float], fast: list[float], goal: float | None) -> Row:
    """A row about `slow` over `fast`, samples in seconds."""
    times = ratio(quartiles(slow), quartiles(fast))
    return {"seconds": spread(fast), "other_seconds": spread(slow)} | judged("times", times, goal)


def judged(unit: str, measured: Spread, goal: float | None, *, at_most: bool = False) -> Row:
    """What every row has: the figure and its spread, the goal, and whether the median reaches it (or stays below)."""
    met = None if goal is None else measured.median <= goal if at_most else measured.median >= goal
    return {"unit": unit, "measured": measured._asdict(), "goal": goal, "met": met}


def check_same(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> float:
    """The greatest relative difference of two results [B, D], by rows: |ours - theirs| / |theirs|.

    Raises:
        FunnelError: it is more than `tolerance`, so that their time is no measure of ours.
    """
    if ours.shape != theirs.shape:
        raise FunnelError(f"the peer's result is {theirs.shape} where ours is {ours.shape}: it computes something else")
    apart = np.linalg.norm(np.float64(ours) - np.float64(theirs), axis=1) / np.linalg.norm(np.float64(theirs), axis=1)
    if not (worst := float(apart.max())) <= tolerance:
        raise FunnelError(
            f"the results differ by {worst:.3g} of their size, where {tolerance:g} may be: the peer, or the engine, "
            "computes something else"
        )
    return worst
