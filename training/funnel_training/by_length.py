"""Composes a funnel by length of the funnels that a search has left: long texts may be pooled more, short ones less."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from funnel_engine.config import Funnel, FunnelConfig, read_funnel
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.packing import group_by_length
from funnel_training.candidates import computed_flops
from funnel_training.scores import Ints
from funnel_training.statistics import LEAST_UNITS

PARTS = (0.25, 0.5, 0.75)  # of the texts, that are shorter than where a class begins

Outputs = list[Any]  # of each side of a task, see `Task.outputs`


def class_starts(lengths: Ints) -> list[int]:
    """Numbers of tokens that divide texts into about four classes, each with enough texts; 0 is the first."""
    starts = [0]
    for start in np.unique(np.quantile(lengths, PARTS).astype(int)).tolist():
        if min(np.sum((lengths >= starts[-1]) & (lengths < start)), np.sum(lengths >= start)) >= LEAST_UNITS:
            starts.append(start)
    return starts


def compose(starts: Sequence[int], lengths: Sequence[Ints], chosen: Sequence[Outputs]) -> Outputs:
    """The outputs of a model with a funnel by length, from those of a model with the funnel of each class.

    What a model makes of a text does not depend on the other texts.

    Args:
        lengths: of the texts of each side.
        chosen: for each class the outputs for all texts.
    """
    sides = []
    for side, side_lengths in enumerate(lengths):
        picked = list(chosen[0][side])
        for number, index in group_by_length(starts, side_lengths):
            for text in index:
                picked[text] = chosen[number][side][text]
        sides.append(np.stack(picked) if isinstance(chosen[0][side], np.ndarray) else picked)
    return sides


def cheapest_by_length(
    config: EncoderConfig,
    lengths: Sequence[Ints],
    outputs: Mapping[FunnelConfig, Outputs],
    begin_with: Sequence[FunnelConfig],
    keeps_bound: Callable[[Outputs], bool],
) -> Funnel:
    """The cheapest funnel by length that is found among combinations of some funnels.

    It begins with one funnel for all lengths. Then each class, from the longest to the shortest, gets the cheapest
    funnel with which the whole keeps the bound. So the loss is spent first where it saves most.

    Args:
        lengths: of the texts of each side.
        outputs: of the model with each funnel.
        begin_with: funnels that keep the bound. Each is tried, and the cheapest result is returned.
        keeps_bound: whether a model's outputs do.

    Returns:
        A funnel for all lengths if no other one is cheaper.
    """
    every = np.concatenate(lengths)
    starts = class_starts(every)
    classes = sorted(group_by_length(starts, every))
    costs = [{funnel: computed_flops(config, funnel, every[index]) for funnel in outputs} for _, index in classes]

    def total(chosen: Sequence[FunnelConfig]) -> int:
        return sum(cost[funnel] for cost, funnel in zip(costs, chosen, strict=True))

    def improve(chosen: list[FunnelConfig]) -> list[FunnelConfig]:
        for number in reversed(range(len(starts))):
            cost = costs[number]
            for funnel in sorted(outputs, key=cost.__getitem__):
                tried = [*chosen[:number], funnel, *chosen[number + 1 :]]
                if cost[funnel] >= cost[chosen[number]]:
                    break
                if keeps_bound(compose(starts, lengths, [outputs[each] for each in tried])):
                    chosen = tried
                    break
        return chosen

    best = min((improve([funnel] * len(starts)) for funnel in begin_with), key=total)
    before = [None, *best]
    return read_funnel([(start, each) for start, each, last in zip(starts, best, before, strict=False) if each != last])
