"""GGUF files become the weights that the same model has through Hugging Face; all else is refused.

The files are written with llama.cpp's package gguf: its writer, its table of names, and its quantization where it has
one. What its converter writes besides (conversion/gemma.py of llama.cpp) is written here by hand.
"""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFEndian, GGUFWriter, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import generate_merges

import hugging_face_models as models
from funnel_engine import CheckpointError, Engine, convert
from funnel_engine.checkpoints import gguf_file, tensors
from funnel_engine.checkpoints.formats import detect_format
from funnel_engine.checkpoints.gguf_file import TYPES
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.config import Rope
from funnel_engine.inspection import inspect_checkpoint
from funnel_engine.presets import PRESETS
from sentence_models import TEXTS, VOCAB_SIZE, train_sentencepiece, train_tokenizer, write_json

F32, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.BF16
ARCHITECTURES = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
SCALE = {"query_pre_attn_scalar": models.SIZES["head_dim"]}  # llama.cpp has no other, but for the 27B models
SIX = {"num_hidden_layers": 7, "layer_types": [*["sliding_attention"] * 5, "full_attention"]}  # Gemma 3's own pattern
BLOCKS = {  # rows of whole blocks of 256 values
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 384,
    "query_pre_attn_scalar": 384,
}
MODELS = {
    "gemma": ("GemmaModel", lambda **fields: models.gemma(**fields)),
    "gemma2": ("Gemma2Model", lambda **fields: models.gemma2(**SCALE | fields)),
    "gemma3": ("Gemma3TextModel", lambda **fields: models.gemma3(**SCALE | SIX | fields)),
    "gemma-embedding": (
        "Gemma3TextModel",
        lambda **fields: models.gemma3(**SCALE | SIX | {"use_bidirectional_attention": True} | fields),
    ),
}


def make_model(architecture: str, **fields: Any) -> Any:
    class_name, config = MODELS[architecture]
    return models.build(getattr(transformers, class_name), config(**fields))


def keys_of(architecture: str, config: Any) -> dict[str, Any]:
    """What llama.cpp's converter says of a model, without the architecture's name."""
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if architecture == "gemma2":
        keys |= {
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
        }
    if architecture != "gemma":
        width = 8 if architecture == "gemma-embedding" else config.sliding_window  # transformers has halved it
        keys["attention.sliding_window"] = width
    if architecture in ("gemma3", "gemma-embedding"):
        keys["rope.freq_base"] = 1_000_000.0
    return keys | ({"pooling_type": 1} if architecture == "gemma-embedding" else {})


