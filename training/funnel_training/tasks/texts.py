"""Texts without labels: how closely the rankings agree with those of the same model without a funnel."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from funnel_kernels.errors import InputError
from funnel_training.data_files import hashes, read_file
from funnel_training.metrics import TOP, agreement
from funnel_training.scores import Ints, Quantile, Score, mean
from funnel_training.statistics import LEAST_UNITS
from funnel_training.tasks.task import Side, Task, sample

QUERY_PART = 5  # every fifth text is a query, the others are the documents
MOST_QUERIES = 1000
SEED = 0


@dataclasses.dataclass(frozen=True)
class Texts(Task):
    """Random texts are held out as queries; the others are the documents."""

    kind: ClassVar[str] = "texts"
    unit: ClassVar[str] = "queries"
    lines_per_unit: ClassVar[int] = QUERY_PART

    @property
    def units(self) -> int:
        return len(self.sides[0].texts)

    def take(self, units: Ints, share: float) -> "Texts":
        queries, documents = self.sides
        sides = queries.take(units), documents.take(sample(len(documents.texts), share))
        return dataclasses.replace(self, sides=sides)

    def scores(self, outputs: list[Any], baseline: list[Any]) -> dict[str, Score]:
        teacher, student = np.concatenate(baseline), np.concatenate(outputs)
        agreed = agreement(teacher, student, range(self.units))
        return {
            f"overlap@{TOP}": mean(agreed.overlaps),
            f"nDCG@{TOP}": mean(agreed.ndcgs),
            "Spearman": mean(agreed.spearmans),
            f"Spearman@{TOP}": mean(agreed.spearmans_nearest),
            "cosine": mean(agreed.cosines),
            "cosine 5 %": Quantile(agreed.cosines, 0.05),
        }


def read_texts(path: Path) -> Texts:
    """Reads a text from each line that is not blank; repeated texts are left out.

    Raises:
        InputError: the file is not UTF-8, or has too few texts.
    """
    file = read_file(path)
    lines = list(file.lines())
    places: dict[str, str] = {}
    for place, text in lines:
        places.setdefault(text, place)
    texts = list(places)
    if len(texts) < (least := QUERY_PART * LEAST_UNITS):
        raise InputError(f"{path.name} has {len(texts)} different texts; give at least {least}, one in each line")
    order = np.random.default_rng(SEED).permutation(len(texts))
    count = min(len(texts) // QUERY_PART, MOST_QUERIES)
    chosen = {"queries": np.sort(order[:count]), "documents": np.sort(order[count:])}
    sides = tuple(
        Side(name, [texts[i] for i in index], [places[texts[i]] for i in index]) for name, index in chosen.items()
    )
    return Texts(hashes(file), len(lines) - len(texts), sides)
