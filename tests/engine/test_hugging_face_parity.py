"""The engine without a funnel computes what transformers computes, for every family, mask and shape of batch."""

from typing import Any, NamedTuple

import pytest
import transformers
from transformers import (
    EmbeddingGemma2TextModel,
    EuroBertModel,
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


class Case(NamedTuple):
    model_class: type[transformers.PreTrainedModel]
    config: Any
    attention: str
    edges: tuple[int, ...]  # lengths on either side of the window's end


LINEAR_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES = {
    "gemma causal": Case(GemmaModel, hf.gemma, "causal", (257,)),
    "gemma bidirectional": Case(GemmaModel, hf.gemma, "bidirectional", (257,)),
    # A causal window of 9 is the token itself and 8 before it; the authors' bidirectional one has 8 on either side.
    "gemma2 causal": Case(Gemma2Model, hf.gemma2, "causal", (9, 10)),
    "gemma2 bidirectional": Case(Gemma2Model, hf.gemma2, "bidirectional", (9, 10)),
    # A window of 9 has 4 tokens on either side, one of 8 has 3 to the left and 4 to the right.
    "t5gemma2 odd window": Case(hf.T5Gemma2Encoder, hf.t5gemma2, "bidirectional", (4, 5, 6)),
    "t5gemma2 even window": Case(hf.T5Gemma2Encoder, lambda: hf.t5gemma2(sliding_window=8), "bidirectional", (4, 5, 6)),
    "t5gemma": Case(T5GemmaEncoderModel, hf.t5gemma, "bidirectional", (8, 9)),
    "gemma3 window 512, linear RoPE": Case(
        Gemma3TextModel,
        lambda: hf.gemma3(sliding_window=512, rope_parameters=LINEAR_ROPE),
        "causal",
        (512, 513),
    ),
    "gemma3 window 1024": Case(Gemma3TextModel, lambda: hf.gemma3(sliding_window=1024), "causal", (1024, 1025)),
    # Gemma 3 halves its window when it sees both ways: 256 tokens on either side, so token 257 is the first unseen.
    "embeddinggemma": Case(
        Gemma3TextModel,
        lambda: hf.gemma3(sliding_window=512, use_bidirectional_attention=True),
        "bidirectional",
        (257, 258, 513),
    ),
    "llama, llama3 RoPE": Case(LlamaModel, lambda: hf.llama(rope_parameters=hf.LLAMA3_ROPE), "causal", (26, 257)),
    "llama bidirectional": Case(LlamaModel, hf.llama, "bidirectional", (257,)),
    # A causal window of 9 is the token itself and 8 before it; a bidirectional one has 9 on either side.
    "mistral causal": Case(MistralModel, hf.mistral, "causal", (9, 10)),
    "mistral bidirectional": Case(MistralModel, hf.mistral, "bidirectional", (10, 11)),
    "mistral without a window": Case(MistralModel, lambda: hf.mistral(sliding_window=None), "causal", (257,)),
    "qwen3": Case(Qwen3Model, lambda: hf.qwen3(use_sliding_window=False), "causal", (257,)),
    "qwen3 with windows": Case(Qwen3Model, hf.qwen3, "causal", (8, 9)),
    "qwen3 with windows, bidirectional": Case(Qwen3Model, hf.qwen3, "bidirectional", (9, 10)),
    "llama with biases": Case(LlamaModel, lambda: hf.llama(attention_bias=True, mlp_bias=True), "causal", (257,)),
    "qwen3 with biases": Case(Qwen3Model, lambda: hf.qwen3(attention_bias=True), "causal", (8, 9)),
    "eurobert with biases": Case(
        EuroBertModel, lambda: hf.eurobert(attention_bias=True, mlp_bias=True), "bidirectional", (257,)
    ),
    "embeddinggemma with biases": Case(
        Gemma3TextModel,
        lambda: hf.gemma3(attention_bias=True, use_bidirectional_attention=True),
        "bidirectional",
        (4, 5),
    ),
    "gemma4 with biases, keys as values": Case(
        Gemma4TextModel, lambda: hf.gemma4(attention_bias=True, attention_k_eq_v=True), "causal", (8, 9)
    ),
    "gemma4 with biases, shared keys": Case(
        Gemma4TextModel, lambda: hf.gemma4(attention_bias=True, num_kv_shared_layers=2), "causal", (8, 9)
    ),
    "eurobert": Case(EuroBertModel, hf.eurobert, "bidirectional", (257,)),
    # The window is an inclusive radius: 4 tokens on either side.
    "embeddinggemma2": Case(EmbeddingGemma2TextModel, hf.embedding_gemma2, "bidirectional", (4, 5, 6, 10)),
    "gemma4 causal": Case(Gemma4TextModel, hf.gemma4, "causal", (8, 9)),
    # Halved as Gemma 3's window: 4 tokens on either side.
    "gemma4 bidirectional, keys as values": Case(
        Gemma4TextModel,
        lambda: hf.gemma4(
            use_bidirectional_attention="all", attention_k_eq_v=True, num_global_key_value_heads=3, sliding_window=9
        ),
        "bidirectional",
        (4, 5, 6, 10),
    ),
    "gemma4 shared keys": Case(
        Gemma4TextModel, lambda: hf.gemma4(num_kv_shared_layers=2, use_double_wide_mlp=True), "causal", (8, 9)
    ),
    "gemma4 without per-layer inputs": Case(
        Gemma4TextModel, lambda: hf.gemma4(hidden_size_per_layer_input=0), "causal", (8, 9)
    ),
}


class Subject(NamedTuple):
    specimen: hf.Specimen
    engine: Any
    edges: tuple[int, ...]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.grid) if "1024" in name else name for name in CASES]
)
def subject(request, tmp_path_factory):
    case = CASES[request.param]
    model = hf.build(case.model_class, case.config())
    specimen = hf.Specimen.make(tmp_path_factory.mktemp("model"), model, case.attention)
    return Subject(specimen, specimen.engine(max_batch_tokens=4096), case.edges)


