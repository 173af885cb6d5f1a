"""Metrics against scikit-learn, SciPy, and plain loops."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

from funnel_engine import InputError
from funnel_training.metrics import agreement


def teacher_and_student(noise: float, texts: int = 70, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    teacher = generator.normal(size=(texts, 8))
    student = teacher + noise * generator.normal(size=teacher.shape)
    return teacher.astype(np.float32), student.astype(np.float32)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(x @ y / np.sqrt(x @ x) / np.sqrt(y @ y))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_agreement_is_what_plain_loops_and_libraries_say(asymmetric, monkeypatch):
    monkeypatch.setattr("funnel_training.metrics.QUERIES_AT_ONCE", 4)
    teacher, student = teacher_and_student(0.5)
    queries = [3, 11, 12, 40, 41, 42, 66, 69, 0]
    documents = [row for row in range(70) if row not in queries]
    result = agreement(teacher, student, queries, asymmetric=asymmetric)
    expected, nearest_pairs = [], []
    for query in sorted(queries):
        scores = np.array([cosine(teacher[query], teacher[row]) for row in documents])
        asking = teacher if asymmetric else student
        found = np.array([cosine(asking[query], student[row]) for row in documents])
        best, hits = set(np.argsort(scores)[-10:]), set(np.argsort(found)[-10:])
        grades = np.zeros(len(documents))
        grades[np.argsort(scores)[-10:]] = range(1, 11)
        expected.append((len(best & hits) / 10, ndcg_score([grades], [found], k=10)))
        nearest_pairs += [(scores[row], found[row]) for row in best]
    np.testing.assert_allclose(np.stack([result.overlaps, result.ndcgs], axis=1), expected, rtol=1e-12)
    assert 0.2 < result.overlap < 0.9  # else the case shows little
    cosines = [cosine(x, y) for x, y in zip(teacher, student, strict=True)]
    np.testing.assert_allclose(result.cosines, cosines, rtol=1e-12)
    assert result.cosine == pytest.approx(np.mean(cosines))
    assert result.cosine_low == pytest.approx(np.quantile(cosines, 0.05))
    assert result.ndcg == pytest.approx(np.mean([ndcg for _, ndcg in expected]))
    assert result.spearman_nearest == pytest.approx(spearmanr(*np.transpose(nearest_pairs)).statistic)
    assert result.spearman_nearest < result.spearman_random < 1


def test_agreement_falls_with_noise_and_is_one_without():
    teacher, _ = teacher_and_student(0.0)
    same = agreement(teacher, 3 * teacher, range(20))
    assert (same.overlap, same.ndcg) == (1, 1)
    values = [same.cosine, same.cosine_low, same.spearman_nearest, same.spearman_random]
    assert values == pytest.approx([1] * 4)
    near, far = (agreement(*teacher_and_student(noise), range(20)) for noise in (0.1, 1.0))
    for name in ("overlap", "ndcg", "cosine", "cosine_low", "spearman_nearest", "spearman_random"):
        assert getattr(same, name) > getattr(near, name) > getattr(far, name)


def test_documents_as_near_as_the_tenth_count_as_found():
    """Two copies of each document: which of two equal ones is in the first ten is decided by rounding."""
    teacher, _ = teacher_and_student(0.0, texts=30)
    documents = np.repeat(teacher[1:], 2, axis=0)
    student = documents * np.tile([1, 1 + 1e-6], 29)[:, None] + np.tile([1e-6, 0], 29)[:, None]
    result = agreement(np.concatenate([teacher[:1], documents]), np.concatenate([teacher[:1], student]), [0])
    assert result.overlap == 1


def test_a_collapsed_student_orders_nothing():
    teacher, student = teacher_and_student(0.0)
    student[:] = student[0]
    result = agreement(teacher, student, range(20))
    assert (result.spearman_nearest, result.spearman_random) == (0, 0)
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
