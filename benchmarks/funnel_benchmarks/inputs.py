"""What engines embed in a benchmark: token ids drawn at random, on which latency does not depend."""

import numpy as np

from funnel_engine.packing import Ints

SEED = 0  # of what a suite draws, unless it has seeds of its own


def random_inputs(vocab_size: int, lengths: Ints, seed: int = SEED) -> tuple[Ints, Ints]:
    """Ids [N] and offsets [B + 1] of sequences of these lengths [B], as `Engine.embed` takes them.

    Args:
        seed: the same seed draws the same ids.
    """
    ids = np.random.default_rng(seed).integers(0, vocab_size, int(lengths.sum()), np.int32)
    return ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
