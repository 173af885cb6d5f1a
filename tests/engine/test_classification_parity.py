"""`classify` and `tag` give transformers' logits, for every task class that it has for our families."""

import json
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers

import hugging_face_models as hf
from funnel_engine import Engine, convert

TOLERANCE = 1e-5
PAD = 7  # as a token, 0 is like any other here


class Case(NamedTuple):
    class_name: str
    config: Any
    attention: str
    absent: str | None = None  # this field is not in config.json


def multimodal(**fields):
    vision = {
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return transformers.Gemma3Config(
        text_config=hf.gemma3(**fields).to_dict(), vision_config=vision, mm_tokens_per_image=4, num_labels=hf.LABELS
    )


def t5gemma(encoder=PAD, decoder=PAD, whole=PAD):
    """A config whose parts may disagree about the pad id."""
    config = hf.t5gemma(pad_token_id=encoder)
    config.decoder.pad_token_id, config.pad_token_id = decoder, whole
    return config


CLASSIFIERS = {
    "gemma bidirectional": Case("GemmaForSequenceClassification", hf.gemma(pad_token_id=PAD), "bidirectional"),
    "gemma causal": Case("GemmaForSequenceClassification", hf.gemma(pad_token_id=PAD), "causal"),
    "gemma2 causal": Case("Gemma2ForSequenceClassification", hf.gemma2(pad_token_id=PAD), "causal"),
    "gemma2 bidirectional": Case("Gemma2ForSequenceClassification", hf.gemma2(pad_token_id=PAD), "bidirectional"),
    "gemma3 causal": Case("Gemma3TextForSequenceClassification", hf.gemma3(pad_token_id=PAD), "causal"),
    "gemma3 bidirectional": Case(
        "Gemma3TextForSequenceClassification",
        hf.gemma3(pad_token_id=PAD, use_bidirectional_attention=True),
        "bidirectional",
    ),
    "gemma3 multimodal": Case("Gemma3ForSequenceClassification", multimodal(pad_token_id=PAD), "causal"),
    "t5gemma": Case("T5GemmaForSequenceClassification", t5gemma(), "bidirectional"),
    # T5Gemma's head goes by the outermost pad id, which is the decoder's where it is absent.
    "t5gemma, pad id of the whole": Case(
        "T5GemmaForSequenceClassification", t5gemma(encoder=0, decoder=0), "bidirectional"
    ),
    "t5gemma, pad id of the decoder": Case(
        "T5GemmaForSequenceClassification", t5gemma(encoder=0), "bidirectional", absent="pad_token_id"
    ),
    "llama": Case("LlamaForSequenceClassification", hf.llama(pad_token_id=PAD), "causal"),
    "llama bidirectional": Case("LlamaForSequenceClassification", hf.llama(pad_token_id=PAD), "bidirectional"),
    "mistral": Case("MistralForSequenceClassification", hf.mistral(pad_token_id=PAD), "causal"),
    "qwen3": Case("Qwen3ForSequenceClassification", hf.qwen3(pad_token_id=PAD), "causal"),
}
TAGGERS = {
    "gemma causal": Case("GemmaForTokenClassification", hf.gemma(pad_token_id=PAD), "causal"),
    "gemma bidirectional": Case("GemmaForTokenClassification", hf.gemma(pad_token_id=PAD), "bidirectional"),
    "gemma2 causal": Case("Gemma2ForTokenClassification", hf.gemma2(pad_token_id=PAD), "causal"),
    "gemma2 bidirectional": Case("Gemma2ForTokenClassification", hf.gemma2(pad_token_id=PAD), "bidirectional"),
    "t5gemma": Case("T5GemmaForTokenClassification", t5gemma(), "bidirectional"),
    "llama": Case("LlamaForTokenClassification", hf.llama(pad_token_id=PAD), "causal"),
    "mistral bidirectional": Case("MistralForTokenClassification", hf.mistral(pad_token_id=PAD), "bidirectional"),
    "qwen3": Case("Qwen3ForTokenClassification", hf.qwen3(pad_token_id=PAD), "causal"),
    "eurobert": Case("EuroBertForTokenClassification", hf.eurobert(pad_token_id=PAD), "bidirectional"),
}
REFUSED = {"EuroBertForSequenceClassification"}  # it has a dense layer before its classifier

# Pad ids inside the text, at both ends of it, nothing else, alone; one token; beyond the windows.
SEQUENCES = [
    [5, 17, 3, PAD, PAD],
    [PAD, 5, PAD, 3, 9, 0, 0],
    [PAD] * 4,
    [PAD],
    [8],
    [0],
    *hf.random_ids(30, 11, 23, 1),
]


def test_these_are_all_classes():
    families = ("Gemma", "Gemma2", "Gemma3", "Gemma3Text", "T5Gemma", "Llama", "Mistral", "Qwen3", "EuroBert")
    for task, cases in (("SequenceClassification", CLASSIFIERS), ("TokenClassification", TAGGERS)):
        names = {f"{family}For{task}" for family in families}
        known = {name for name in names if hasattr(transformers, name)}
        assert {case.class_name for case in cases.values()} == known - REFUSED


def make(directory, case):
    """The model of transformers, and the engine on its checkpoint."""
    model = hf.build(getattr(transformers, case.class_name), case.config)
    model.save_pretrained(directory / "source")
    config = json.loads((directory / "source" / "config.json").read_text())
    config.pop(case.absent, None)
    (directory / "source" / "config.json").write_text(json.dumps(config))
    convert(directory / "source", directory / "checkpoint", dtype="float32")
    if case.attention == "bidirectional":
        hf.repair_bidirectional_attention(model)
    return model, Engine.load(directory / "checkpoint", attention=case.attention, max_batch_tokens=256)


@pytest.fixture(scope="module", params=CLASSIFIERS)
def classifier(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("model"), CLASSIFIERS[request.param])


@pytest.fixture(scope="module", params=TAGGERS)
def tagger(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("model"), TAGGERS[request.param])


def test_without_a_pad_id_the_last_token_counts(tmp_path):
    """An explicit null; transformers then takes one text at a time."""
    model, engine = make(tmp_path, Case("GemmaForSequenceClassification", hf.gemma(pad_token_id=None), "causal"))
    assert engine.config.pad_token_id is None
    for ids in SEQUENCES:
        assert worst(engine.classify([ids]), their_logits(model, [ids])) < TOLERANCE
    assert worst(engine.classify(SEQUENCES), np.concatenate([engine.classify([ids]) for ids in SEQUENCES])) < TOLERANCE


@torch.no_grad()
def their_logits(model, sequences):
    """Padded on the right with the model's pad id; only what is beyond the text is masked."""
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [PAD] * (longest - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    return model(input_ids=ids, attention_mask=mask).logits.numpy()


def worst(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.float32
    return np.abs(ours - theirs).max()


def test_classify_a_ragged_batch(classifier):
    model, engine = classifier
    assert worst(engine.classify(SEQUENCES), their_logits(model, SEQUENCES)) < TOLERANCE


@pytest.mark.parametrize("ids", SEQUENCES[:5])
def test_classify_one_sequence(classifier, ids):
    model, engine = classifier
    assert worst(engine.classify([ids]), their_logits(model, [ids])) < TOLERANCE


def test_tag_a_ragged_batch(tagger):
    model, engine = tagger
    theirs = their_logits(model, SEQUENCES)
    for ours, row, ids in zip(engine.tag(SEQUENCES), theirs, SEQUENCES, strict=True):
        assert worst(ours, row[: len(ids)]) < TOLERANCE


@pytest.mark.parametrize("ids", SEQUENCES[:5])
def test_tag_one_sequence(tagger, ids):
    model, engine = tagger
    assert worst(engine.tag([ids])[0], their_logits(model, [ids])[0]) < TOLERANCE
