"""Rankings against scikit-learn, SciPy, and plain loops."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

from funnel_engine import InputError
from funnel_training import metrics
from funnel_training.metrics import agreement, retrieval


def teacher_and_student(noise: float, texts: int = 70, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    teacher = generator.normal(size=(texts, 8))
    return teacher, teacher + noise * generator.normal(size=teacher.shape)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.sqrt(x @ x) / np.sqrt(y @ y))


def test_agreement_is_what_plain_loops_and_libraries_say(monkeypatch):
    monkeypatch.setattr(metrics, "QUERIES_AT_ONCE", 4)
    teacher, student = teacher_and_student(0.5)
    queries = [3, 11, 12, 40, 41, 42, 66, 69, 0]
    documents = [row for row in range(70) if row not in queries]
    result = agreement(teacher, student, queries)
    expected = []
    for query in sorted(queries):
        scores = np.array([cosine(teacher[query], teacher[row]) for row in documents])
        found = np.array([cosine(student[query], student[row]) for row in documents])
        best, hits = np.argsort(scores)[-10:], np.argsort(found)[-10:]
        grades = np.zeros(len(documents))
        grades[best] = range(1, 11)
        correlations = spearmanr(scores, found).statistic, spearmanr(scores[best], found[best]).statistic
        expected.append((len({*best} & {*hits}) / 10, ndcg_score([grades], [found], k=10), *correlations))
    actual = result.overlaps, result.ndcgs, result.spearmans, result.spearmans_nearest
    np.testing.assert_allclose(np.transpose(actual), expected, rtol=1e-12)
    means = result.overlap, result.ndcg, result.spearman, result.spearman_nearest
    assert means == pytest.approx(np.mean(expected, axis=0))
    assert result.spearman_nearest < result.spearman < 1
    cosines = [cosine(teacher[row], student[row]) for row in documents]
    np.testing.assert_allclose(result.cosines, cosines, rtol=1e-12)
    assert (result.cosine, result.cosine_low) == pytest.approx((np.mean(cosines), np.quantile(cosines, 0.05)))


def test_agreement_falls_with_noise_and_is_one_without():
    teacher, _ = teacher_and_student(0.0)
    same = agreement(teacher, 3 * teacher.astype(np.float32), range(20))
    assert (same.overlap, same.ndcg) == (1, 1)
    assert [same.cosine, same.cosine_low, same.spearman, same.spearman_nearest] == pytest.approx([1] * 4)
    near, far = (agreement(*teacher_and_student(noise), range(20)) for noise in (0.1, 1.0))
    for name in ("overlap", "ndcg", "cosine", "cosine_low", "spearman", "spearman_nearest"):
        assert getattr(same, name) > getattr(near, name) > getattr(far, name)


def test_documents_as_near_as_the_tenth_count_as_found():
    """Two copies of each document: which of two equal ones is in the first ten is decided by rounding."""
    teacher, _ = teacher_and_student(0.0, texts=30)
    documents = np.repeat(teacher[1:], 2, axis=0)
    rounding = 1e-6 * np.random.default_rng(1).normal(size=documents.shape)
    result = agreement(
        np.concatenate([teacher[:1], documents]), np.concatenate([teacher[:1], documents + rounding]), [0]
    )
    assert result.overlap == 1


def test_a_collapsed_student_orders_nothing():
    teacher, student = teacher_and_student(0.0)
    student[:] = student[0]
    result = agreement(teacher, student, range(20))
    assert (result.spearman, result.spearman_nearest) == (0, 0)
    assert result.overlap < 0.5


def test_agreement_refuses_what_it_cannot_compare():
    teacher, student = teacher_and_student(0.1, texts=12)
    with pytest.raises(InputError, match=r"2 queries and 10 other texts are too few .* at least 1 query and 11"):
        agreement(teacher, student, [0, 5])
    with pytest.raises(InputError, match=r"0 queries"):
        agreement(teacher, student, [])
    with pytest.raises(InputError, match=r"\(12, 8\) and the student's \(11, 8\)"):
        agreement(teacher, student[1:], [0])
    with pytest.raises(InputError, match=r"the teacher's vectors have 1 axes"):
        agreement(teacher[0], student, [0])
    for value, what in ((np.nan, "not finite"), (np.inf, "not finite"), (0, "zero")):
        broken = student.copy()
        broken[7] = value
        with pytest.raises(InputError, match=f"row 7 of the student's vectors is {what}"):
            agreement(teacher, broken, [0])


def test_retrieval_of_a_case_by_hand():
    """Documents at growing angles from the query: the ranking is their order."""
    angles = np.deg2rad(np.arange(0, 150))
    documents = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    queries = np.array([[2.0, 0.0], [1.0, 0.0]])
    relevant = [{1: 2.0, 3: 1.0, 120: 3.0}, {1: 1.0, 11: 1.0}]
    ndcgs, recalls = retrieval(queries, documents, relevant, [None, 0])
    best = 3 / np.log2(2) + 2 / np.log2(3) + 1 / np.log2(4)
    first = (2 / np.log2(3) + 1 / np.log2(5)) / best  # ranks 2 and 4
    second = 1 / (1 + 1 / np.log2(3))  # document 0 is not ranked, so 1 is first, and 11 is eleventh
    np.testing.assert_allclose(ndcgs, [first, second], rtol=1e-12)
    np.testing.assert_allclose(recalls, [2 / 3, 1], rtol=1e-12)


def test_retrieval_is_what_scikit_learn_and_plain_loops_say(monkeypatch):
    monkeypatch.setattr(metrics, "QUERIES_AT_ONCE", 3)
    generator = np.random.default_rng(2)
    queries, documents = generator.normal(size=(8, 6)), generator.normal(size=(300, 6))
    relevant = [
        dict(zip(generator.choice(300, 15, replace=False), generator.integers(1, 4, 15).astype(float), strict=True))
        for _ in queries
    ]
    ndcgs, recalls = retrieval(queries, documents, relevant, [None] * 8)
    for query, grades_by_document, ndcg, recall in zip(queries, relevant, ndcgs, recalls, strict=True):
        scores = np.array([cosine(query, document) for document in documents])
        grades = np.array([grades_by_document.get(document, 0) for document in range(300)])
        assert ndcg == pytest.approx(ndcg_score([grades], [scores], k=10), rel=1e-12)
        assert recall == len(set(np.argsort(scores)[-100:]) & set(grades_by_document)) / 15
    assert 0 < ndcgs.mean() < 0.9
