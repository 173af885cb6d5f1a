"""Batches of sequences, padded to the longest of each, as most peers take them."""

from collections.abc import Callable
from typing import Any

import numpy as np


def make_batches(lengths: np.ndarray, order: str, size: int) -> list[list[int]]:
    """The numbers of the sequences in each padded batch.

    Args:
        lengths: [B], in tokens.
        order: "equal" makes one batch; "sorted" has batches of `size`, longest sequences first, as
            sentence-transformers makes them; "unsorted" takes them as they come.
    """
    if order == "equal":
        return [list(range(len(lengths)))]
    numbers = np.argsort(-lengths, kind="stable") if order == "sorted" else np.arange(len(lengths))
    return [numbers[start : start + size].tolist() for start in range(0, len(numbers), size)]


def padded(sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of one batch, [B, longest] int64 each; padding is at the end, 0 in both."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return ids, mask


def embedding(task: dict[str, Any], run: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[], np.ndarray]:
    """The call that embeds the task's sequences batch by batch, padded beforehand.

    Args:
        run: takes ids and mask of a batch, and returns a float32 row for each sequence.
    """
    sequences = task["sequences"]
    batches = [(numbers, *padded([sequences[number] for number in numbers])) for numbers in task["batches"]]

    def embed() -> np.ndarray:
        """[B, D], in the order of the sequences."""
        parts = [(numbers, run(ids, mask)) for numbers, ids, mask in batches]
        vectors = np.empty((len(sequences), parts[0][1].shape[1]), np.float32)
        for numbers, rows in parts:
            vectors[numbers] = rows
        return vectors

    return embed
