"""`Engine.embed` gives the vectors of sentence-transformers, for the folders that the library itself saves."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from transformers import Gemma2Model, Gemma3TextModel

import hugging_face_models as hf
from funnel_engine import CheckpointError, Engine, InputError, convert
from sentence_models import (
    BYTE_TEXTS,
    DENSE_SIZES,
    PROMPTS,
    QWEN_PROMPTS,
    TEXTS,
    VOCAB_SIZE,
    save_embedding_gemma,
    save_qwen3_embedding,
    save_sentence_model,
    text_of,
    train_sentencepiece,
    train_tokenizer,
    write_json,
)

TOLERANCE = 1e-5
WIDTH, (MIDDLE, OUT) = hf.SIZES["hidden_size"], DENSE_SIZES
LIMIT = 700  # tokens


def worst(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.float32
    return np.abs(ours - theirs).max()


# ------------------------------------------------------------------------------------------- EmbeddingGemma


@pytest.fixture(scope="module")
def embedding_gemma(tmp_path_factory):
    """Folder `source` and `checkpoint` of a model built like EmbeddingGemma: a window of 256 to either side, mixed
    layer types, two linear layers, BOS and EOS."""
    folder = tmp_path_factory.mktemp("model")
    save_embedding_gemma(folder)
    write_json(folder / "source" / "tokenizer_config.json", model_max_length=LIMIT)
    convert(folder / "source", folder / "checkpoint", dtype="float32")
    return folder


@pytest.fixture(scope="module")
def library(embedding_gemma):
    return SentenceTransformer(str(embedding_gemma / "source"), device="cpu")


@pytest.fixture(scope="module")
def engine(embedding_gemma):
    return Engine.load(embedding_gemma / "checkpoint", max_batch_tokens=4096)


@pytest.fixture(scope="module")
def texts(library):
    """By number of tokens, begin and end counted."""
    return {length: text_of(library.tokenizer, length, seed=length) for length in (3, 200, 258, 300, 600)}


@pytest.mark.parametrize("length", [3, 200, 258, 300, 600])
def test_single_text(library, engine, texts, length):
    tokens = engine.stats()["tokens"]
    assert worst(engine.embed(texts[length]), library.encode([texts[length]])) < TOLERANCE
    assert engine.stats()["tokens"] - tokens == length


def test_ragged_batch(library, engine, texts):
    batch = [texts[length] for length in (300, 3, 600, 258, 200)]
    assert worst(engine.embed(batch), library.encode(batch)) < TOLERANCE


@pytest.mark.parametrize("length", [258, 600])
def test_batch_of_equal_lengths(library, engine, length):
    batch = [text_of(library.tokenizer, length, seed) for seed in range(4)]
    assert worst(engine.embed(batch), library.encode(batch)) < TOLERANCE


def test_texts_of_every_kind(library, engine):
    assert worst(engine.embed(TEXTS), library.encode(TEXTS)) < TOLERANCE


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_by_name(library, engine, texts, name):
    batch = [texts[3], texts[300]]
    theirs = library.encode(batch, prompt_name=name)
    assert worst(engine.embed(batch, prompt_name=name), theirs) < TOLERANCE
    assert worst(engine.embed(batch), theirs) > 100 * TOLERANCE


def test_default_prompt(embedding_gemma, library, engine, texts, tmp_path):
    shutil.copytree(embedding_gemma / "source", tmp_path / "source")
    write_json(tmp_path / "source" / "config_sentence_transformers.json", default_prompt_name="document")
    convert(tmp_path / "source", tmp_path / "checkpoint", dtype="float32")
    with_default = Engine.load(tmp_path / "checkpoint", max_batch_tokens=4096)
    theirs = SentenceTransformer(str(tmp_path / "source"), device="cpu")
    batch = [texts[3], texts[200]]
    assert worst(with_default.embed(batch), theirs.encode(batch)) < TOLERANCE
    assert worst(with_default.embed(batch), library.encode(batch, prompt_name="document")) < TOLERANCE
    assert worst(with_default.embed(batch, prompt_name="query"), theirs.encode(batch, prompt_name="query")) < TOLERANCE


@pytest.mark.parametrize("size", [1, 7, OUT])
def test_truncate_dim(library, engine, texts, size):
    batch = [texts[3], texts[258]]
    theirs = library.encode(batch, truncate_dim=size, normalize_embeddings=True)
    assert worst(engine.embed(batch, truncate_dim=size), theirs) < TOLERANCE


def test_truncate(library, engine, texts):
    """Beyond the limit both cut the text, keep BOS and EOS, and count the prompt."""
    long = [text_of(library.tokenizer, length) for length in (LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 200)]
    assert engine.max_length == library.max_seq_length == LIMIT
    ours = engine.embed([*long, texts[3]], truncate=True, prompt_name="query")
    assert worst(ours, library.encode([*long, texts[3]], prompt_name="query")) < TOLERANCE
    assert worst(engine.embed(long, truncate=True), library.encode(long)) < TOLERANCE
    engine.embed(long[:2])
    with pytest.raises(InputError, match=f"input 2 has {LIMIT + 1} tokens, more than the limit of {LIMIT} "):
        engine.embed(long[:3])


# ------------------------------------------------------------------------------------------- Qwen3-Embedding


@pytest.fixture(scope="module")
def qwen3_embedding(tmp_path_factory):
    """The engine on a model in the files of Qwen3-Embedding, and the library on the same, padding on either side."""
    folder = tmp_path_factory.mktemp("qwen")
    libraries = {
        side: SentenceTransformer(str(save_qwen3_embedding(folder / side, padding_side=side)), device="cpu")
        for side in ("left", "right")
    }
    assert [library.tokenizer.padding_side for library in libraries.values()] == ["left", "right"]
    convert(folder / "left", folder / "checkpoint", dtype="float32")
    return Engine.load(folder / "checkpoint", max_batch_tokens=4096), libraries


@pytest.mark.parametrize("prompt", [None, *QWEN_PROMPTS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_last_token_of_qwen3_embedding(qwen3_embedding, side, prompt):
    """Which side is padded makes no difference to the row of the last token."""
    engine, libraries = qwen3_embedding
    theirs = libraries[side].encode(BYTE_TEXTS, prompt_name=prompt)
    assert worst(engine.embed(BYTE_TEXTS, prompt_name=prompt), theirs) < TOLERANCE
    assert len(np.unique(np.round(theirs, 3), axis=0)) == len(BYTE_TEXTS)


def test_prompts_and_end_of_qwen3_embedding(qwen3_embedding):
    engine, libraries = qwen3_embedding
    assert engine.text.prompts == libraries["left"].prompts == QWEN_PROMPTS
    end = libraries["left"].tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert (engine.text.begin, engine.text.end) == (None, end)
    assert (engine.head.pooling, engine.head.similarity, engine.config.attention) == ("last", "cosine", "causal")
    text = "a small funnel"
    with_query = engine.embed(QWEN_PROMPTS["query"] + text)
    np.testing.assert_array_equal(engine.embed(text, prompt_name="query"), with_query)
    np.testing.assert_array_equal(engine.embed(text, prompt_name="document"), engine.embed(text))
    ids = libraries["left"].tokenizer(text)["input_ids"]
    assert ids[-1] == end
    np.testing.assert_array_equal(engine.embed([ids]), engine.embed([text]))
    assert worst(engine.embed([ids[:-1]]), engine.embed([text])) > 100 * TOLERANCE


@pytest.mark.parametrize("size", [1, 32])
def test_truncate_dim_of_qwen3_embedding(qwen3_embedding, size):
    engine, libraries = qwen3_embedding
    theirs = libraries["left"].encode(BYTE_TEXTS, truncate_dim=size, normalize_embeddings=True)
    assert worst(engine.embed(BYTE_TEXTS, truncate_dim=size), theirs) < TOLERANCE


def test_truncation_of_qwen3_embedding_keeps_the_end(tmp_path):
    source = save_qwen3_embedding(tmp_path / "source", max_tokens=50)
    convert(source, tmp_path / "checkpoint", dtype="float32")
    engine, library = Engine.load(tmp_path / "checkpoint"), SentenceTransformer(str(source), device="cpu")
    assert engine.max_length == library.max_seq_length == 50
    texts = [*BYTE_TEXTS, "the large memory keeps every token " * 20]
    theirs = library.encode(texts, prompt_name="query")
    assert worst(engine.embed(texts, prompt_name="query", truncate=True), theirs) < TOLERANCE


# ------------------------------------------------------------------------------------------- what the library saves

SMALL = {"use_bidirectional_attention": True, "num_hidden_layers": 1, "vocab_size": VOCAB_SIZE}


def save(folder, modules, **options):
    save_sentence_model(folder, hf.build(Gemma3TextModel, hf.gemma3(**SMALL)), modules, **options)
    return folder / "source"


def check(source, normalize):
    """Converts a folder and compares the vectors of all texts."""
    convert(source, source.parent / "checkpoint", dtype="float32")
    engine = Engine.load(source.parent / "checkpoint", max_batch_tokens=1024)
    library = SentenceTransformer(str(source), device="cpu")
    theirs = library.encode(TEXTS)
    scale = max(1.0, float(np.abs(theirs).max()))
    assert worst(engine.embed(TEXTS, normalize=normalize), theirs) < TOLERANCE * scale
    assert len(np.unique(np.round(theirs, 3), axis=0)) > len(TEXTS) // 2
    return engine, library


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "max"])
def test_poolings(tmp_path, pooling, normalize):
    source = save(tmp_path, [Pooling(WIDTH, pooling_mode=pooling), *[Normalize()] * normalize])
    check(source, normalize)


OLDER = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken", "max": "max_tokens"}


@pytest.mark.parametrize("pooling", OLDER)
def test_older_spelling_of_pooling(tmp_path, pooling):
    source = save(tmp_path, [Pooling(WIDTH, pooling_mode="mean")])
    flags = {f"pooling_mode_{name}": mode == pooling for mode, name in OLDER.items()}
    (source / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH} | flags))
    _, library = check(source, normalize=False)
    assert library[1].pooling_mode == pooling


ACTIVATIONS = ["Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense(tmp_path, activation, bias):
    first = Dense(WIDTH, MIDDLE, bias=bias, activation_function=getattr(torch.nn, activation)())
    second = Dense(MIDDLE, OUT, bias=not bias, activation_function=torch.nn.Tanh())
    check(save(tmp_path, [Pooling(WIDTH), first, second]), normalize=False)


@pytest.mark.parametrize("package", ["sentence_transformers.models", "sentence_transformers.base.modules.transformer"])
def test_transformer_in_a_folder(tmp_path, package):
    source = save(tmp_path, [Pooling(WIDTH), Normalize()])
    apart = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"]
    (source / "0_Transformer").mkdir()
    for name in apart:
        (source / name).rename(source / "0_Transformer" / name)
    modules = json.loads((source / "modules.json").read_text())
    modules[0] |= {"path": "0_Transformer", "type": f"{package}.Transformer"}
    (source / "modules.json").write_text(json.dumps(modules))
    check(source, normalize=True)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_and_prompts(tmp_path, similarity):
    source = save(
        tmp_path, [Pooling(WIDTH)], prompts=PROMPTS, default_prompt_name="query", similarity_fn_name=similarity
    )
    engine, library = check(source, normalize=False)
    assert engine.head.similarity == library.similarity_fn_name == similarity
    assert engine.text.prompts == library.prompts == PROMPTS
    assert engine.text.default_prompt_name == library.default_prompt_name == "query"


@pytest.mark.parametrize("flags", [{"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": True}])
def test_sentencepiece(tmp_path, flags):
    source = save(tmp_path, [Pooling(WIDTH), Normalize()])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    (source / "tokenizer.model").write_bytes(train_sentencepiece())
    write_json(source / "tokenizer_config.json", **flags)
    check(source, normalize=True)


TRANSFORMER_FIELDS = [
    {},
    {"max_seq_length": None},
    {"max_seq_length": 100},
    {"max_seq_length": 4096},
    {"tokenizer_args": {"model_max_length": 90}, "max_seq_length": 100},
]
TOKENIZER_FIELDS = [
    {},
    {"model_max_length": 55},
    {"max_len": 56},
    {"model_max_length": 3000},
    {"model_max_length": 10**30},
]


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    return save(tmp_path_factory.mktemp("limited"), [Pooling(WIDTH)])


@pytest.mark.parametrize(("transformer", "tokenizer"), list(itertools.product(TRANSFORMER_FIELDS, TOKENIZER_FIELDS)))
def test_most_tokens_of_a_text(limited, tmp_path, transformer, tokenizer):
    shutil.copytree(limited, tmp_path / "source")
    for name, fields in (("sentence_bert_config.json", transformer), ("tokenizer_config.json", tokenizer)):
        (tmp_path / "source" / name).write_text(json.dumps(fields))
    library = SentenceTransformer(str(tmp_path / "source"), device="cpu")
    convert(tmp_path / "source", tmp_path / "checkpoint", dtype="float32")
    engine = Engine.load(tmp_path / "checkpoint")
    assert engine.max_length == min(library.max_seq_length, hf.SIZES["max_position_embeddings"])


# ------------------------------------------------------------------------------------------- causal embedders

INSTRUCTIONS = {
    "web_search_query": "Instruct: Given a web search query, retrieve relevant passages\nQuery: ",
    "sts_query": "Instruct: Retrieve semantically similar text\nQuery: ",
}
CAUSAL = {
    "gemma2": (Gemma2Model, hf.gemma2, {}),
    "gemma3": (Gemma3TextModel, hf.gemma3, {}),
    "gemma3 with linear RoPE": (
        Gemma3TextModel,
        hf.gemma3,
        {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }},
    ),
}  # fmt: skip


@pytest.mark.parametrize("end", ["", " <eos>"])
@pytest.mark.parametrize(("model_class", "config", "fields"), CAUSAL.values(), ids=CAUSAL)
def test_causal_embedders(tmp_path, model_class, config, fields, end):
    """Language models as embedders: causal, the last token, an instruction before a query, vectors of length 1.

    The side on which the library pads a batch does not matter.
    """
    model = hf.build(model_class, config(vocab_size=VOCAB_SIZE, **fields))
    modules = [Pooling(WIDTH, pooling_mode="lasttoken"), Normalize()]
    save_sentence_model(tmp_path, model, modules, prompts=INSTRUCTIONS)
    source = tmp_path / "source"
    train_tokenizer(f"<bos> $A{end}").save(str(source / "tokenizer.json"))
    convert(source, tmp_path / "checkpoint", dtype="float32")
    engine = Engine.load(tmp_path / "checkpoint", max_batch_tokens=1024)
    assert (engine.config.attention, engine.head.pooling) == ("causal", "last")
    assert (engine.text.begin, engine.text.end) == (2, 1 if end else None)
    library = SentenceTransformer(str(source), device="cpu")
    assert engine.text.prompts == library.prompts == INSTRUCTIONS | {"query": "", "document": ""}
    for side, name in itertools.product(("left", "right"), (None, *INSTRUCTIONS)):
        library.tokenizer.padding_side = side
        mask = library.preprocess(["a", "a small funnel"])["attention_mask"][0].tolist()
        assert mask == sorted(mask, reverse=side == "right")
        theirs = library.encode(TEXTS, prompt_name=name)
        assert worst(engine.embed(TEXTS, prompt_name=name), theirs) < TOLERANCE
        assert np.linalg.norm(theirs, axis=1) == pytest.approx(1)
        assert len(np.unique(np.round(theirs, 3), axis=0)) > len(TEXTS) // 2


def test_an_embedder_with_code_of_its_own(tmp_path):
    """It is refused; the message leads to a folder that is converted, if the code computes the standard forward."""
    source = save(tmp_path, [Pooling(WIDTH, pooling_mode="mean"), Normalize()])
    write_json(source / "config.json", auto_map={"AutoConfig": "configuration.C", "AutoModel": "modeling.M"})
    (source / "modeling.py").write_text("class M: ...\n")
    with pytest.raises(CheckpointError, match=r"own code, which is not run.* delete auto_map from"):
        convert(source, tmp_path / "checkpoint")
    config = json.loads((source / "config.json").read_text())
    del config["auto_map"]
    (source / "config.json").write_text(json.dumps(config))
    check(source, normalize=True)
