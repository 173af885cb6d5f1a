"""Scores of labels, made of logits."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def scores_of(logits: np.ndarray, *, raw: bool) -> np.ndarray:
    """Probabilities [..., labels]: a softmax over several labels, or a sigmoid of one. Raw scores are logits."""
    if raw:
        return logits
    if logits.shape[-1] == 1:
        return np.exp(-np.logaddexp(0, -logits))  # 1 / (1 + exp(-x)), which does not overflow
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def best_first(labels: Sequence[str], scores: np.ndarray) -> list[dict[str, Any]]:
    return [{"label": labels[index], "score": scores[index]} for index in np.argsort(-scores, kind="stable")]