def random_blocks(shape: tuple[int, ...], kind: GGMLQuantizationType, seed: int) -> np.ndarray:
    """Random bits of a type that gguf cannot make from numbers. Its scales are small numbers of float16."""
    generator = np.random.default_rng(seed)
    block, size = GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (shape[0] * shape[1] // block, size), np.uint8)
    scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (size - 2,)}[kind.name]
    for at in scales:
        values = generator.uniform(-1e-3, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def encode(tensor: torch.Tensor, kind: GGMLQuantizationType, seed: int) -> np.ndarray:
    """A matrix in the bytes of a file; the values of the matrix are replaced by those that the bytes give."""
    values = tensor.numpy()
    data = random_blocks(values.shape, kind, seed) if kind.name.endswith("_K") else quantize(values, kind)
    tensor.copy_(torch.from_numpy(dequantize(data, kind).reshape(values.shape)))
    return data


def write(
    path: Path,
    model: Any,
    architecture: str,
    kinds: tuple[GGMLQuantizationType, ...] = (F32,),
    *,
    dense: dict[str, torch.Tensor] | None = None,
    others: dict[str, np.ndarray] | None = None,
    split: int = 0,
    endian: GGUFEndian = GGUFEndian.LITTLE,
    rename: Callable[[str], str] = lambda name: name,
    **keys: Any,
) -> Path:
    """Writes a file; the matrices take the types `kinds` in turn. A key that is None is left out.

    Args:
        dense: dense layers, by their names in the file without ".weight".
        others: further tensors.
        split: tensors in a part; 0 writes one file.
    """
    path.parent.mkdir(exist_ok=True, parents=True)
    own = {f"{architecture}.{name}": value for name, value in keys_of(architecture, model.config).items()}
    fields = {"general.type": "model", **own, **keys}
    names = get_tensor_name_map(ARCHITECTURES[architecture], model.config.num_hidden_layers)
    writer = GGUFWriter(path, architecture, endianess=endian, split_max_tensors=split)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in fields.items():
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    with torch.no_grad():
        for index, (name, parameter) in enumerate([*model.named_parameters(), *(dense or {}).items()]):
            theirs = names.get_name(f"model.{name}", (".weight",)) or f"{name}.weight"
            if parameter.ndim == 1:
                writer.add_tensor(rename(theirs), parameter.numpy() + 1)
                parameter.copy_(torch.from_numpy((parameter.numpy() + 1) - 1))  # float32 has lost some bits
            else:
                kind = kinds[index % len(kinds)]
                writer.add_tensor(rename(theirs), encode(parameter, kind, index), raw_dtype=kind)
    for name, value in (others or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check_as_hugging_face(model: Any, source: Path, folder: Path, dtype: str = "float32") -> Path:
    """Every weight of the converted file is that of the model through Hugging Face; returns the checkpoint."""
    model.save_pretrained(folder / "hugging_face")
    if model.config.model_type == "gemma3_text" and model.config.use_bidirectional_attention:
        write_json(folder / "hugging_face" / "config.json", sliding_window=8)
    convert(folder / "hugging_face", folder / "reference", dtype=dtype)
    convert(source, folder / "ours", dtype=dtype)
    expected, found = read_checkpoint(folder / "reference"), read_checkpoint(folder / "ours")
    assert found.manifest.source.format == "gguf"
    assert found.config == expected.config
    weights = {name: weight for name, weight in found.weights.items() if not name.startswith("dense.")}
    assert weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(weights[name], weight, strict=True, err_msg=name)
    return folder / "ours"


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        convert(source, source.parent / "refused", **options)
    assert not (source.parent / "refused").exists()
    problems = inspect_checkpoint(source)["problems"]
    assert options or [line.strip() for line in str(error.value).splitlines()] == problems
    return str(error.value)


@pytest.fixture
def file(tmp_path) -> Path:
    return write(tmp_path / "gemma3.gguf", make_model("gemma3"), "gemma3")


# -------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", MODELS)
def test_every_architecture(tmp_path, architecture, dtype):
    model = make_model(architecture)
    source = write(tmp_path / "source" / "model.gguf", model, architecture)
    assert detect_format(source) == detect_format(source.parent) == "gguf"
    checkpoint = read_checkpoint(check_as_hugging_face(model, source, tmp_path, dtype))
    assert checkpoint.config.attention == ("bidirectional" if architecture == "gemma-embedding" else "causal")
    assert set(checkpoint.manifest.source.files) == {"model.gguf"}
    convert(source.parent, tmp_path / "folder", dtype=dtype)
    assert (tmp_path / "folder" / "weights.safetensors").read_bytes() == (
        tmp_path / "ours" / "weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("kind", TYPES)
def test_every_type(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tensors, "PIECE_BYTES", 7000)  # a few rows, so that not every piece starts at row 0
    model = make_model("gemma3", **BLOCKS)
    source = write(tmp_path / "model.gguf", model, "gemma3", (GGMLQuantizationType[kind],))
    checkpoint = read_checkpoint(check_as_hugging_face(model, source, tmp_path))
    assert len(np.unique(checkpoint.weights["layers.1.down"])) > 200
    assert inspect_checkpoint(source)["dtype"] == ", ".join(sorted({"F32", kind}))
    matrices = 1 + 7 * model.config.num_hidden_layers
    quantized = {kind: matrices} if kind.startswith("Q") else {}
    assert checkpoint.manifest.quantized == quantized
    convert(tmp_path / "ours", tmp_path / "again", dtype="bfloat16")
    assert inspect_checkpoint(tmp_path / "again")["quantized"] == quantized


@pytest.mark.parametrize("architecture", ["gemma2", "gemma-embedding"])
def test_types_are_mixed(tmp_path, architecture):
    model = make_model(architecture, **BLOCKS)
    kinds = tuple(GGMLQuantizationType[kind] for kind in TYPES)
    check_as_hugging_face(model, write(tmp_path / "model.gguf", model, architecture, kinds), tmp_path)


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3"])
def test_hidden_states_are_those_of_transformers(tmp_path, architecture):
    model = make_model(architecture, **BLOCKS)
    source = write(tmp_path / "model.gguf", model, architecture, (GGMLQuantizationType.Q8_0, BF16))
    convert(source, tmp_path / "ours", dtype="float32")
    sequences = models.random_ids(1, 3, 30)
    ids, mask = models.pad(sequences)
    with torch.no_grad():
        rows = model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
    truth = [row[: len(sequence)] for row, sequence in zip(rows, sequences, strict=True)]
    assert models.worst(Engine.load(tmp_path / "ours").hidden_states(sequences), truth) < 2e-5


def test_norms_are_exact(tmp_path):
    """1 is subtracted in float32, before anything is rounded: in bfloat16, 1 + 0.001 would be 1."""
    model = make_model("gemma2")
    with torch.no_grad():
        model.norm.weight.fill_(2.0**-10)
    convert(write(tmp_path / "model.gguf", model, "gemma2"), tmp_path / "ours")
    assert (read_checkpoint(tmp_path / "ours").weights["final_norm"].astype(np.float32) == 2.0**-10).all()


def test_embedding_gemma_has_its_dense_layers(tmp_path):
    model = make_model("gemma-embedding", **BLOCKS)
    generator = torch.Generator().manual_seed(4)
    dense = {
        "dense_2": torch.randn(512, 256, generator=generator),
        "dense_3": torch.randn(256, 512, generator=generator),
    }
    sizes = {"dense_2_feat_in": 256, "dense_2_feat_out": 512, "dense_3_feat_in": 512, "dense_3_feat_out": 256}
    keys = {f"gemma-embedding.{name}": size for name, size in sizes.items()}
    source = write(tmp_path / "model.gguf", model, "gemma-embedding", (GGMLQuantizationType.Q4_0,), dense=dense, **keys)
    checkpoint = read_checkpoint(check_as_hugging_face(model, source, tmp_path))
    assert (checkpoint.head.pooling, checkpoint.head.similarity) == ("mean", "cosine")
    for index, weight in enumerate(dense.values()):
        np.testing.assert_array_equal(checkpoint.weights[f"dense.{index}.weight"], weight.numpy())
    engine = Engine.load(tmp_path / "ours")
    mean = engine.hidden_states([[5, 6, 7]])[0].mean(0)
    expected = dense["dense_3"].numpy() @ (dense["dense_2"].numpy() @ mean)
    np.testing.assert_allclose(engine.embed([[5, 6, 7]], normalize=False)[0], expected, rtol=1e-4, atol=1e-4)

    keys["gemma-embedding.dense_3_feat_in"] = 511
    wrong = write(tmp_path / "wrong.gguf", model, "gemma-embedding", dense=dense, **keys)
    assert "gemma-embedding.dense_3_feat_in is 511, but only 512 is supported" in refusal(wrong)
    half = write(tmp_path / "half.gguf", model, "gemma-embedding", dense={"dense_2": dense["dense_2"]})
    assert "must have two matrices dense_2 and dense_3" in refusal(half)


def test_embedding_gemma_without_its_dense_layers(tmp_path, monkeypatch):
    """Only the published model is known to have some."""
    model = make_model("gemma-embedding")
    source = write(tmp_path / "model.gguf", model, "gemma-embedding")
    convert(source, tmp_path / "ours")
    monkeypatch.setitem(PRESETS, "embeddinggemma-300m", model.config.to_dict() | {"sliding_window": 8})
    assert "convert_hf_to_gguf.py --sentence-transformers-dense-modules" in refusal(source)


@pytest.mark.parametrize(("number", "pooling"), [(0, "mean"), (1, "mean"), (2, "first"), (3, "last")])
def test_pooling(tmp_path, number, pooling):
    source = write(tmp_path / "model.gguf", make_model("gemma3"), "gemma3", **{"gemma3.pooling_type": number})
    convert(source, tmp_path / "ours")
    assert read_checkpoint(tmp_path / "ours").head.pooling == pooling


def test_a_separate_output_table_is_left_out(tmp_path):
    model = make_model("gemma3")
    table = np.random.default_rng(0).normal(size=(101, 48)).astype(np.float32)
    source = write(tmp_path / "model.gguf", model, "gemma3", others={"output.weight": table})
    checkpoint = read_checkpoint(check_as_hugging_face(model, source, tmp_path))
    assert checkpoint.manifest.source.dropped == {"output.weight": 1}


# ------------------------------------------------------------------------------------------------- settings


def config_of(folder: Path, architecture: str, model: Any = None, **keys: Any) -> Any:
    """The config of a converted file with further keys."""
    keys = {f"{architecture}.{name}": value for name, value in keys.items()}
    convert(write(folder / "model.gguf", model or make_model(architecture), architecture, **keys), folder / "ours")
    return read_checkpoint(folder / "ours").config


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_27b_models_scale_by_the_width_per_head(tmp_path, architecture, layers):
    model = make_model(architecture, num_hidden_layers=layers)
    assert config_of(tmp_path / "27b", architecture, model).query_scale == (48 // 6) ** -0.5
    assert config_of(tmp_path / "other", architecture).query_scale == 14**-0.5


def test_rope(tmp_path):
    keys = {"rope.freq_base": 5e5, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base_swa": 2e4}
    config = config_of(tmp_path / "all", "gemma3", **keys)
    assert (config.full_rope, config.sliding_rope) == (Rope(5e5, 8.0), Rope(2e4))
    config = config_of(tmp_path / "no type", "gemma3", **{"rope.scaling.factor": 4.0})  # llama.cpp takes linear
    assert config.full_rope == Rope(1e6, 4.0)
    config = config_of(tmp_path / "none", "gemma3", **{"rope.scaling.factor": 4.0, "rope.scaling.type": "none"})
    assert config.full_rope == Rope(1e6)
    config = config_of(tmp_path / "gemma2", "gemma2", **{"rope.scaling.factor": 2.0, "rope.freq_base": 9e3})
    assert config.full_rope == config.sliding_rope == Rope(9e3, 2.0)


def test_windows(tmp_path):
    default = config_of(tmp_path / "default", "gemma2", **{"attention.sliding_window": None})
    assert default.causal_window == (4095, 0)
    full = config_of(tmp_path / "full", "gemma3", **{"attention.sliding_window": None})
    assert set(full.layer_types) == {"full"}
    period = config_of(tmp_path / "period", "gemma3", **{"attention.sliding_window_pattern": 3})
    assert period.layer_types == ("sliding", "sliding", "full", "sliding", "sliding", "full", "sliding")
    pattern = [True, False, False, True, True, False, True]
    listed = config_of(tmp_path / "list", "gemma3", **{"attention.sliding_window_pattern": pattern})
    assert listed.layer_types == tuple("sliding" if sliding else "full" for sliding in pattern)
    odd = write(tmp_path / "odd.gguf", make_model("gemma-embedding"), "gemma-embedding")
    convert(odd, tmp_path / "given", sliding_window=12)
    assert read_checkpoint(tmp_path / "given").config.bidirectional_window == (6, 6)


def test_a_bidirectional_gemma_1(tmp_path):
    assert config_of(tmp_path, "gemma", **{"attention.causal": False}).attention == "bidirectional"


@pytest.mark.parametrize(
    ("architecture", "key", "value", "words"),
    [
        ("gemma3", "block_count", None, "gemma3.block_count is missing; fetch the file again"),
        ("gemma3", "block_count", 10**6, "num_hidden_layers=1000000"),
        ("gemma3", "block_count", 8, "missing: blk.7.attn_norm.weight"),
        ("gemma3", "block_count", 6, "unknown: 'blk.6.attn_"),
        ("gemma3", "embedding_length", 47, "misshapen: token_embd.weight"),
        ("gemma3", "attention.head_count", [6] * 7, "gemma3.attention.head_count is [6, 6"),
        ("gemma3", "attention.head_count", 0, "num_attention_heads=0"),
        ("gemma3", "attention.value_length", 13, "gemma3.attention.value_length is 13, but only 14 is supported"),
        ("gemma3", "rope.dimension_count", 7, "gemma3.rope.dimension_count is 7, but only 14 is supported"),
        ("gemma3", "vocab_size", 100, "gemma3.vocab_size is 100, but only 101 is supported"),
        ("gemma3", "rope.freq_base", None, "gemma3.rope.freq_base is missing"),
        ("gemma3", "rope.freq_base", float("nan"), "gemma3.rope.freq_base is nan; it must be a finite number"),
        ("gemma3", "rope.scaling.type", "yarn", "RoPE type 'yarn' is not supported"),
        ("gemma2", "rope.freq_base_swa", 5.0, "gemma2.rope.freq_base_swa is 5.0, but only 10000.0 is supported"),
        ("gemma3", "attention.causal", False, "gemma3.attention.causal is False, but only True is supported"),
        (
            "gemma-embedding",
            "attention.causal",
            True,
            "gemma-embedding.attention.causal is True, but only False is supported",
        ),
        ("gemma-embedding", "attention.sliding_window", 257, "sliding_window=257 is odd"),
        ("gemma3", "attention.sliding_window_pattern", [True], "layer_types must list one type for each"),
        ("gemma3", "attention.sliding_window_pattern", ["x"] * 7, "layer type 'x' is unknown"),
        ("gemma3", "attention.sliding_window_pattern", "x", "sliding_window_pattern='x'"),
        ("gemma3", "pooling_type", 4, "gemma3.pooling_type is 4; this engine reads 0, 1, 2, 3 (none"),
        ("gemma3", "expert_count", 8, "does not know and that could change the result: 'expert_count'"),
        ("gemma2", "attn_logit_softcapping", -1.0, "attn_logit_softcapping=-1.0"),
    ],
)
def test_keys_that_do_not_fit(tmp_path, architecture, key, value, words):
    source = write(tmp_path / "model.gguf", make_model(architecture), architecture, **{f"{architecture}.{key}": value})
    assert words in refusal(source)


# ---------------------------------------------------------------------------------------------- split files


def test_a_split_file(tmp_path):
    model = make_model("gemma3")
    write(tmp_path / "source" / "model.gguf", model, "gemma3", split=40)
    parts = sorted((tmp_path / "source").glob("*.gguf"))
    assert len(parts) == 3
    checkpoint = read_checkpoint(check_as_hugging_face(model, parts[1], tmp_path))
    assert set(checkpoint.manifest.source.files) == {part.name for part in parts}
    convert(tmp_path / "source", tmp_path / "folder", dtype="float32")

    data = parts[0].read_bytes()
    name = "model-00001-of-00001.gguf"
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / name).write_bytes(data)
    assert "says that it is part 1 of 3, but its name says 1 of 1" in refusal(tmp_path / "alone" / name)
    for other in ("model.gguf", "model-00001-of-00000.gguf"):
        name = (tmp_path / "alone" / name).rename(tmp_path / "alone" / other).name
        assert "llama-gguf-split --merge" in refusal(tmp_path / "alone" / name)
    parts[0].write_bytes(data.replace(struct.pack("<i", len(list(model.parameters()))), struct.pack("<i", 7), 1))
    assert "says that all parts have 7 tensors" in refusal(parts[0])
    parts[0].write_bytes(data)
    parts[1].rename(tmp_path / "elsewhere.gguf")
    assert f"lists '{parts[1].name}', which are not in the same folder" in refusal(parts[0])
    (tmp_path / "source" / parts[1].name).write_bytes(data)
    assert "which another file contains too" in refusal(parts[0])


@pytest.mark.parametrize("fields", [{"split.no": "0"}, {"split.count": [1]}, {"split.tensors.count": 1.5}])
def test_numbers_of_parts_that_are_not_numbers(tmp_path, fields):
    (name,) = fields
    assert f"{name} is" in refusal(write(tmp_path / "model.gguf", make_model("gemma3"), "gemma3", **fields))


def test_a_folder_of_several_models(file):
    (file.parent / "other.gguf").write_bytes(file.read_bytes())
    message = refusal(file.parent, format="gguf")
    assert "'gemma3.gguf', 'other.gguf'; give the path of the file" in message


# ------------------------------------------------------------------------------------------------ tokenizer


def tokenizer_fields(model: bytes, vocab_size: int = VOCAB_SIZE, **fields: Any) -> dict[str, Any]:
    """The tokenizer as llama.cpp's converter writes it: special pieces have a score of -1000 and plain spaces."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    scores, types = [-10000.0] * vocab_size, [5] * vocab_size
    special = {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>"}
    for number in range(processor.get_piece_size()):
        piece = processor.id_to_piece(number)
        kind = 6 if processor.is_byte(number) else 1
        score = processor.get_score(number)
        if piece in special:
            kind, score = 3, -1000.0
        elif piece in ("\n\n", "▁▁"):
            kind, score, piece = 4, -1000.0, piece.replace("▁", " ")
        tokens[number], scores[number], types[number] = piece, score, kind
    stated = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
        "padding_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": False,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (stated | fields).items()}


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    return train_sentencepiece()


def write_with_tokenizer(path: Path, model: bytes, **fields: Any) -> Path:
    return write(path, make_model("gemma2", vocab_size=VOCAB_SIZE), "gemma2", **tokenizer_fields(model, **fields))


def random_texts(count: int) -> list[str]:
    """Pieces of words, special tokens, runs of whitespace and characters of every script, and random bytes."""
    generator = np.random.default_rng(5)
    parts = [
        *"".join(TEXTS),
        "\n\n",
        "▁▁",
        "<bos>",
        "<mask>",
        "<start_of_turn>",
        " ",
        "  ",
        "funnel",
        "the ",
        "[PAD405]",
    ]
    texts = []
    for _ in range(count):
        chosen = [str(part) for part in generator.choice(np.array(parts, object), generator.integers(1, 30))]
        chosen += [chr(point) for point in generator.integers(0x20, 0xD7FF, 3)]
        chosen += [chr(point) for point in generator.integers(0x1F300, 0x1FAFF, 2)]
        chosen += [generator.bytes(8).decode(errors="replace")]
        texts.append("".join(generator.permutation(np.array(chosen, object))))
    return texts


def test_the_tokenizer_is_the_original(tmp_path, sentencepiece_model):
    """Every id is that of transformers, which makes a tokenizer.json from the SentencePiece model."""
    folder = tmp_path / "hugging_face"
    transformers.Gemma2Config(vocab_size=VOCAB_SIZE).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    original = transformers.AutoTokenizer.from_pretrained(folder)
    convert(write_with_tokenizer(tmp_path / "model.gguf", sentencepiece_model), tmp_path / "ours")
    rebuilt = Tokenizer.from_file(str(tmp_path / "ours" / "tokenizer.json"))
    texts = TEXTS + random_texts(2000)
    for text, encoding in zip(texts, rebuilt.encode_batch(texts), strict=True):
        assert encoding.ids == [2, *original(text, add_special_tokens=False)["input_ids"]], text
    ours, theirs = (json.loads(tokenizer.to_str()) for tokenizer in (rebuilt, original.backend_tokenizer))
    vocabulary = ours["model"]["vocab"]
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    scores = {piece: processor.get_score(number) for piece, number in vocabulary.items()}
    # In the order of the published tokenizer.json; transformers now sorts the pairs of one union the other way round.
    assert list(map(tuple, ours["model"].pop("merges"))) == generate_merges(vocabulary, scores)
    theirs["model"].pop("merges")
    for part in ("model", "normalizer", "pre_tokenizer", "decoder"):
        assert ours[part] == theirs[part], part

    engine = Engine.load(tmp_path / "ours")
    assert engine.text.begin == 2
    assert engine.text.end is None
    assert engine.token_ids(["a small <bos> funnel"]).ids.tolist() == [
        2,
        *original("a small <bos> funnel")["input_ids"],
    ]
    assert inspect_checkpoint(tmp_path / "model.gguf")["tokenizer"] == "tokenizer.json"


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("end", [True, False])
def test_begin_and_end(tmp_path, sentencepiece_model, begin, end):
    fields = {"add_bos_token": begin, "add_eos_token": end}
    convert(write_with_tokenizer(tmp_path / "model.gguf", sentencepiece_model, **fields), tmp_path / "ours")
    expected = [2] * begin + Engine.load(tmp_path / "ours").tokenizer(["a small funnel"])[0] + [1] * end
    assert Engine.load(tmp_path / "ours").token_ids(["a small funnel"]).ids.tolist() == expected
    assert Tokenizer.from_file(str(tmp_path / "ours" / "tokenizer.json")).encode("a small funnel").ids == expected


def test_a_file_without_a_tokenizer(tmp_path, file):
    convert(file, tmp_path / "bare")
    assert read_checkpoint(tmp_path / "bare").tokenizer_file is None
    source = write(tmp_path / "other.gguf", make_model("gemma2", vocab_size=VOCAB_SIZE), "gemma2")
    train_tokenizer().save(str(tmp_path / "tokenizer.json"))
    convert(source, tmp_path / "beside")
    assert read_checkpoint(tmp_path / "beside").manifest.text.begin == 2


def test_a_tokenizer_of_another_kind(tmp_path):
    fields = {"tokenizer.ggml.model": "gpt2"}
    source = write(tmp_path / "model.gguf", make_model("gemma2", vocab_size=VOCAB_SIZE), "gemma2", **fields)
    assert "tokenizer.ggml.model is 'gpt2'" in refusal(source)
    train_tokenizer().save(str(tmp_path / "tokenizer.json"))
    convert(source, tmp_path / "ours")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": None}, "tokenizer.ggml.tokens must be a list with one str for each of the model's 512 tokens"),
        ({"scores": [0.5, 1.5]}, "tokenizer.ggml.scores must be a list with one float"),
        ({"scores": [1] * VOCAB_SIZE}, "tokenizer.ggml.scores must be a list with one float"),
        ({"token_type": "x"}, "tokenizer.ggml.token_type must be a list with one int"),
        ({"tokens": ["a"] * VOCAB_SIZE}, "has a token twice"),
        ({"tokens": ["", *map(str, range(1, VOCAB_SIZE))]}, "one that is empty or longer than 256 characters ('')"),
        ({"tokens": [*map(str, range(1, VOCAB_SIZE)), "x" * 257], "token_type": [1] * VOCAB_SIZE}, "longer than 256"),
        ({"scores": [*map(float, range(VOCAB_SIZE - 1)), float("inf")]}, "or a score that is not finite"),
        ({"bos_token_id": VOCAB_SIZE}, "tokenizer.ggml.bos_token_id is 512, which is not a token"),
        ({"unknown_token_id": 450}, "tokenizer.ggml.unknown_token_id is 450, which is not a token"),
        ({"bos_token_id": "2"}, "tokenizer.ggml.bos_token_id is '2'"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is 1"),
        ({"add_space_prefix": None}, "tokenizer.ggml.add_space_prefix is True, but Gemma's tokenizer has False"),
        ({"remove_extra_whitespaces": True}, "tokenizer.ggml.remove_extra_whitespaces is True"),
        ({"precompiled_charsmap": [1, 2]}, "tokenizer.ggml.precompiled_charsmap is [1, 2]"),
    ],
)
def test_tokenizers_that_are_refused(tmp_path, sentencepiece_model, fields, words):
    assert words in refusal(write_with_tokenizer(tmp_path / "model.gguf", sentencepiece_model, **fields))


# ------------------------------------------------------------------------------------------- what is refused


def test_other_architectures(tmp_path):
    for name in ("llama", "gemma3n", "clip"):
        writer = GGUFWriter(tmp_path / "model.gguf", name)
        writer.add_tensor("token_embd.weight", np.ones((3, 4), np.float32))
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        message = refusal(tmp_path / "model.gguf")
        assert f"has architecture '{name}'; this engine reads gemma, gemma2, gemma3, gemma-embedding" in message


def test_an_adapter(tmp_path):
    source = write(tmp_path / "model.gguf", make_model("gemma3"), "gemma3", **{"general.type": "adapter"})
    assert "is of type 'adapter'; give the path of a whole model" in refusal(source)


@pytest.mark.parametrize("kind", ["Q4_1", "TQ1_0"])
def test_other_types(tmp_path, kind):
    source = write(tmp_path / "model.gguf", make_model("gemma3", **BLOCKS), "gemma3", (GGMLQuantizationType[kind],))
    message = refusal(source)
    assert f"has tensors of type {kind}; this engine reads F32, F16, BF16, Q8_0" in message
    assert "llama-quantize --allow-requantize" in message


def test_other_tensors(tmp_path):
    others = {f"blk.{layer}.attn_q.bias": np.ones(84, np.float32) for layer in range(30)}
    message = refusal(write(tmp_path / "model.gguf", make_model("gemma3"), "gemma3", others=others))
    assert "unknown: 'blk.0.attn_q.bias' (84,)" in message
    assert "and 20 more" in message
    lost = write(
        tmp_path / "lost.gguf", make_model("gemma3"), "gemma3", rename=lambda name: name.replace("ffn_up", "up")
    )
    assert "missing: blk.0.ffn_up.weight (72, 48)" in refusal(lost)
    headless = write(tmp_path / "headless.gguf", make_model("gemma3"), "gemma3", rename=lambda name: f"x.{name}")
    assert "has no matrix token_embd.weight" in refusal(headless)


def test_big_endian(tmp_path):
    source = write(tmp_path / "model.gguf", make_model("gemma3"), "gemma3", endian=GGUFEndian.BIG)
    assert "is big-endian" in refusal(source)


def test_gguf_is_not_installed(file, monkeypatch):
    for name in [name for name in sys.modules if name == "gguf" or name.startswith("gguf.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'funnel-engine[gguf]'" in refusal(file)


def test_values_that_are_not_finite(tmp_path):
    model = make_model("gemma3")
    with torch.no_grad():
        model.layers[2].mlp.up_proj.weight[3, 4] = torch.inf
    source = write(tmp_path / "model.gguf", model, "gemma3")
    with pytest.raises(CheckpointError, match=r"tensor blk\.2\.ffn_up\.weight in .* contains NaN, infinity"):
        convert(source, tmp_path / "ours")
    convert(source, tmp_path / "ours", allow_nonfinite=True)


def header(fields: bytes = b"", tensors: bytes = b"", *, counts: tuple[int, int] = (0, 0), version: int = 3) -> bytes:
    """The header of a file by hand; `counts` are those of tensors and fields."""
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + fields + tensors


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, *axes: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)


HUGE = 2**63
DAMAGED = {
    "nothing": (b"GGUF", "a value of 4 bytes begins 0 bytes before the end"),
    "version 1": (header(version=1), "has version 1 of GGUF; this engine reads 2 and 3"),
    "version 0": (header(version=0), "has version 0 of GGUF"),
    "many fields": (header(counts=(0, HUGE)), "the limit is 100,000"),
    "many tensors": (header(counts=(HUGE, 0)), "the limit is 100,000"),
    "long text": (header(struct.pack("<Q", HUGE), counts=(0, 1)), f"a value of {HUGE:,} bytes"),
    "long array": (header(text("x") + struct.pack("<IIQ", 9, 5, HUGE), counts=(0, 1)), "bytes begins 0 bytes before"),
    "many texts": (header(text("x") + struct.pack("<IIQ", 9, 8, HUGE), counts=(0, 1)), "bytes begins 0 bytes before"),
    "array of arrays": (header(text("x") + struct.pack("<IIQ", 9, 9, 1), counts=(0, 1)), "a value has type 9"),
    "unknown value": (header(text("x") + struct.pack("<I", 77), counts=(0, 1)), "a value has type 77"),
    "no UTF-8": (header(struct.pack("<QB", 1, 255), counts=(0, 1)), "is not UTF-8"),
    "a key twice": (header((text("x") + struct.pack("<IB", 0, 1)) * 2, counts=(0, 2)), "it has the key 'x' twice"),
    "a tensor twice": (header(entry("x", 1) * 2, counts=(2, 0)), "it has tensor 'x' twice"),
    "no axes": (header(entry("x"), counts=(1, 0)), "or with 0 axes"),
    "many axes": (header(entry("x", *[1] * 5), counts=(1, 0)), "or with 5 axes"),
    "an empty tensor": (header(entry("x", 0, 3), counts=(1, 0)), "tensor 'x' (F32 (0, 3)) would be at bytes"),
    "a huge tensor": (header(entry("x", *[HUGE] * 4), counts=(1, 0)), "tensor 'x' (F32 (92233"),
    "behind the end": (header(entry("x", 2, offset=HUGE), counts=(1, 0)) + bytes(64), "tensor 'x' (F32 (2,))"),
    "no whole block": (header(entry("x", 40, kind=2), counts=(1, 0)) + bytes(99), "tensor 'x' (Q4_0 (40,))"),
    "overlap": (header(entry("x", 9) + entry("y", 9, offset=32), counts=(2, 0)) + bytes(99), "the one before it ends"),
    "unknown type": (header(entry("x", 1, kind=4242), counts=(1, 0)) + bytes(99), "has type 4242"),
    "alignment": (
        header(text("general.alignment") + struct.pack("<II", 4, 3), counts=(0, 1)),
        "general.alignment is 3, which must be a power of two",
    ),
    "alignment of 0": (header(text("general.alignment") + struct.pack("<II", 4, 0), counts=(0, 1)), "is 0, which must"),
    "no architecture": (header(), "has architecture None"),
}


@pytest.mark.parametrize(("content", "words"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_headers(tmp_path, content, words):
    (tmp_path / "model.gguf").write_bytes(content)
    message = refusal(tmp_path / "model.gguf")
    assert words in message
    assert ";" in message or "Fetch" in message  # the remedy


def test_a_header_has_a_limit(file, monkeypatch):
    monkeypatch.setattr(gguf_file, "MAX_HEADER_BYTES", 1000)
    assert "the limit for a header is 1,000" in refusal(file)


def test_a_truncated_file(file):
    data = file.read_bytes()
    for length in (10, 1000, len(data) // 2, len(data) - 64):
        file.write_bytes(data[:length])
        assert "is damaged" in refusal(file)


def test_a_file_that_becomes_shorter(file, tmp_path, monkeypatch):
    original = gguf_file.read_header

    def shorten(path: Path) -> Any:
        header = original(path)
        path.write_bytes(path.read_bytes()[:3000])
        return header

    monkeypatch.setattr("funnel_engine.checkpoints.gguf.read_header", shorten)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        convert(file, tmp_path / "ours")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A file with everything a reader looks at."""
    folder = tmp_path_factory.mktemp("fuzz")
    dense = {"dense_2": torch.ones(8, 48), "dense_3": torch.ones(4, 8)}
    model = make_model("gemma-embedding", vocab_size=VOCAB_SIZE, num_hidden_layers=2)
    fields = tokenizer_fields(train_sentencepiece())
    return write(folder / "model.gguf", model, "gemma-embedding", (F32, BF16), dense=dense, **fields)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(data=st.data())
def test_any_bytes(whole, data):
    """Whatever the bytes are, the file is converted or refused, and inspecting it comes to the same verdict."""
    content = whole.read_bytes()
    at = data.draw(st.integers(0, 22_000) | st.integers(0, 1500))  # the header, and some of the values behind it
    put = data.draw(st.none() | st.binary(min_size=1, max_size=9) | st.sampled_from([bytes([255] * 8), bytes(8)]))
    changed = content[:at] if put is None else content[:at] + put + content[at + len(put) :]
    source = whole.parent / "changed.gguf"
    source.write_bytes(changed)
    facts = inspect_checkpoint(source, "gguf")
    try:
        convert(source, whole.parent / "ours", format="gguf", overwrite=True, allow_nonfinite=True)
    except CheckpointError:
        assert facts["problems"]
        return
    assert facts["problems"] == []


def test_safetensors_come_first(tmp_path):
    """A folder of Hugging Face with GGUF files beside its weights is read as before."""
    model = make_model("gemma2")
    model.save_pretrained(tmp_path / "source")
    write(tmp_path / "source" / "model.gguf", model, "gemma2")
    assert detect_format(tmp_path / "source") == "hugging_face"
    (tmp_path / "source" / "model.safetensors").unlink()
    assert detect_format(tmp_path / "source") == "gguf"
    save_file({"x": torch.ones(1)}, tmp_path / "source" / "other.safetensors")
    assert "but 'model.gguf', 'other.safetensors'" in refusal(tmp_path / "source")


def test_architectures_are_those_of_llama_cpp():
    assert {MODEL_ARCH.GEMMA, MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3, MODEL_ARCH.GEMMA_EMBEDDING} == {
        ARCHITECTURES[name] for name in MODELS
    }
