"""How good vectors are: how they rank documents, against what is relevant and against another model's ranking."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from funnel_kernels.errors import InputError
from funnel_training.scores import Floats, Ints, rank_correlation

TOP = 10  # depth of a ranking: overlap@10, nDCG@10
RECALL_TOP = 100  # recall@100
TIE = 1e-5  # cosines that differ by less are equal: rounding orders them
QUERIES_AT_ONCE = 256  # their similarities to all documents are in memory at once


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How closely a student's vectors rank documents as a teacher's vectors do.

    Attributes:
        overlaps: [queries] the part of the student's ten nearest documents that are among the teacher's ten nearest. A
            document that the teacher finds as near as its tenth counts too.
        ndcgs: [queries] nDCG@10 of the student's ranking. The teacher's ten nearest documents have the grades 10 to 1.
        spearmans: [queries] Spearman correlation of the student's similarities to all documents with the teacher's.
        spearmans_nearest: [queries] the same over the teacher's ten nearest documents only, which are hard to order.
        cosines: [documents] the cosine between the two vectors of each document.
    """

    overlaps: Floats
    ndcgs: Floats
    spearmans: Floats
    spearmans_nearest: Floats
    cosines: Floats

    @property
    def overlap(self) -> float:
        return float(self.overlaps.mean())

    @property
    def ndcg(self) -> float:
        return float(self.ndcgs.mean())

    @property
    def spearman(self) -> float:
        return float(self.spearmans.mean())

    @property
    def spearman_nearest(self) -> float:
        return float(self.spearmans_nearest.mean())

    @property
    def cosine(self) -> float:
        return float(self.cosines.mean())

    @property
    def cosine_low(self) -> float:
        """The 5 % quantile: one document in twenty has a smaller cosine."""
        return float(np.quantile(self.cosines, 0.05))


def agreement(teacher: Any, student: Any, queries: Any) -> Agreement:
    """Compares how two models rank the same texts, by cosine.

    Where only documents are funneled, the student's rows of the queries are the teacher's.

    Args:
        teacher, student: [N, D] vectors of the same texts, in the same order; any length.
        queries: row numbers of the texts that are queries; all other texts are the documents that they rank.

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
    parts: list[Floats] = []  # [4, Q] each: the first four fields of the result
    for rows in blocks(asked):
        expected = teacher[rows] @ teacher[documents].T  # [Q, C]
        actual = student[rows] @ student[documents].T
        nearest, found = top(expected, TOP), top(actual, TOP)  # [Q, 10]
        nearest_expected, nearest_actual = take(expected, nearest), take(actual, nearest)
        overlaps = (take(expected, found) >= nearest_expected[:, -1:] - TIE).mean(axis=1)
        grades = np.zeros_like(expected)
        np.put_along_axis(grades, nearest, np.arange(TOP, 0, -1)[None], axis=1)
        ndcgs = discounted(take(grades, found)) / discounted(np.arange(TOP, 0, -1))
        orders = rank_correlation(expected, actual), rank_correlation(nearest_expected, nearest_actual)
        parts.append(np.stack([overlaps, ndcgs, *orders]))
    overlaps, ndcgs, spearmans, spearmans_nearest = np.concatenate(parts, axis=1)
    cosines = (teacher[documents] * student[documents]).sum(axis=1, dtype=np.float64)
    return Agreement(overlaps, ndcgs, spearmans, spearmans_nearest, cosines)


def retrieval(
    queries: Any, documents: Any, relevant: Sequence[dict[int, float]], same: Sequence[int | None]
) -> tuple[Floats, Floats]:
    """nDCG@10 (with grades as gains) and recall@100 of each query's ranking of the documents, by cosine.

    Args:
        queries: [Q, D] vectors.
        documents: [C, D] vectors.
        relevant: for each query the grades of its relevant documents, which are above 0, by their row numbers.
        same: for each query the row number of the document that is the query itself, which is not ranked; or None.

    Returns:
        Both [Q].

    Raises:
        InputError: a vector is not finite or is zero.
    """
    queries = unit_vectors("the queries' vectors", queries)
    documents = unit_vectors("the documents' vectors", documents)
    ndcgs, recalls = np.empty(len(queries)), np.empty(len(queries))
    for rows in blocks(np.arange(len(queries))):
        scores = queries[rows] @ documents.T
        grades = np.zeros_like(scores)
        for row, query in enumerate(rows):
            grades[row, list(relevant[query])] = list(relevant[query].values())
            if same[query] is not None:
                scores[row, same[query]] = -np.inf
        gains, best = take(grades, top(scores, RECALL_TOP)), -np.sort(-grades, axis=1)
        ndcgs[rows] = discounted(gains[:, :TOP]) / discounted(best[:, :TOP])
        recalls[rows] = (gains > 0).sum(axis=1) / (grades > 0).sum(axis=1)
    return ndcgs, recalls


def blocks(rows: Ints) -> Iterator[Ints]:
    for start in range(0, len(rows), QUERIES_AT_ONCE):
        yield rows[start : start + QUERIES_AT_ONCE]


def unit_vectors(name: str, vectors: Any) -> np.ndarray:
    """The vectors, [N, D], with length 1; float64 if they are float64, else float32.

    Raises:
        InputError: one is not finite, or is zero and so has no direction.
    """
    array = np.asarray(vectors)
    array = array.astype(np.result_type(array.dtype, np.float32), copy=False)
    if array.ndim != 2:
        raise InputError(f"{name} have {array.ndim} axes; they must be an array [texts, size]")
    lengths = np.linalg.norm(array, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
    if bad.size:
        what = "zero" if lengths[bad[0]] == 0 else "not finite (NaN or infinity)"
        raise InputError(f"row {bad[0]} of {name} is {what}; the weights are broken, or the training has diverged")
    return array / lengths


def top(scores: np.ndarray, count: int) -> Ints:
    """The columns of the `count` highest scores of each row [Q, C], best first; all of them if there are fewer."""
    columns = np.argpartition(-scores, min(count, scores.shape[1]) - 1, axis=1)[:, :count]
    columns.sort(axis=1)  # so that of equal scores the first column is first
    return take(columns, np.argsort(-take(scores, columns), axis=1, kind="stable"))


def take(values: np.ndarray, columns: Ints) -> np.ndarray:
    return np.take_along_axis(values, columns, axis=1)


def discounted(gains: np.ndarray) -> Floats:
    """Discounted cumulative gain of gains [..., depth] in the order of the ranking."""
    return (gains / np.log2(np.arange(2, gains.shape[-1] + 2))).sum(axis=-1)
