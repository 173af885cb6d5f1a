"""Our saving beside what arXiv:2504.02877 reports for Gemma 2B (18 layers, 2:1 max pooling, on TPUs)."""

from funnel_benchmarks.results import Row
from funnel_engine import FunnelConfig

PAPER = "arXiv:2504.02877 (Gemma 2B on a TPU)"
LAYERS = 18
# Full-length layers before the funnel -> the saving, as the paper puts it: "over 40 %" early in the stack, 44 % in
# Figure 4, and "around 5 %" at the end.
SAVINGS = {2: "44 %", 16: "about 5 %"}


def beside_paper(content: Row) -> list[str]:
    """A line for each batch; none if a result has no such model or none of the paper's places."""
    if content["options"]["model"]["layers"] != LAYERS:
        return []
    ours: dict[str, list[str]] = {}
    for row in content["rows"]:
        layer = paper_layer(row["funnel"])
        if layer in SAVINGS:
            saved = f"{row['saving_percent']:.1f} % after layer {layer} (paper: {SAVINGS[layer]})"
            ours.setdefault(row["batch"]["name"], []).append(saved)
    return [f"saved, beside {PAPER}: {', '.join(saved)}; {batch}" for batch, saved in ours.items()]


def paper_layer(funnel: Row) -> int | None:
    """The number of full-length layers before a funnel of the paper's kind; None for any other."""
    options = {name: value for name, value in funnel.items() if name != "name"}
    given = FunnelConfig(**options)
    layer = len(given.strides) - 1
    return layer if given == FunnelConfig.after(layer, stride=2) else None
