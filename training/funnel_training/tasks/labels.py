"""Labelled texts: accuracy and macro F1 of a logistic probe on the vectors, or of the checkpoint's own classifier."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from funnel_engine import Engine
from funnel_engine.inputs import Ragged
from funnel_engine.messages import quote
from funnel_kernels.errors import InputError
from funnel_training.data_files import Row, hashes, read_file, read_table
from funnel_training.metrics import unit_vectors
from funnel_training.scores import Ints, MacroF1, Score, mean
from funnel_training.statistics import LEAST_UNITS, check_units
from funnel_training.tasks.task import Side, Task, without_duplicates

LAYOUT = ("text", "label")
FOLDS = 5
SEED = 0
MOST_STEPS = 1000  # of the probe's optimizer


@dataclasses.dataclass(frozen=True)
class ProbeLabels(Task):
    """A probe is trained on four fifths of the texts and predicts the rest, five times: every text is predicted once.

    Funnels are compared by what the probe can read from their vectors, with the same folds for all.
    """

    labels: tuple[str, ...]
    gold: np.ndarray  # [texts] indices of labels
    kind: ClassVar[str] = "labels"
    unit: ClassVar[str] = "texts"

    @property
    def units(self) -> int:
        return len(self.gold)

    @property
    def least_units(self) -> int:
        """So many that each part of `order` has a text of every label for each fold."""
        return max(super().least_units, math.ceil((FOLDS + 1) * self.units / np.bincount(self.gold).min()))

    def order(self, seed: int) -> Ints:
        """Random, but the first ones have each label as often as the others do."""
        shuffled = super().order(seed)
        places = np.empty(self.units)
        for label in np.unique(self.gold):
            own = shuffled[self.gold[shuffled] == label]
            places[own] = (np.arange(len(own)) + 0.5) / len(own)
        return shuffled[np.argsort(places[shuffled], kind="stable")]

    def take(self, units: Ints, share: float) -> "ProbeLabels":
        return dataclasses.replace(self, sides=(self.sides[0].take(units),), gold=self.gold[units])

    def scores(self, outputs: list[Any], baseline: list[Any]) -> dict[str, Score]:
        return class_scores(probe(unit_vectors("the texts' vectors", outputs[0]), self.gold), self.gold)


@dataclasses.dataclass(frozen=True)
class HeadLabels(ProbeLabels):
    """The checkpoint's own classifier predicts the labels."""

    kind: ClassVar[str] = "labels, by the checkpoint's classifier"

    @property
    def least_units(self) -> int:
        return LEAST_UNITS

    def run(self, engine: Engine, inputs: Ragged) -> Any:
        return engine.classify(inputs)

    def scores(self, outputs: list[Any], baseline: list[Any]) -> dict[str, Score]:
        return class_scores(finite_logits(outputs[0]).argmax(axis=1), self.gold)


def read_labels(path: Path, head_labels: Sequence[str] = ()) -> ProbeLabels:
    """Reads a table with the columns text and label.

    Args:
        head_labels: the labels of the checkpoint's classifier, if it has one; then a label is one of these names, or
            its number, from 0. Without it labels can be any texts.

    Raises:
        InputError: a label is empty or unknown, there is only one, or there are too few texts of a label.
    """
    file = read_file(path)
    rows, duplicates = without_duplicates(read_table(file, LAYOUT)[1], "text")
    check_units(len(rows), f"different texts in {path.name}")
    names = [label_of(row) for row in rows]
    labels = tuple(head_labels) or tuple(sorted(set(names)))
    numbers = {str(number): number for number in range(len(head_labels))} | {label: n for n, label in enumerate(labels)}
    for row, name in zip(rows, names, strict=True):
        if name not in numbers:
            raise InputError(f"{row.place}: label {name!r:.60} is not one of the checkpoint's labels: {quote(labels)}")
    prompt = None if head_labels else "Classification"  # `Engine.classify` puts the default prompt before texts
    side = Side("texts", [row.text("text") for row in rows], [row.place for row in rows], prompt)
    gold = np.array([numbers[name] for name in names])
    if head_labels:
        return HeadLabels(hashes(file), duplicates, (side,), labels, gold)
    counts = Counter(names)
    if len(counts) < 2:
        raise InputError(f"all texts in {path.name} have the label {names[0]!r:.60}; give texts of at least two labels")
    rarest = min(counts, key=lambda name: counts[name])
    if counts[rarest] < FOLDS:
        raise InputError(
            f"label {rarest!r:.60} has {counts[rarest]} different texts in {path.name}; give at least {FOLDS}"
        )
    return ProbeLabels(hashes(file), duplicates, (side,), labels, gold)


def label_of(row: Row) -> str:
    """A label as a string; a JSON number counts as one."""
    value = row.fields["label"]
    return str(value) if type(value) is int else row.text("label").strip()


def class_scores(predicted: np.ndarray, gold: np.ndarray) -> dict[str, Score]:
    return {"accuracy": mean(predicted == gold), "macro F1": MacroF1(predicted, gold)}


def finite_logits(logits: np.ndarray) -> np.ndarray:
    """Raises `InputError` if a logit is not finite; [rows, labels]."""
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise InputError(f"row {bad[0]} of the logits is not finite (NaN or infinity); the weights are broken")
    return logits


def probe(vectors: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """For each vector the class that logistic regression predicts, trained on the folds that do not have it."""
    from sklearn.linear_model import LogisticRegression  # takes a second to import
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MOST_STEPS))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    return np.asarray(cross_val_predict(model, vectors, gold, cv=folds))
