"""Random inputs: ids of the vocabulary, sequences of the lengths asked for."""

import numpy as np

from funnel_benchmarks.inputs import random_inputs


def test_inputs_are_ids_of_the_vocabulary_in_sequences_of_these_lengths():
    lengths = np.array([400, 1, 900], np.int32)
    ids, offsets = random_inputs(20, lengths, 3)
    assert offsets.tolist() == [0, 400, 401, 1301]
    assert (len(ids), set(ids.tolist())) == (1301, set(range(20)))
    assert ids.dtype == offsets.dtype == np.int32


def test_a_seed_says_which_ids():
    lengths = np.array([50], np.int32)
    first, again, other = (random_inputs(1000, lengths, seed)[0].tolist() for seed in (3, 3, 4))
    assert first == again
    assert sum(one == another for one, another in zip(first, other, strict=True)) < 5
