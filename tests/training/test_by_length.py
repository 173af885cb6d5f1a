"""How a funnel by length is composed of others, on made-up outputs."""

import dataclasses

import numpy as np
import pytest

from funnel_engine import FunnelByLength, FunnelConfig, preset
from funnel_training.by_length import cheapest_by_length, class_starts, compose

CONFIG = dataclasses.replace(preset("gemma-2b"), attention="bidirectional")
NONE, LATE, EARLY = (FunnelConfig.parse(text) for text in ("none", "9:2/mean", "2:2/mean"))
LENGTHS = [np.arange(1, 101), np.arange(51, 151)]  # of two sides
STARTS = [0, 50, 75, 100]


def test_classes_are_quarters_of_the_texts_and_have_enough_of_them():
    assert class_starts(np.arange(1, 101)) == [0, 25, 50, 75]
    assert class_starts(np.arange(1, 50)) == [0, 25]  # a quarter would be 12 texts
    assert class_starts(np.full(100, 7)) == [0]
    assert class_starts(np.array([3] * 10 + [9] * 90)) == [0]
    assert class_starts(np.concatenate(LENGTHS)) == STARTS


def outputs_of(number: int) -> list:
    """A number that says which funnel made it, as arrays for one side and as a list for the other."""
    return [np.full((len(LENGTHS[0]), 2), number), [np.full(3, number) for _ in LENGTHS[1]]]


def test_the_output_of_a_text_is_that_of_the_funnel_of_its_length():
    first, second = compose([0, 20, 60], LENGTHS, [outputs_of(number) for number in (7, 8, 9)])
    assert first.shape == (100, 2)
    for length, row in zip(LENGTHS[0], first, strict=True):
        assert (row == (7 if length < 20 else 8 if length < 60 else 9)).all()
    assert [rows[0] for rows in second] == [8] * 9 + [9] * 91


def best(loss: dict[FunnelConfig, float], begin_with: list[FunnelConfig]) -> FunnelConfig | FunnelByLength:
    """With a loss per text of a funnel, below 75 tokens only; 20 may be lost."""
    funnels = list(loss)

    def keeps_bound(outputs: list) -> bool:
        numbers = [np.array([row[0] for row in side]) for side in outputs]
        lost = [
            loss[funnels[number]]
            for side, lengths in zip(numbers, LENGTHS, strict=True)
            for number, length in zip(side, lengths, strict=True)
            if length < 75
        ]
        return sum(lost) <= 20

    outputs = {funnel: outputs_of(number) for number, funnel in enumerate(funnels)}
    return cheapest_by_length(CONFIG, LENGTHS, outputs, begin_with, keeps_bound)


def test_long_texts_get_the_cheapest_funnel_and_short_ones_what_is_left_of_the_bound():
    loss = {NONE: 0.0, LATE: 0.3, EARLY: 1.0}  # 49 texts below 50 tokens, 50 from there to 74
    assert best(loss, [NONE]) == FunnelByLength([(0, NONE), (50, LATE), (75, EARLY)])
    assert best(loss | {LATE: 0.1}, [NONE]) == best(loss | {LATE: 0.1}, [NONE, LATE])
    assert best(loss | {LATE: 0.1}, [NONE]) == FunnelByLength([(0, LATE), (75, EARLY)])


@pytest.mark.parametrize("begin_with", [[NONE], [NONE, EARLY]])
def test_one_funnel_for_all_lengths_is_no_list(begin_with):
    assert best({NONE: 0.0, EARLY: 0.0}, begin_with) == EARLY
    assert best({NONE: 0.0}, [NONE]) == NONE
