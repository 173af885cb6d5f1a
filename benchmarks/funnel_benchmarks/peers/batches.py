"""Batches of sequences, padded to the longest of each, as most peers take them."""

from collections.abc import Callable
from typing import Any

import numpy as np

ORDERS = ("sorted", "unsorted")


def make_batches(lengths: np.ndarray, order: str, size: int) -> list[list[int]]:
    """The numbers of the sequences in each batch of at most `size`.

    Args:
        lengths: [B], in tokens.
        order: "sorted" takes the longest sequences first, as sentence-transformers does, "unsorted" takes them as they
            come.
    """
    numbers = np.argsort(-lengths, kind="stable") if order == "sorted" else np.arange(len(lengths))
    return [numbers[start : start + size].tolist() for start in range(0, len(numbers), size)]


def in_order(batches: list[list[int]], rows: np.ndarray) -> np.ndarray:
    """The rows [B, D] of batch after batch, in the order of their sequences."""
    return rows[np.argsort(np.concatenate(batches))]


def padded(sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of one batch, [B, longest] int64 each; padding is at the end, 0 in both."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return ids, mask


def embedding(task: dict[str, Any], run: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[int], np.ndarray]:
    """The call that embeds one of the task's batches, all padded beforehand.

    Args:
        run: takes ids and mask of a batch, and returns a float32 row for each sequence.
    """
    batches = [padded([task["sequences"][number] for number in numbers]) for numbers in task["batches"]]
    return lambda part: run(*batches[part])
