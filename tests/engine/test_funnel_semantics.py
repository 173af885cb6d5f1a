"""The funneled engine computes what the definitions say, for every option and every pair of options.

Each case packs sequences of 1 to 40 tokens into one batch and compares every row with the oracle, which knows no
packing. Float32 rounding stays below 1e-5 here; a row pooled, placed or masked wrongly is off by 1e-2 and more.
"""

import itertools
from functools import partial

import jax
import numpy as np
import pytest
from transformers import (
    EmbeddingGemma2TextModel,
    Gemma2Model,
    Gemma3TextModel,
    Gemma4TextModel,
    GemmaModel,
    LlamaModel,
    MistralModel,
    Qwen3Model,
    T5GemmaEncoderModel,
)

import hugging_face_models as hf
from funnel_engine import FunnelConfig
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.config import RECOVERIES
from funnel_engine.model import forward
from funnel_engine.packing import make_plan, pack
from funnel_engine.weights import nest
from funnel_kernels import Target

SEQUENCES = hf.random_ids(*range(1, 41))
TOLERANCE = 2e-5
LAYERS = {"num_hidden_layers": 4}
MODELS = {  # the windows are small and of several parities, so that they begin anywhere in a pooling window
    "gemma": (GemmaModel, hf.gemma(**LAYERS), "bidirectional"),
    "gemma2": (Gemma2Model, hf.gemma2(**LAYERS), "bidirectional"),
    "gemma2 causal": (Gemma2Model, hf.gemma2(**LAYERS, sliding_window=6), "causal"),
    "gemma3 causal": (Gemma3TextModel, hf.gemma3(**LAYERS), "causal"),
    "embeddinggemma": (Gemma3TextModel, hf.gemma3(**LAYERS, use_bidirectional_attention=True), "bidirectional"),
    "t5gemma": (T5GemmaEncoderModel, hf.t5gemma(**LAYERS), "bidirectional"),
    "t5gemma2": (hf.T5Gemma2Encoder, hf.t5gemma2(**LAYERS), "bidirectional"),
    "llama": (
        LlamaModel,
        hf.llama(**LAYERS, rope_parameters=hf.LLAMA3_ROPE, attention_bias=True, mlp_bias=True),
        "causal",
    ),
    "mistral": (MistralModel, hf.mistral(**LAYERS), "causal"),
    "mistral bidirectional": (MistralModel, hf.mistral(**LAYERS, sliding_window=5), "bidirectional"),
    "qwen3": (Qwen3Model, hf.qwen3(**LAYERS), "causal"),
    "embeddinggemma2": (EmbeddingGemma2TextModel, hf.embedding_gemma2(sliding_window=5), "bidirectional"),
    "gemma4": (
        Gemma4TextModel,
        hf.gemma4(use_bidirectional_attention="all", attention_k_eq_v=True, num_global_key_value_heads=3),
        "bidirectional",
    ),
    # The last two layers read the keys of the first two, which are on another stride after most funnels.
    "gemma4 shared keys": (Gemma4TextModel, hf.gemma4(num_kv_shared_layers=2, use_double_wide_mlp=True), "causal"),
}
OPTIONS = {
    "model": tuple(MODELS),
    "strides": ((2,), (1, 2), (1, 4), (1, 1, 3), (1, 1, 1, 2), (3, 1, 2), (1, 2, 1, 2), (1, 2, 3)),
    "pool": ("max", "mean", "first"),
    "pool_query_only": (False, True),
    "positions": ("first", "last", "mid", "compact"),
    "keep_first": (False, True),
    "keep_last": (False, True),
    "recovery": (None, *RECOVERIES),
    "recovery_site": ("before_norm", "after_norm"),
}


def is_allowed(case):
    contradiction = case["pool_query_only"] and case["positions"] == "compact"
    two_ends = case["keep_first"] and case["keep_last"]
    idle = case["recovery"] is None and case["recovery_site"] != "before_norm"
    refused = case["model"] == "gemma4 shared keys" and case["positions"] == "compact"
    return not contradiction and not two_ends and not idle and not refused


