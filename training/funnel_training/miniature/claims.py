"""What the paper says, and what a study says to that: sentences that are computed from its numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from funnel_training.miniature.study import PRETRAININGS, Results, Run, funnels

TASK_NAMES = {"groups": "genre", "tags": "parts of speech"}
PAPERS_LOSS = 29  # points of STS-B, by a funnel after layer 2 after plain pre-training
SAME = ("sum_last", "mean_last")  # recoveries that are one function before a norm


class Comparison(NamedTuple):
    """Two samples of scores, one of each seed.

    Attributes:
        difference: of their means, the first minus the second.
        spread: the larger one of the ranges (largest minus smallest) of the two samples.
        wins, seeds: in how many of the seeds the first is ahead.
    """

    difference: float
    spread: float
    wins: int
    seeds: int

    @property
    def outcome(self) -> str:
        """Whether the first is better by more than the spread of seeds."""
        if abs(self.difference) <= self.spread:
            return "not shown"
        return "agrees" if self.difference > 0 else "disagrees"

    def __str__(self) -> str:
        return (
            f"{100 * self.difference:+.1f} points (spread of seeds {100 * self.spread:.1f}; in {self.wins} of "
            f"{self.seeds} seeds)"
        )


class Verdict(NamedTuple):
    """A claim of the paper, "agrees", "disagrees" or "not shown", and why.

    Attributes:
        figure: of the paper.
    """

    figure: int
    question: str
    claim: str
    outcome: str
    reason: str


def compare(better: Sequence[float], worse: Sequence[float]) -> Comparison:
    differences = np.subtract(better, worse)
    spread = float(max(np.ptp(better), np.ptp(worse)))
    return Comparison(float(differences.mean()), spread, int((differences > 0).sum()), len(differences))


def verdicts(results: Results) -> list[Verdict]:
    found: list[Verdict] = []
    for task in TASK_NAMES:
        found.append(early_funnel_costs(results, task))
        if len(results.sizes.funnel_layers) > 1:
            found.append(later_funnel_costs_less(results, task))
        found += [aware_is_better(results, task), aware_costs_without_funnel(results, task)]
    return [*found, more_steps_help(results), early_funnels_are_faster(results), mean_last_is_best(results)]


def early_funnel_costs(results: Results, task: str) -> Verdict:
    none, earliest = funnels(task, results.sizes)[:2]
    loss = compare(*(scores_of(results, task, "plain", funnel) for funnel in (none, earliest)))
    return Verdict(
        2,
        f"Does an early funnel cost quality after plain pre-training? ({TASK_NAMES[task]})",
        "Figure 2, Table 1: STS-B after plain pre-training is 88.81 without a funnel and 59.79 with one after layer 2 "
        "of 18.",
        loss.outcome,
        f"Without a funnel the score is higher than with {earliest} by {loss}.",
    )


def later_funnel_costs_less(results: Results, task: str) -> Verdict:
    _, earliest, *_, latest = funnels(task, results.sizes)
    gain = compare(*(scores_of(results, task, "plain", funnel) for funnel in (latest, earliest)))
    return Verdict(
        2,
        f"Does a later funnel cost less after plain pre-training? ({TASK_NAMES[task]})",
        "Table 1: GLUE after plain pre-training is 70.65 with a funnel after layer 2 of 18, 76.89 after 8, 81.35 after "
        "16.",
        gain.outcome,
        f"With {latest} the score is higher than with {earliest} by {gain}.",
    )


def aware_is_better(results: Results, task: str) -> Verdict:
    none, earliest = funnels(task, results.sizes)[:2]
    plain, aware = ([scores_of(results, task, name, funnel) for funnel in (none, earliest)] for name in PRETRAININGS)
    gain, gain_without, loss = compare(aware[1], plain[1]), compare(aware[0], plain[0]), compare(*plain)
    why = (
        f" There was less to win than in the paper: after plain pre-training {earliest} costs "
        f"{100 * loss.difference:.1f} points here, and {PAPERS_LOSS} points of STS-B there."
    )
    return Verdict(
        2,
        f"Does funnel-aware pre-training help at the earliest funnel? ({TASK_NAMES[task]})",
        "Table 1, funnel after layer 2: GLUE 82.01 with funnel-aware pre-training and 70.65 without, STS-B 88.00 and "
        "59.79.",
        gain.outcome,
        f"With {earliest} the score after funnel-aware pre-training is higher than after plain by {gain}; without a "
        f"funnel, by {gain_without}.{why if gain.outcome != 'agrees' and 100 * loss.difference < PAPERS_LOSS else ''}",
    )


def aware_costs_without_funnel(results: Results, task: str) -> Verdict:
    plain, aware = (scores_of(results, task, name, "none") for name in PRETRAININGS)
    loss = compare(plain, aware)
    return Verdict(
        2,
        f"Does funnel-aware pre-training cost quality where no funnel is used? ({TASK_NAMES[task]})",
        "Figure 2, STS-B without a funnel: 87.17 after funnel-aware pre-training and 88.81 after plain.",
        loss.outcome,
        f"Without a funnel the score after plain pre-training is higher than after funnel-aware by {loss}.",
    )


def more_steps_help(results: Results) -> Verdict:
    earliest, steps = funnels("tags", results.sizes)[1], results.sizes.steps
    few, *_, many = (results.scores[Run("tags", "plain", earliest, count)] for count in steps)
    gain = compare(many, few)
    return Verdict(
        3,
        f"Does longer fine-tuning help a funneled model? ({TASK_NAMES['tags']})",
        "Figure 3: more fine-tuning steps (2,000, 4,000, 6,000) help.",
        gain.outcome,
        f"With {earliest} after plain pre-training, the score after {steps[-1]} steps is higher than after {steps[0]} "
        f"by {gain}.",
    )


def early_funnels_are_faster(results: Results) -> Verdict:
    measured = list(results.latency.values())
    earliest, latest = measured[0], measured[-1]
    is_faster = earliest["high"] < (latest["low"] if len(measured) > 1 else 1.0)
    is_slower = earliest["low"] > (latest["high"] if len(measured) > 1 else 1.0)
    saved = "; ".join(
        f"{funnel} saves {100 * (1 - each['measured']):.0f} % (quartiles {100 * (1 - each['high']):.0f} to "
        f"{100 * (1 - each['low']):.0f}), ideally {100 * (1 - each['ideal']):.0f}"
        for funnel, each in results.latency.items()
    )
    return Verdict(
        4,
        "Does an earlier funnel save more time?",
        "Figure 4: 44 % of the latency saved with a funnel after layer 2 of 18, about 5 % after 16, which is what the "
        "floating-point operations say.",
        "agrees" if is_faster else "disagrees" if is_slower else "not shown",
        f"{saved}. What does not become shorter (packing, starting products) weighs more in a model this small.",
    )


def mean_last_is_best(results: Results) -> Verdict:
    scores = recovery_scores(results)
    means = {recovery: float(np.mean(values)) for recovery, values in scores.items()}
    own = scores["mean_last"]
    others = [recovery for recovery in scores if recovery not in SAME]
    rival = max(others, key=lambda recovery: means[recovery])
    lead, over_tile = compare(own, scores[rival]), compare(own, scores["tile"])
    same = (
        f" {' and '.join(SAME)} are one function here, because a norm follows that ignores the scale; their means "
        f"differ by {100 * abs(means[SAME[0]] - means[SAME[1]]):.1f} points."
        if set(SAME) <= means.keys()
        else ""
    )
    return Verdict(
        5,
        f"Is mean_last the best recovery? ({TASK_NAMES['tags']})",
        "Figure 5: the average with the layer before the funnel (mean_last) is best.",
        lead.outcome,
        f"The score of mean_last is higher than that of {rival}, the best other one, by {lead}, and than that of tile "
        f"alone by {over_tile}.{same}",
    )


def scores_of(results: Results, task: str, pretraining: str, funnel: str) -> list[float]:
    """After the largest number of steps."""
    return results.scores[Run(task, pretraining, funnel, results.sizes.steps[-1])]


def recovery_scores(results: Results) -> dict[str, list[float]]:
    layer = results.sizes.funnel_layers[0]
    return {
        recovery: scores_of(results, "tags", "plain", f"{layer}:2/{recovery}") for recovery in results.sizes.recoveries
    }
