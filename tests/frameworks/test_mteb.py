"""MTEB evaluates our encoder, and does not return results of another funnel. Its data are made here."""

import numpy as np
import pytest

pytest.importorskip("mteb", reason="mteb is not installed")
import datasets
import mteb
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from scipy.stats import spearmanr

from funnel_engine import Engine, FunnelConfig
from funnel_serving.adapters.mteb import FunnelEncoder
from sentence_models import WORDS

FUNNEL = "1:2/mean"


def texts(count, seed):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(2, 9))) for _ in range(count)]


FIRST, SECOND = [*texts(15, 0), ""], texts(16, 1)
SCORES = np.random.default_rng(2).uniform(0, 5, 16)
CORPUS, QUERIES = texts(12, 3), texts(4, 4)


def metadata(name, kind, score):
    return TaskMetadata(
        name=name,
        description="Random words",
        dataset={"path": "made/here", "revision": "1"},
        type=kind,
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=score,
    )


class Similarity(AbsTaskSTS):
    metadata = metadata("RandomSimilarity", "STS", "cosine_spearman")

    def load_data(self, **_):
        columns = {"sentence1": FIRST, "sentence2": SECOND, "score": SCORES.tolist()}
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})
        self.data_loaded = True


class Retrieval(AbsTaskRetrieval):
    metadata = metadata("RandomRetrieval", "Retrieval", "ndcg_at_10")

    def load_data(self, **_):
        corpus = [{"id": f"d{index}", "title": "", "text": text} for index, text in enumerate(CORPUS)]
        queries = [{"id": f"q{index}", "text": text} for index, text in enumerate(QUERIES)]
        split = {
            "corpus": datasets.Dataset.from_list(corpus),
            "queries": datasets.Dataset.from_list(queries),
            "relevant_docs": {f"q{index}": {f"d{index * 2}": 1} for index in range(4)},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def evaluate(encoder, task, tmp_path):
    (result,) = mteb.evaluate(
        encoder, task, cache=ResultCache(tmp_path), show_progress_bar=False, co2_tracker=False
    ).task_results
    return result.scores["test"][0]


def spearman(checkpoint, funnel):
    engine = Engine.load(checkpoint, funnel=FunnelConfig.parse(funnel))
    first, second = engine.embed([text or " " for text in FIRST]), engine.embed(SECOND)
    return spearmanr((first * second).sum(1), SCORES).statistic


def test_scores_are_of_the_engines_vectors_and_of_this_funnel_in_a_shared_cache(checkpoint, tmp_path):
    plain, funneled = FunnelEncoder(checkpoint), FunnelEncoder(checkpoint, funnel=FUNNEL)
    first = evaluate(plain, Similarity(), tmp_path)["cosine_spearman"]
    assert first == pytest.approx(spearman(checkpoint, "none"), abs=1e-6)
    second = evaluate(funneled, Similarity(), tmp_path)["cosine_spearman"]
    assert second == pytest.approx(spearman(checkpoint, FUNNEL), abs=1e-6)
    assert abs(first - second) > 1e-3
    calls = plain.embedder.engine.stats()["calls"]
    assert evaluate(FunnelEncoder(checkpoint), Similarity(), tmp_path)["cosine_spearman"] == pytest.approx(
        first, abs=1e-5
    )
    assert plain.embedder.engine.stats()["calls"] == calls, "the cache is not used at all"


def test_retrieval_embeds_queries_and_documents_with_their_prompts(checkpoint, tmp_path):
    engine = Engine.load(checkpoint)
    queries, documents = engine.embed(QUERIES, prompt_name="query"), engine.embed(CORPUS, prompt_name="document")
    ranks = (-queries @ documents.T).argsort(1).argsort(1)[range(4), [0, 2, 4, 6]]
    expected = np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean()
    scores = evaluate(FunnelEncoder(checkpoint), Retrieval(), tmp_path)
    assert scores["ndcg_at_10"] == pytest.approx(expected, abs=1e-4)


def test_what_mteb_is_told_about_the_model(checkpoint):
    meta = FunnelEncoder(checkpoint, funnel=FUNNEL, truncate_dim=8).mteb_model_meta
    assert (meta.name, meta.embed_dim) == ("funnel-engine/checkpoint", 8)
    assert meta.experiment_kwargs == {"funnel": FUNNEL, "activations": "float32", "truncate_dim": 8}
    assert len(meta.revision) == 64
    assert meta != FunnelEncoder(checkpoint, truncate_dim=8).mteb_model_meta
