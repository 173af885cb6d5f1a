"""The picture of a plan: quality beside latency."""

from funnel_training.pictures import png
from funnel_training.plan import Plan

# Colours of Okabe and Ito, which colour-blind people can tell apart.
KINDS: dict[str, tuple[str, str]] = {
    "funnel": ("#0072b2", "o"),
    "by length": ("#56b4e9", "D"),
    "layers": ("#d55e00", "s"),
    "tokens": ("#009e73", "^"),
    "dtype": ("#e69f00", "P"),
}


def draw(plan: Plan) -> bytes:
    """What was timed, as a PNG."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot()
    bound = 1 - plan.options["max_loss"]
    axes.axhline(bound, color="gray", linestyle="--", linewidth=1, label=f"the bound, {bound:g}")
    axes.plot(1, 1, "k*", markersize=11, label="no funnel")
    for number, (each, ratio, latency) in enumerate(plan.timed(), start=1):
        color, marker = KINDS[each.kind]
        axes.errorbar(
            latency.ratio,
            ratio.value,
            xerr=arms(latency.low, latency.ratio, latency.high),
            yerr=arms(ratio.low, ratio.value, ratio.high),
            fmt=marker,
            color=color,
            markersize=6,
            elinewidth=0.8,
            label=f"{number}: {each.name}",
        )
        is_left = number % 2 == 1  # neighbours have their numbers on different sides
        axes.annotate(
            str(number),
            (latency.ratio, ratio.value),
            xytext=(-6 if is_left else 6, 5),
            textcoords="offset points",
            ha="right" if is_left else "left",
            color=color,
        )
        if each.held_out is not None and each.name == plan.winner:
            axes.errorbar(
                latency.ratio,
                each.held_out.value,
                yerr=arms(each.held_out.low, each.held_out.value, each.held_out.high),
                fmt="*",
                color="#cc79a7",
                markersize=15,
                label=f"{number}, the winner, on held-out data",
            )
    axes.set_xlabel("measured latency, relative to no funnel (median and quartiles)")
    axes.set_ylabel(f"{plan.data['score']}, relative to no funnel (with 95 % interval)")
    names = ", ".join(plan.data["files"])
    axes.set_title(f"{plan.checkpoint['name']} on {names}", parse_math=False)  # a name may have a dollar sign
    axes.grid(alpha=0.2)
    figure.legend(loc="outside right upper", fontsize=8)
    return png(figure, dpi=150)


def arms(low: float, middle: float, high: float) -> list[list[float]]:
    """The distances of an interval's ends from its middle, as matplotlib wants them."""
    return [[max(0.0, middle - low)], [max(0.0, high - middle)]]
