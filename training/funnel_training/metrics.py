"""How good vectors and labels are: rankings, agreement with a teacher."""

import dataclasses
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from funnel_kernels.errors import InputError

TOP = 10  # depth of a ranking: overlap@10, nDCG@10
TIE = 1e-5  # cosines that differ by less are equal: rounding orders them
QUERIES_AT_ONCE = 256  # their similarities to all documents are in memory at once

Floats = np.ndarray  # float64
Ints = np.ndarray


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How closely a student's vectors rank texts as a teacher's vectors do.

    Attributes:
        overlaps: [queries] the part of the student's ten nearest documents that are among the teacher's ten nearest. A
            document that the teacher finds as near as its tenth counts too.
        ndcgs: [queries] nDCG@10 of the student's ranking. The teacher's ten nearest documents have the grades 10 to 1.
        cosines: [texts] the cosine between the two vectors of each text.
        spearman_nearest: Spearman correlation of the student's similarities with the teacher's, over each query and the
            teacher's ten nearest documents; 0 if the similarities of either are all equal.
        spearman_random: the same over each query and ten random documents. It is usually higher, because texts that are
            far apart are easy to order.
    """

    overlaps: Floats
    ndcgs: Floats
    cosines: Floats
    spearman_nearest: float
    spearman_random: float

    @property
    def overlap(self) -> float:
        return float(self.overlaps.mean())

    @property
    def ndcg(self) -> float:
        return float(self.ndcgs.mean())

    @property
    def cosine(self) -> float:
        return float(self.cosines.mean())

    @property
    def cosine_low(self) -> float:
        """The 5 % quantile: one text in twenty has a smaller cosine."""
        return float(np.quantile(self.cosines, 0.05))


def agreement(teacher: Any, student: Any, queries: Any, *, asymmetric: bool = False) -> Agreement:
    """Compares how two models rank the same texts, by cosine.

    Args:
        teacher, student: [N, D] vectors of the same texts, in the same order; any length.
        queries: row numbers of the texts that are queries; all other texts are the documents that they rank.
        asymmetric: take the student's vectors for the documents only, and the teacher's for the queries.

    Raises:
        InputError: a vector is not finite or is zero, the shapes differ, there is no query, or there are at most ten
            documents, so that all of them are among the ten nearest.
    """
    teacher, student = unit_vectors("the teacher's vectors", teacher), unit_vectors("the student's vectors", student)
    if teacher.shape != student.shape:
        raise InputError(
            f"the teacher's vectors have shape {teacher.shape} and the student's {student.shape}; "
            "both must be of the same texts and sizes"
        )
    is_query = np.zeros(len(teacher), bool)
    is_query[np.asarray(queries, int)] = True
    asked, documents = np.flatnonzero(is_query), np.flatnonzero(~is_query)
    if len(asked) == 0 or len(documents) <= TOP:
        raise InputError(
            f"{len(asked)} queries and {len(documents)} other texts are too few to compare rankings; "
            f"give at least 1 query and {TOP + 1} other texts"
        )
    random = np.random.default_rng(0).integers(len(documents), size=(len(asked), TOP))
    overlaps: list[Floats] = []
    ndcgs: list[Floats] = []
    nearest_pairs: list[Floats] = []  # [2, n] each: the teacher's and the student's similarities
    random_pairs: list[Floats] = []
    for start in range(0, len(asked), QUERIES_AT_ONCE):
        rows = asked[start : start + QUERIES_AT_ONCE]
        expected = teacher[rows] @ teacher[documents].T  # [Q, C]
        actual = (teacher if asymmetric else student)[rows] @ student[documents].T
        nearest, found = top(expected, TOP), top(actual, TOP)  # [Q, 10]
        tenth = np.take_along_axis(expected, nearest[:, -1:], axis=1)
        overlaps.append((np.take_along_axis(expected, found, axis=1) >= tenth - TIE).mean(axis=1))
        grades = np.zeros_like(expected)
        np.put_along_axis(grades, nearest, np.arange(TOP, 0, -1.0)[None], axis=1)
        ndcgs.append(discounted(np.take_along_axis(grades, found, axis=1)) / discounted(np.arange(TOP, 0, -1.0)))
        for pairs, index in ((nearest_pairs, nearest), (random_pairs, random[start : start + len(rows)])):
            pairs.append(np.stack([np.take_along_axis(scores, index, axis=1).ravel() for scores in (expected, actual)]))
    return Agreement(
        overlaps=np.concatenate(overlaps),
        ndcgs=np.concatenate(ndcgs),
        cosines=(teacher * student).sum(axis=1),
        spearman_nearest=order_agreement(*np.concatenate(nearest_pairs, axis=1)),
        spearman_random=order_agreement(*np.concatenate(random_pairs, axis=1)),
    )


def unit_vectors(name: str, vectors: Any) -> Floats:
    """The vectors, [N, D], in float64 and with length 1.

    Raises:
        InputError: one is not finite, or is zero and so has no direction.
    """
    array = np.asarray(vectors, np.float64)
    if array.ndim != 2:
        raise InputError(f"{name} have {array.ndim} axes; they must be an array [texts, size]")
    lengths = np.linalg.norm(array, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
    if bad.size:
        what = "zero" if lengths[bad[0]] == 0 else "not finite (NaN or infinity)"
        raise InputError(f"row {bad[0]} of {name} is {what}; the weights are broken, or the training has diverged")
    return array / lengths


def top(scores: Floats, count: int) -> Ints:
    """The columns of the highest scores of each row, best first; of equal scores the first column first. [Q, count]"""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def discounted(gains: Floats) -> Floats:
    """Discounted cumulative gain of gains [..., depth] in the order of the ranking."""
    return (gains / np.log2(np.arange(2, gains.shape[-1] + 2))).sum(axis=-1)


def order_agreement(expected: Floats, actual: Floats) -> float:
    """Spearman correlation; 0 if one side is constant, which orders nothing."""
    if np.ptp(expected) == 0 or np.ptp(actual) == 0:
        return 0.0
    return float(spearmanr(expected, actual).statistic)
