"""Pairs of sentences with a gold score of their similarity: Spearman correlation of the cosine with it (STS)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from funnel_kernels.errors import InputError
from funnel_training.data_files import DataFile, Row, hashes, read_file, read_table
from funnel_training.metrics import unit_vectors
from funnel_training.scores import Ints, Score, Spearman
from funnel_training.statistics import check_units
from funnel_training.tasks import retrieval
from funnel_training.tasks.retrieval import Retrieval
from funnel_training.tasks.task import Task, distinct, without_duplicates

LAYOUT = ("sentence1", "sentence2", "score")


@dataclasses.dataclass(frozen=True)
class Pairs(Task):
    """Scored pairs. Each sentence is embedded once, however many pairs it is in."""

    index: np.ndarray  # [2, pairs] of the sentences of each pair
    gold: np.ndarray  # [pairs]
    kind: ClassVar[str] = "pairs"
    unit: ClassVar[str] = "pairs"

    @property
    def units(self) -> int:
        return len(self.gold)

    def take(self, units: Ints, share: float) -> "Pairs":
        used, index = np.unique(self.index[:, units], return_inverse=True)
        sides = (self.sides[0].take(used),)
        return dataclasses.replace(self, sides=sides, index=index.reshape(2, -1), gold=self.gold[units])

    def scores(self, outputs: list[Any], baseline: list[Any]) -> dict[str, Score]:
        vectors = unit_vectors("the sentences' vectors", outputs[0])
        cosines = (vectors[self.index[0]] * vectors[self.index[1]]).sum(axis=1)
        return {"Spearman": Spearman(cosines, self.gold)}


def read_pairs(path: Path) -> Pairs | Retrieval:
    """Reads a table: sentence1, sentence2 and score make `Pairs`; query and document make a `Retrieval`.

    Raises:
        InputError: it is no such table, see `make_pairs` and `make_retrieval`.
    """
    file = read_file(path)
    layout, rows = read_table(file, LAYOUT, retrieval.LAYOUT)
    return make_pairs(file, rows) if layout == LAYOUT else retrieval.make_retrieval(file, rows)


def make_pairs(file: DataFile, rows: Sequence[Row]) -> Pairs:
    """The task of a table's rows.

    Raises:
        InputError: a sentence is empty, a score is not a finite number, all scores are equal, or there are too few.
    """
    rows, duplicates = without_duplicates(rows, "sentence1", "sentence2")
    check_units(len(rows), f"different pairs in {file.path.name}")
    gold = np.array([row.number("score") for row in rows])
    if np.ptp(gold) == 0:
        raise InputError(
            f"all scores in {file.path.name} are {gold[0]:g}: the correlation with a constant is not defined; "
            "give pairs with different scores"
        )
    texts = [row.text(name) for name in LAYOUT[:2] for row in rows]
    side, index = distinct(texts, [row.place for row in rows] * 2, "sentences", "STS")
    return Pairs(hashes(file), duplicates, (side,), index.reshape(2, -1), gold)
