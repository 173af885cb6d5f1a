"""A picture of a training run: the loss of each step, and the agreement on held-out texts."""

from pathlib import Path
from typing import Any


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """Draws the entries of a log as a PNG file."""
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    loss_axes, agreement_axes = figure.subplots(2, 1, sharex=True)
    losses = [entry for entry in entries if "loss" in entry]
    loss_axes.plot([entry["step"] for entry in losses], [entry["loss"] for entry in losses], color="0.4", linewidth=0.8)
    loss_axes.set_ylabel("loss")
    held_out = [entry for entry in entries if "overlap" in entry]
    steps = [entry["step"] for entry in held_out]
    for name, label in (("overlap", "overlap@10"), ("held_out_cosine", "cosine")):
        agreement_axes.plot(steps, [entry[name] for entry in held_out], marker="o", markersize=3, label=label)
    agreement_axes.set_ylabel("held-out texts")
    agreement_axes.set_xlabel("step")
    agreement_axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)
