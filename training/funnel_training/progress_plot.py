"""A picture of a training run: the loss of each step, and the figures of the evaluations."""

from pathlib import Path
from typing import Any

from funnel_engine.output_files import write_bytes
from funnel_training.pictures import png


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """Draws the entries of a log as a PNG file. Entries with `is_best` are evaluations.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    loss_axes, figure_axes = figure.subplots(2, 1, sharex=True)
    losses = [entry for entry in entries if "loss" in entry]
    loss_axes.plot([entry["step"] for entry in losses], [entry["loss"] for entry in losses], color="0.4", linewidth=0.8)
    loss_axes.set_ylabel("loss")
    evaluations = [entry for entry in entries if "is_best" in entry]
    steps = [entry["step"] for entry in evaluations]
    for name in (name for name in evaluations[0] if name not in ("step", "is_best")):
        figure_axes.plot(steps, [entry[name] for entry in evaluations], marker="o", markersize=3, label=name)
    figure_axes.set_ylabel("held-out texts")
    figure_axes.set_xlabel("step")
    figure_axes.legend(loc="lower right", frameon=False)
    write_bytes(path, png(figure, dpi=120))