def check(specimen, engine, sequences):
    truth = [specimen.truth(ids) for ids in sequences]
    hf.assert_as_right_as_transformers(engine.hidden_states(sequences), specimen.transformers_rows(sequences), truth)


def test_single_sequences(subject):
    """Each alone, and compared together: the worst of a few rows is a matter of luck, on either side."""
    sequences = [hf.random_ids(length, seed=length) for length in (1, 2, 7, 63, *subject.edges)]
    ours, theirs, truth = [], [], []
    for alone in sequences:
        ours += subject.engine.hidden_states(alone)
        theirs += subject.specimen.transformers_rows(alone)
        truth += [subject.specimen.truth(ids) for ids in alone]
    hf.assert_as_right_as_transformers(ours, theirs, truth)


def test_ragged_batch(subject):
    check(subject.specimen, subject.engine, hf.random_ids(5, 40, 1, max(subject.edges), 17))


def test_batch_of_equal_lengths_beyond_the_window(subject):
    check(subject.specimen, subject.engine, hf.random_ids(*[max(subject.edges) + 1] * 3))


@pytest.mark.parametrize(
    ("model_class", "config", "attention"),
    [
        (GemmaModel, hf.gemma(), "bidirectional"),
        (Gemma2Model, hf.gemma2(), "bidirectional"),
        (Gemma3TextModel, hf.gemma3(), "causal"),
        (Gemma3TextModel, hf.gemma3(use_bidirectional_attention=True), "bidirectional"),
        (T5GemmaEncoderModel, hf.t5gemma(), "bidirectional"),
        (LlamaModel, hf.llama(), "causal"),
        (MistralModel, hf.mistral(), "causal"),
        (Qwen3Model, hf.qwen3(), "causal"),
        (EuroBertModel, hf.eurobert(), "bidirectional"),
        (EmbeddingGemma2TextModel, hf.embedding_gemma2(), "bidirectional"),
        (Gemma4TextModel, hf.gemma4(), "causal"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_weights_of_standard_deviation_2_percent(tmp_path, model_class, config, attention):
    specimen = hf.Specimen.make(tmp_path, hf.build(model_class, config, deviation=0.02), attention)
    check(specimen, specimen.engine(), hf.random_ids(63, 1, 7, 24))