def pairs(case):
    return list(itertools.combinations(case.items(), 2))


def cover_all_pairs():
    """Few cases in which every allowed pair of option values occurs; greedy, the same ones every time."""
    generator = np.random.default_rng(0)
    names = list(OPTIONS)
    missing = dict.fromkeys(  # a set that keeps its order
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in OPTIONS[a] for y in OPTIONS[b]
    )
    for pair in list(missing):
        full_case = dict.fromkeys(names) | {"recovery": "tile", "recovery_site": "before_norm"} | dict(pair)
        if not is_allowed(full_case):
            del missing[pair]
    cases = []
    while missing:
        wanted = dict(next(iter(missing)))
        drawn = [
            {name: values[generator.integers(len(values))] for name, values in OPTIONS.items()} | wanted
            for _ in range(100)
        ]
        best = max(filter(is_allowed, drawn), key=lambda case: sum(pair in missing for pair in pairs(case)))
        cases.append(best)
        for pair in pairs(best):
            missing.pop(pair, None)
    return cases


CASES = cover_all_pairs()


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    """Halves the time of this file: these many small programs take longer to optimise than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def specimen(tmp_path_factory):
    """Makes a model of `MODELS` when a test first asks for it."""
    made = {}

    def make(name):
        if name not in made:
            model_class, config, attention = MODELS[name]
            model = hf.build(model_class, config)
            made[name] = hf.Specimen.make(tmp_path_factory.mktemp("model"), model, attention)
        return made[name]

    return make


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())).replace(" ", ""))
def test_every_pair_of_options(specimen, case):
    subject = specimen(case["model"])
    funnel = FunnelConfig(**{name: value for name, value in case.items() if name != "model"})
    rows = subject.engine(funnel=funnel, max_batch_tokens=1500).hidden_states(SEQUENCES)
    error = hf.worst(rows, [subject.truth(ids, funnel) for ids in SEQUENCES])
    assert error < TOLERANCE


def test_the_cases_cover_every_value():
    for name, values in OPTIONS.items():
        assert {case[name] for case in CASES} == set(values)


def test_sum_and_mean_differ_by_the_norm_only(specimen):
    """RMSNorm forgets the factor 2 between them, but for its eps, unless it comes before them."""
    subject = specimen("gemma2")
    for site, factor in (("before_norm", 1), ("after_norm", 2)):
        total, mean = (
            np.concatenate(
                subject.engine(
                    funnel=FunnelConfig.after(2, recovery=recovery, recovery_site=site), max_batch_tokens=1500
                ).hidden_states(SEQUENCES)
            )
            for recovery in ("sum_last", "mean_last")
        )
        np.testing.assert_allclose(total, factor * mean, rtol=1e-5, atol=1e-5)


def test_forward_with_the_specified_ops(specimen):
    """The same model over dense reference ops and over blocked ones, without an engine around it."""
    subject = specimen("embeddinggemma")
    checkpoint = read_checkpoint(subject.checkpoint)
    funnel = FunnelConfig(
        strides=(1, 2, 1, 3), pool="mean", pool_query_only=True, positions="mid", keep_first=True, recovery="sum_max"
    )
    plan = make_plan(checkpoint.config, funnel)
    lengths = np.array([len(ids) for ids in SEQUENCES], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    batch = pack(plan, np.concatenate(SEQUENCES).astype(np.int32), offsets, rows=1296)
    params = nest(checkpoint.weights, checkpoint.config, funnel)
    encoder = partial(forward, config=checkpoint.config, funnel=funnel, dtype="float32")
    run = {
        backend: jax.jit(partial(encoder, target=Target(backend)))(params, batch) for backend in ("reference", "xla")
    }
    real = batch.levels[1].real
    assert real.sum() == lengths.sum()
    np.testing.assert_allclose(run["xla"][real], run["reference"][real], rtol=0, atol=1e-5)
    error = hf.worst([run["reference"][real]], [np.concatenate([subject.truth(ids, funnel) for ids in SEQUENCES])])
    assert error < TOLERANCE
