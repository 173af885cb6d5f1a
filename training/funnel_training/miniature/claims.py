"""What the paper says, and what a study says to that: sentences that are computed from its numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from funnel_training.miniature.study import TAGGING_RECOVERY, Results, Run, funnels

TASK_NAMES = {"groups": "genre", "tags": "parts of speech"}
# With a norm after the recovery, which ignores the scale, these two are the same function.
SAME = ("sum_last", "mean_last")


class Comparison(NamedTuple):
    """Two samples of scores, one of each seed.

    Attributes:
        difference: of their means, the first minus the second.
        spread: the larger one of the ranges (largest minus smallest) of the two samples.
    """

    difference: float
    spread: float

    @property
    def outcome(self) -> str:
        """Whether the first is better by more than the spread of seeds."""
        if abs(self.difference) <= self.spread:
            return "not shown"
        return "agrees" if self.difference > 0 else "disagrees"

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} points, spread of seeds {100 * self.spread:.1f}"


class Verdict(NamedTuple):
    """A claim of the paper, "agrees", "disagrees" or "not shown", and why."""

    question: str
    claim: str
    outcome: str
    reason: str


def compare(better: Sequence[float], worse: Sequence[float]) -> Comparison:
    return Comparison(float(np.mean(better) - np.mean(worse)), float(max(np.ptp(better), np.ptp(worse))))


def verdicts(results: Results) -> list[Verdict]:
    tasks = ("groups", "tags")
    return [
        *(early_funnels_lose(results, task) for task in tasks),
        *(aware_is_better(results, task) for task in tasks),
        more_steps_help(results),
        early_funnels_are_faster(results),
        mean_last_is_best(results),
    ]


def early_funnels_lose(results: Results, task: str) -> Verdict:
    samples = [scores_of(results, task, "plain", funnel) for funnel in funnels(task, results.sizes)]
    none, earliest, latest = samples[0], samples[1], samples[-1]
    loss, by_layer = compare(none, earliest), compare(latest, earliest)
    layers = results.sizes.funnel_layers
    return Verdict(
        f"Does an early funnel lose quality after plain pre-training? ({TASK_NAMES[task]})",
        "Table 1, GLUE after plain pre-training: 70.65 with a funnel after layer 2 of 18, 76.89 after 8, 81.35 after "
        "16; Figure 2, STS-B: 88.81 without a funnel.",
        loss.outcome if len(layers) == 1 else both(loss.outcome, by_layer.outcome),
        f"No funnel is ahead of one after layer {layers[0]} by {loss}"
        + (f"; a funnel after layer {layers[-1]} is ahead of it by {by_layer}." if len(layers) > 1 else "."),
    )


def aware_is_better(results: Results, task: str) -> Verdict:
    earliest = funnels(task, results.sizes)[1]
    plain, aware = (scores_of(results, task, name, earliest) for name in ("plain", "aware"))
    gain = compare(aware, plain)
    masked = compare(results.masked["aware"], results.masked["plain"])
    why = (
        ""
        if gain.outcome == "agrees"
        else f" On masked tokens the pre-training with the funnel is ahead by {masked}: "
        + (
            "it has learned less, because it computes with half of the rows, and fine-tuning has not made up for it."
            if masked.outcome == "disagrees"
            else "a pre-training this short leaves little that a funnel could disturb, and fine-tuning all weights "
            "adapts a small model to it."
        )
    )
    return Verdict(
        f"Does funnel-aware pre-training help at the earliest funnel? ({TASK_NAMES[task]})",
        "Table 1, funnel after layer 2: GLUE 82.01 with funnel-aware pre-training and 70.65 without, STS-B 88.00 and "
        "59.79.",
        gain.outcome,
        f"Funnel-aware is ahead of plain by {gain} with {earliest}.{why}",
    )


def more_steps_help(results: Results) -> Verdict:
    earliest, steps = funnels("tags", results.sizes)[1], results.sizes.steps
    few, *_, many = (results.scores[Run("tags", "plain", earliest, count)] for count in steps)
    gain = compare(many, few)
    return Verdict(
        f"Does longer fine-tuning help a funneled model? ({TASK_NAMES['tags']})",
        "Figure 3: more fine-tuning steps (2,000, 4,000, 6,000) help.",
        gain.outcome,
        f"{steps[-1]} steps are ahead of {steps[0]} by {gain} with {earliest} after plain pre-training.",
    )


def early_funnels_are_faster(results: Results) -> Verdict:
    measured = list(results.latency.values())
    earliest, latest = measured[0], measured[-1]
    is_ordered = earliest["high"] < (latest["low"] if len(measured) > 1 else 1.0)
    is_slower = earliest["low"] > (latest["high"] if len(measured) > 1 else 1.0)
    return Verdict(
        "Does an earlier funnel save more time?",
        "Figure 4: 44 % of the latency saved with a funnel after layer 2 of 18, about 5 % after 16, which is what the "
        "floating-point operations say.",
        "agrees" if is_ordered else "disagrees" if is_slower else "not shown",
        "; ".join(
            f"{funnel}: {100 * (1 - each['measured']):.0f} % saved (quartiles {100 * (1 - each['high']):.0f} to "
            f"{100 * (1 - each['low']):.0f}), ideally {100 * (1 - each['ideal']):.0f}"
            for funnel, each in results.latency.items()
        )
        + ". Where less is saved than ideally, the rest of a call (packing, norms, starting products) weighs more in a "
        "model this small.",
    )


def mean_last_is_best(results: Results) -> Verdict:
    scores = recovery_scores(results)
    means = {recovery: float(np.mean(values)) for recovery, values in scores.items()}
    best = max(means, key=lambda recovery: means[recovery])
    rivals = {recovery: values for recovery, values in scores.items() if recovery not in SAME}
    own = scores[TAGGING_RECOVERY]
    rival = max(rivals, key=lambda recovery: means[recovery])
    lead, over_tile = compare(own, rivals[rival]), compare(own, scores["tile"])
    noise = (
        f" {' and '.join(SAME)} are one function here, so their difference of "
        f"{100 * abs(means[SAME[0]] - means[SAME[1]]):.1f} points is rounding that training has made larger."
        if set(SAME) <= means.keys()
        else ""
    )
    return Verdict(
        "Which recovery is best for tagging?",
        "Figure 5: the average with the layer before the funnel (mean_last) is best.",
        lead.outcome,
        f"The best mean is that of {best}. mean_last is ahead of {rival}, the best of the others, by {lead}, and of "
        f"tile alone by {over_tile}.{noise}",
    )


def scores_of(results: Results, task: str, pretraining: str, funnel: str) -> list[float]:
    """After the largest number of steps."""
    return results.scores[Run(task, pretraining, funnel, results.sizes.steps[-1])]


def recovery_scores(results: Results) -> dict[str, list[float]]:
    layer = results.sizes.funnel_layers[0]
    return {
        recovery: scores_of(results, "tags", "plain", f"{layer}:2/{recovery}") for recovery in results.sizes.recoveries
    }


def both(*outcomes: str) -> str:
    """One outcome for a claim that has several parts."""
    return outcomes[0] if len(set(outcomes)) == 1 else "disagrees" if "disagrees" in outcomes else "not shown"
