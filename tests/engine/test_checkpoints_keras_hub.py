"""KerasHub's presets and `.weights.h5` files become the weights that the same model has through Hugging Face.

The files are written here with h5py in the structure that KerasHub 0.32 with Keras 3.15 writes, down to the empty
groups, from PyTorch's parameters reshaped by a table of their own.
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from sentencepiece import SentencePieceProcessor

import hugging_face_models as models
from funnel_engine import CheckpointError, Engine, HeadConfig, convert
from funnel_engine.checkpoints.formats import detect_format, read_source
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.config import Rope
from funnel_engine.presets import PRESETS
from funnel_engine.text import TextConfig
from sentence_models import train_sentencepiece

Arrays = dict[str, np.ndarray]
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 14
WIDTH, MIDDLE, LAST = 48, 60, 40  # EmbeddingGemma's mean, and its two dense layers
LAYERS = 7
ONE_LAYER = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
NORM = "layers/rms_normalization/vars"
FLOAT_OF_OTHER_BIAS = h5py.h5t.IEEE_F32LE.copy()
FLOAT_OF_OTHER_BIAS.set_ebias(100)
SIX_TO_ONE = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
FAMILIES = {
    "gemma": ("GemmaModel", models.gemma(num_hidden_layers=LAYERS)),
    "gemma2": ("Gemma2Model", models.gemma2(num_hidden_layers=LAYERS, query_pre_attn_scalar=8)),  # 48 // 6 heads
    "gemma3": ("Gemma3TextModel", models.gemma3(num_hidden_layers=LAYERS, layer_types=SIX_TO_ONE)),
    "embeddinggemma": (
        "Gemma3TextModel",
        models.gemma3(num_hidden_layers=LAYERS, layer_types=SIX_TO_ONE, use_bidirectional_attention=True),
    ),
}
for _, config in FAMILIES.values():
    if config.model_type == "gemma3_text":
        config.query_pre_attn_scalar = HEAD_DIM
        config.max_position_embeddings = 2048 if config.use_bidirectional_attention else 131072
    else:
        config.max_position_embeddings = 8192  # KerasHub does not say; these are the class defaults


def make_model(family: str, **fields: Any) -> Any:
    class_name, config = FAMILIES[family]
    return models.build(getattr(transformers, class_name), type(config)(**config.to_dict() | fields))


def arrays_of(family: str, model: Any) -> Arrays:
    """Every dataset of the backbone's file."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    block = "gemma3_decoder_block" if "gemma3" in model.config.model_type else "gemma_decoder_block"
    arrays = {
        "layers/reversible_embedding/vars/0": state["embed_tokens.weight"],
        "layers/rms_normalization/vars/0": state["norm.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        home = f"layers/{block}_{layer}" if layer else f"layers/{block}"

        def put(name: str, theirs: str, *axes: int, shape: tuple[int, ...] = (), layer: int = layer, home: str = home):
            weight = state[f"layers.{layer}.{theirs}.weight"]
            weight = weight.reshape(shape) if shape else weight
            arrays[f"{home}/{name}/vars/0"] = weight.transpose(axes) if axes else weight

        put("attention/query_dense", "self_attn.q_proj", 0, 2, 1, shape=(HEADS, HEAD_DIM, WIDTH))
        put("attention/key_dense", "self_attn.k_proj", 0, 2, 1, shape=(KV_HEADS, HEAD_DIM, WIDTH))
        put("attention/value_dense", "self_attn.v_proj", 0, 2, 1, shape=(KV_HEADS, HEAD_DIM, WIDTH))
        put("attention/output_dense", "self_attn.o_proj", 1, 2, 0, shape=(WIDTH, HEADS, HEAD_DIM))
        put("gating_ffw", "mlp.gate_proj", 1, 0)
        put("gating_ffw_2", "mlp.up_proj", 1, 0)
        put("ffw_linear", "mlp.down_proj", 1, 0)
        put("pre_attention_norm", "input_layernorm")
        if family == "gemma":
            put("pre_ffw_norm", "post_attention_layernorm")
            continue
        put("post_attention_norm", "post_attention_layernorm")
        put("pre_ffw_norm", "pre_feedforward_layernorm")
        put("post_ffw_norm", "post_feedforward_layernorm")
        if family != "gemma2":
            put("attention/query_norm", "self_attn.q_norm")
            put("attention/key_norm", "self_attn.k_norm")
    if family == "embeddinggemma":
        generator = np.random.default_rng(5)
        arrays["layers/dense/vars/0"] = generator.normal(0, 0.15, (WIDTH, MIDDLE)).astype(np.float32)
        arrays["layers/dense_1/vars/0"] = generator.normal(0, 0.15, (MIDDLE, LAST)).astype(np.float32)
    return arrays


def config_of(family: str, model: Any, **options: Any) -> dict[str, Any]:
    """KerasHub's config.json."""
    config = model.config
    post_norms = family != "gemma"
    common = {
        "name": "backbone",
        "trainable": True,
        "dtype": {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}},
        "vocabulary_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_query_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_dim": WIDTH,
        "intermediate_dim": config.intermediate_size,
        "head_dim": HEAD_DIM,
        "layer_norm_epsilon": 1e-06,
        "dropout": 0,
        "query_head_dim_normalize": family != "gemma2",
        "use_post_ffw_norm": post_norms,
        "use_post_attention_norm": post_norms,
        "final_logit_soft_cap": None,
        "attention_logit_soft_cap": None,
        "sliding_window_size": 4096,
        "use_sliding_window_attention": post_norms,
    }
    if family in ("gemma", "gemma2"):
        common["intermediate_dim"] *= 2
        if family == "gemma2":
            caps = {"attention_logit_soft_cap": config.attn_logit_softcapping, "final_logit_soft_cap": 30.0}
            common |= caps | {"sliding_window_size": config.sliding_window}
        return {"class_name": "GemmaBackbone", "config": common | options}
    embedding = family == "embeddinggemma"
    # Keras saves what the model was given: the window of EmbeddingGemma's config is not halved.
    common |= {
        "image_size": None,
        "use_query_key_norm": True,
        "sliding_window_size": 8,
        "local_rope_scaling_factor": 1.0,
        "global_rope_scaling_factor": 1.0,
        "vision_encoder": None,
        "use_bidirectional_attention": embedding,
        "is_embedding_model": embedding,
        "pooling_intermediate_dim": MIDDLE if embedding else None,
        "embedding_dim": LAST if embedding else None,
    }
    return {"class_name": "Gemma3Backbone", "config": common | options}


def write(file: Path, arrays: Arrays, prefix: str = "", **options: Any) -> Path:
    """Writes datasets as Keras does; `options` are those of `create_dataset`."""
    with h5py.File(file, "w") as root:
        root.create_group(f"{prefix}vars").attrs["name"] = "backbone"
        root.create_group(f"{prefix}layers/input_layer/vars").attrs["name"] = "token_ids"
        for name, array in arrays.items():
            dataset = root.create_dataset(prefix + name, data=array, **options if array.ndim else {})
            dataset.parent.attrs["name"] = "query"
            if array.dtype == ml_dtypes.bfloat16:
                dataset.attrs["dtype"] = "bfloat16"
            if name.endswith("query_dense/vars/0"):
                for leaf in ("dropout_layer", "rope_layer", "softmax"):
                    root.create_group(f"{dataset.parent.parent.parent.name}/{leaf}/vars").attrs["name"] = leaf
    return file


def save(folder: Path, arrays: Arrays, config: dict[str, Any] | None = None, **options: Any) -> Path:
    """A preset's folder."""
    folder.mkdir(exist_ok=True)
    write(folder / "model.weights.h5", arrays, **options)
    (folder / "metadata.json").write_text('{"keras_version": "3.15.1", "keras_hub_version": "0.32.0"}')
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def preset_of(folder: Path, family: str, **options: Any) -> Path:
    model = make_model(family)
    return save(folder, arrays_of(family, model), config_of(family, model, **options))


def check_as_hugging_face(model: Any, source: Path, folder: Path, dtype: str = "float32") -> Any:
    """The encoder's config and weights are those of the model through Hugging Face; returns what was converted."""
    model.save_pretrained(folder / "hugging_face")
    convert(folder / "hugging_face", folder / "reference", dtype=dtype)
    convert(source, folder / "ours", dtype=dtype)
    expected, found = read_checkpoint(folder / "reference"), read_checkpoint(folder / "ours")
    assert found.manifest.source.format == "keras"
    assert found.config == expected.config
    assert {name for name in found.weights if not name.startswith("dense.")} == expected.weights.keys()
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight, strict=True, err_msg=name)
    return found


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        convert(source, source.parent / "refused", **options)
    assert not (source.parent / "refused").exists()
    return str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family, dtype):
    model = make_model(family).to(getattr(torch, dtype))
    arrays = arrays_of(family, model.float())
    if dtype == "bfloat16":
        arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
        model = model.bfloat16()
    source = save(tmp_path / "source", arrays, config_of(family, model))
    assert detect_format(source) == "keras"
    found = check_as_hugging_face(model, source, tmp_path, dtype)
    assert found.manifest.source.dropped == {}
    if family != "embeddinggemma":
        assert found.head == HeadConfig()
        return
    assert (found.head.pooling, found.head.similarity) == ("mean", "cosine")
    assert [(layer.in_features, layer.out_features) for layer in found.head.dense] == [(WIDTH, MIDDLE), (MIDDLE, LAST)]
    for index, name in enumerate(("dense", "dense_1")):
        kernel = arrays[f"layers/{name}/vars/0"]
        np.testing.assert_array_equal(found.weights[f"dense.{index}.weight"], kernel.T, strict=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_transformers(tmp_path, family):
    model = make_model(family)
    arrays = arrays_of(family, model)
    convert(save(tmp_path / "source", arrays, config_of(family, model)), tmp_path / "ours", dtype="float32")
    sequences = models.random_ids(1, 3, 30)
    ids, mask = models.pad(sequences)
    with torch.no_grad():
        rows = model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
    truth = [row[: len(sequence)] for row, sequence in zip(rows, sequences, strict=True)]
    engine = Engine.load(tmp_path / "ours")
    assert models.worst(engine.hidden_states(sequences), truth) < 2e-5
    if family == "embeddinggemma":
        means = np.stack([row.mean(0, dtype=np.float64) for row in truth])
        vectors = means @ arrays["layers/dense/vars/0"] @ arrays["layers/dense_1/vars/0"]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        assert np.abs(engine.embed(sequences) - vectors).max() < 1e-5


def test_a_file_of_weights_is_read_with_the_config_beside_it(tmp_path):
    model = make_model("gemma2")
    source = save(tmp_path / "source", {}, config_of("gemma2", model))
    (source / "model.weights.h5").unlink()
    file = write(source / "mine.weights.h5", arrays_of("gemma2", model))
    assert detect_format(file) == "keras"
    check_as_hugging_face(model, file, tmp_path)


def test_a_file_of_a_task_has_the_backbone_further_down(tmp_path):
    model = make_model("gemma3")
    source = save(tmp_path / "source", arrays_of("gemma3", model), config_of("gemma3", model))
    write(source / "model.weights.h5", arrays_of("gemma3", model), prefix="layers/gemma3_backbone/")
    check_as_hugging_face(model, source, tmp_path)


def test_multimodal_gemma_3_is_read_without_its_eyes(tmp_path):
    model = make_model("gemma3")
    eyes = {
        "layers/gemma3_vision_encoder/layers/gemma3_vision_output/vision_input_projection/vars/0": np.ones((8, 48)),
        "layers/gemma3_vision_encoder/layers/gemma3_vision_output/vision_soft_embedding_norm/vars/0": np.ones(8),
    }
    vision = {"class_name": "Gemma3VisionEncoder", "config": {"hidden_dim": 8}}
    config = config_of("gemma3", model, vision_encoder=vision, image_size=16)
    found = check_as_hugging_face(model, save(tmp_path / "source", arrays_of("gemma3", model) | eyes, config), tmp_path)
    assert found.manifest.source.dropped == {"layers/gemma3_vision_encoder/": 2}


def test_shards_with_an_index(tmp_path):
    model = make_model("gemma3")
    source = write_shards(tmp_path / "source", model)
    assert detect_format(source) == "keras"
    found = check_as_hugging_face(model, source, tmp_path)
    assert set(found.manifest.source.files) == {"model_00000.weights.h5", "model_00001.weights.h5"}


def write_shards(folder: Path, model: Any) -> Path:
    eyes = {f"layers/gemma3_vision_encoder/vars/{number}": np.ones(8) for number in range(2)}  # one in each shard
    arrays = arrays_of("gemma3", model) | eyes
    save(folder, {}, config_of("gemma3", model))
    (folder / "model.weights.h5").unlink()
    weight_map: dict[str, Any] = {}
    for number in range(2):
        name = f"model_0000{number}.weights.h5"
        part = dict(list(arrays.items())[number::2])
        write(folder / name, part)
        for path in part:
            weight_map.setdefault(f"/{path[:-2]}", []).append(name)
    weight_map["/layers/rms_normalization/vars"] = weight_map["/layers/rms_normalization/vars"][0]  # as older Keras
    (folder / "model.weights.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunks": True}, "h5repack --layout=CONTI --filter=NONE"),
        ({"chunks": True, "compression": "gzip"}, "h5repack --layout=CONTI --filter=NONE"),
        ({"dtype": ">f4"}, "is 'HDF5 >f4', not float32"),
        ({"dtype": "f8"}, "is 'HDF5 <f8', not float32"),
        ({"dtype": FLOAT_OF_OTHER_BIAS}, "is 'HDF5 <f8', not float32"),  # h5py widens it
    ],
)
def test_storage_that_keras_does_not_write(tmp_path, options, words):
    model = make_model("gemma2")
    arrays, config = arrays_of("gemma2", model), config_of("gemma2", model)
    assert words in refusal(save(tmp_path / "source", arrays, config, **options))


def test_a_dataset_without_a_place(tmp_path):
    source = preset_of(tmp_path / "source", "gemma")
    with h5py.File(source / "model.weights.h5", "r+") as root:
        del root[f"{NORM}/0"]
        root.create_dataset(f"{NORM}/0", (48,), np.float32)  # HDF5 would read its fill value
    assert "h5repack" in refusal(source)
    with h5py.File(source / "model.weights.h5", "r+") as root:
        del root[f"{NORM}/0"]
        root.create_dataset(f"{NORM}/0", data=np.ones(48, np.float32), chunks=(48,))  # as large as if it were whole
    assert "h5repack" in refusal(source)


def test_float16_is_read(tmp_path):
    model = make_model("gemma2").half().float()
    arrays = {name: array.astype(np.float16) for name, array in arrays_of("gemma2", model).items()}
    check_as_hugging_face(model, save(tmp_path / "source", arrays, config_of("gemma2", model)), tmp_path)


def test_the_window_can_be_overridden(tmp_path):
    source = preset_of(tmp_path / "source", "embeddinggemma", sliding_window_size=5)
    assert "sliding_window=5 is odd in a bidirectional Gemma 3" in refusal(source)
    assert read_source(source, None, 8).config.bidirectional_window == (4, 4)


def test_options_of_the_config(tmp_path):
    def config(family: str, **options: Any) -> Any:
        return read_source(preset_of(tmp_path / "source", family, **options)).config

    assert config("gemma2").query_scale == pytest.approx(8**-0.5)
    assert config("gemma2", query_head_dim_normalize=True).query_scale == pytest.approx(14**-0.5)
    assert config("gemma2", attention_logit_soft_cap=50).softcap == 50
    assert config("gemma2", attention_logit_soft_cap=None).softcap is None
    assert config("gemma2").layer_types == ("sliding", "full") * 3 + ("sliding",)
    assert config("gemma2", use_sliding_window_attention=False).layer_types == ("full",) * LAYERS
    assert config("gemma3", use_sliding_window_attention=False).layer_types == ("full",) * LAYERS
    assert config("gemma3", query_head_dim_normalize=False).query_scale == pytest.approx(8**-0.5)
    scaled = config("gemma3", global_rope_scaling_factor=8.0, local_rope_scaling_factor=2)
    assert (scaled.full_rope, scaled.sliding_rope) == (Rope(1_000_000.0, 8.0), Rope(10_000.0, 2.0))


@pytest.mark.parametrize("family", ["gemma2", "embeddinggemma"])
def test_without_keras_hubs_config(tmp_path, monkeypatch, family):
    """Hugging Face's config.json serves as well, and without any the shapes say which published model it is."""
    model = make_model(family)
    fields = model.config.to_dict() | {"model_type": model.config.model_type, "sliding_window": 8}
    arrays = arrays_of(family, model)
    source = save(tmp_path / "source", arrays)
    assert "no published model has" in refusal(source)
    monkeypatch.setitem(PRESETS, "tiny", fields)
    by_shape = read_source(source)
    (source / "config.json").write_text(json.dumps(fields))
    by_config = read_source(source)
    (source / "config.json").write_text(json.dumps(config_of(family, model, sliding_window_size=8)))
    keras = read_source(source)
    for found in (by_shape, by_config):
        assert (found.config.layer_types, found.config.attention) == (keras.config.layer_types, keras.config.attention)
        assert found.head.dense == keras.head.dense
        assert found.weights.keys() == keras.weights.keys()


def test_tokenizer_in_the_assets(tmp_path):
    """A preset's tokenizer.json is Keras's description of the tokenizer, not a tokenizer."""
    source = preset_of(tmp_path / "source", "gemma3")
    (source / "tokenizer.json").write_text('{"class_name": "Gemma3Tokenizer"}')
    assert read_source(source).tokenizer_file is None
    (source / "assets" / "tokenizer").mkdir(parents=True)
    (source / "assets" / "tokenizer" / "vocabulary.spm").write_bytes(train_sentencepiece())
    found = read_source(source)
    assert found.tokenizer_file == source / "assets" / "tokenizer" / "vocabulary.spm"
    assert found.text == TextConfig(begin=2, end=None)
    convert(source, tmp_path / "ours", dtype="float32")
    assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == found.tokenizer_file.read_bytes()
    engine = Engine.load(tmp_path / "ours", max_batch_tokens=64)
    ids = SentencePieceProcessor(model_file=str(found.tokenizer_file)).encode("\x01\x02", add_bos=True)
    np.testing.assert_array_equal(engine.embed("\x01\x02"), engine.embed([ids]))  # bytes, whose ids are small
    assert read_source(preset_of(source, "embeddinggemma")).text == TextConfig(begin=2, end=1)
    shutil.move(source / "assets", tmp_path / "elsewhere")
    (source / "assets").symlink_to(tmp_path / "elsewhere")
    assert "is a link to" in refusal(source)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_query_key_norm": False}, "use_query_key_norm is False; for gemma3_text it must be True"),
        ({"use_post_ffw_norm": False}, "use_post_ffw_norm is False; for gemma3_text it must be True"),
        ({"use_post_attention_norm": False}, "use_post_attention_norm is False; for gemma3_text it must be True"),
        ({"attention_logit_soft_cap": 50.0}, "attention_logit_soft_cap is 50.0; for gemma3_text it must be None"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05"),
        ({"num_layers": "7"}, "num_layers is '7'"),
        ({"num_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"num_layers": 8}, "missing: layers/gemma3_decoder_block_7/attention/query_dense/vars/0 (6, 48, 14)"),
        ({"num_layers": 6}, "unknown: 'layers/gemma3_decoder_block_6/attention/query_dense/vars/0'"),
        ({"num_query_heads": 0}, "num_attention_heads=0"),
        ({"num_query_heads": 5}, "num_heads=5 must be a multiple of num_kv_heads=2"),
        ({"num_query_heads": 4}, "query_dense/vars/0 is (6, 48, 14), but the config says (4, 48, 14)"),
        ({"vocabulary_size": 102}, "layers/reversible_embedding/vars/0 is (101, 48), but the config says (102, 48)"),
        ({"is_embedding_model": True, "pooling_intermediate_dim": 60}, "embedding_dim is None"),
        (
            {"is_embedding_model": True, "pooling_intermediate_dim": 60, "embedding_dim": 40},
            "missing: layers/dense_1/vars/0 (60, 40)",
        ),
    ],
)
def test_options_that_are_refused(tmp_path, options, words):
    assert words in refusal(preset_of(tmp_path / "source", "gemma3", **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_post_ffw_norm": True}, "use_post_ffw_norm is True; for gemma it must be False"),
        ({"use_sliding_window_attention": True}, "use_sliding_window_attention is True; for gemma it must be False"),
        ({"attention_logit_soft_cap": 50.0}, "attention_logit_soft_cap is 50.0; for gemma it must be None"),
    ],
)
def test_options_that_gemma_1_does_not_have(tmp_path, options, words):
    assert words in refusal(preset_of(tmp_path / "source", "gemma", **options))


@pytest.mark.parametrize("class_name", ["PaliGemmaBackbone", 7])
def test_another_class_is_refused(tmp_path, class_name):
    model = make_model("gemma")
    config = config_of("gemma", model) | {"class_name": class_name}
    message = refusal(save(tmp_path / "source", arrays_of("gemma", model), config))
    assert f"is of a {class_name!r}; this engine reads GemmaBackbone and Gemma3Backbone" in message


@pytest.mark.parametrize("lost", [("dense",), ("dense_1",), ("dense", "dense_1")])
def test_a_missing_dense_layer_of_embeddinggemma_is_an_error(tmp_path, lost):
    model = make_model("embeddinggemma")
    arrays = arrays_of("embeddinggemma", model)
    for name in lost:
        del arrays[f"layers/{name}/vars/0"]
    source = save(tmp_path / "source", arrays, config_of("embeddinggemma", model))
    assert f"missing: layers/{lost[0]}/vars/0" in refusal(source)
    fields = model.config.to_dict() | {"sliding_window": 8}
    (source / "config.json").write_text(json.dumps(fields))
    assert "must have EmbeddingGemma's matrices" in refusal(source)


def test_quantized_and_lora_variables_are_refused(tmp_path):
    model = make_model("gemma2")
    query = "layers/gemma_decoder_block/attention/query_dense/vars"
    whole, config = arrays_of("gemma2", model), config_of("gemma2", model)
    quantized = whole | {f"{query}/0": np.ones((6, 48, 14), np.int8), f"{query}/1": np.ones((1, 1, 6, 14), np.float32)}
    message = refusal(save(tmp_path / "source", quantized, config))
    assert f"{query}/0 is 'HDF5 |i1'" in message
    assert f"unknown: '{query}/1'" in message
    lora = whole | {f"{query}/lora_kernel_a": np.ones((6, 48, 4), np.float32)}
    assert f"unknown: '{query}/lora_kernel_a'" in refusal(save(tmp_path / "source", lora, config))
    opaque = whole | {f"{query}/0": np.ones((6, 48, 14), "V2")}  # as bfloat16, without the word for it
    assert f"{query}/0 is 'HDF5 |V2'" in refusal(save(tmp_path / "source", opaque, config))
    scalar = whole | {f"{query}/0": np.float32(1)}
    assert f"{query}/0 is ()" in refusal(save(tmp_path / "source", scalar, config))


def test_a_file_without_a_gemma(tmp_path):
    write(tmp_path / "other.weights.h5", {"layers/dense/vars/0": np.ones((3, 4))})
    assert "is not a KerasHub Gemma" in refusal(tmp_path / "other.weights.h5")
    for table in (np.ones(3), np.ones((0, 48))):
        write(tmp_path / "table.weights.h5", {"layers/reversible_embedding/vars/0": table})
        assert "it must be a matrix" in refusal(tmp_path / "table.weights.h5")
    assert "neither model.weights.h5 nor model.weights.json" in refusal(tmp_path, format="keras")
    assert "does not exist" in refusal(tmp_path / "none.weights.h5", format="keras")
    os.mkfifo(tmp_path / "pipe.weights.h5")  # whoever opens it waits for the one who writes
    assert "is not a regular file; fetch it again" in refusal(tmp_path / "pipe.weights.h5")
    write(tmp_path / "screen.weights.h5", {"\x1b[2J": np.ones(3)})
    assert r"tensors are '\x1b[2J'" in refusal(tmp_path / "screen.weights.h5")
    (tmp_path / "text.weights.h5").write_text("no HDF5")
    assert "damaged, or not an HDF5 file" in refusal(tmp_path / "text.weights.h5")


def test_h5py_is_not_installed(tmp_path, monkeypatch):
    source = preset_of(tmp_path / "source", "gemma")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "pip install 'funnel-engine[keras]'" in refusal(source)


def external_link(root: h5py.File, secret: Path) -> None:
    del root[f"{NORM}/0"]
    root[f"{NORM}/0"] = h5py.ExternalLink(str(secret), "/x")


def external_group(root: h5py.File, secret: Path) -> None:
    root["more"] = h5py.ExternalLink(str(secret), "/")


def soft_link(root: h5py.File, secret: Path) -> None:
    del root[f"{NORM}/0"]
    root[f"{NORM}/0"] = h5py.SoftLink("/layers/gemma_decoder_block/pre_ffw_norm/vars/0")


def external_storage(root: h5py.File, secret: Path) -> None:
    del root[f"{NORM}/0"]
    root.create_dataset(f"{NORM}/0", (48,), np.float32, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


def virtual_dataset(root: h5py.File, secret: Path) -> None:
    del root[f"{NORM}/0"]
    layout = h5py.VirtualLayout((48,), np.float32)
    layout[:] = h5py.VirtualSource(str(secret), "x", (48,))
    root.create_virtual_dataset(f"{NORM}/0", layout)


def cycle(root: h5py.File, secret: Path) -> None:
    root["layers/again"] = root["layers"]


def second_name(root: h5py.File, secret: Path) -> None:
    del root[f"{NORM}/0"]
    root[f"{NORM}/0"] = root["layers/gemma_decoder_block/pre_ffw_norm/vars/0"]


def named_type(root: h5py.File, secret: Path) -> None:
    root["type"] = np.dtype(np.float32)


@pytest.mark.parametrize(
    ("trick", "words"),
    [
        (external_link, "is a link to another object or file"),
        (external_group, "is a link to another object or file"),
        (soft_link, "is a link to another object or file"),
        (external_storage, "has its values in other files"),
        (virtual_dataset, "has its values in other files"),
        (cycle, "is in the file twice"),
        (second_name, "is in the file twice"),
        (named_type, "is neither a group nor a dataset"),
    ],
)
def test_tricks_of_hdf5_are_refused(tmp_path, trick, words):
    source = preset_of(tmp_path / "source", "gemma")
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as root:
        root["x"] = np.arange(48, dtype=np.float32)
    with h5py.File(source / "model.weights.h5", "r+") as root:
        trick(root, secret)
    assert words in refusal(source)


def test_shards_that_do_not_fit_together(tmp_path):
    source = write_shards(tmp_path / "source", make_model("gemma3"))
    index = source / "model.weights.json"
    whole = json.loads(index.read_text())["weight_map"]
    gate = "/layers/gemma3_decoder_block/gating_ffw/vars"
    for weight_map, words in [
        ({"/vars": "../secret.weights.h5"}, "'../secret.weights.h5', which is not the name of a file in"),
        ({"/vars": ["model_00000.weights.h5", 7]}, "names 7, which is not the name of a file in"),
        ({"/vars": {}}, "names {}, which is not the name of a file in"),
        ({"/vars": "model_00002.weights.h5"}, "lists 'model_00002.weights.h5', which are not in the same folder"),
        ({"/vars": "model_00000.weights.h5"}, "does not match the files"),
        (
            whole | {"/more/vars": "model_00000.weights.h5"},
            "does not match the files: '/more/vars in model_00000.weights.h5'",
        ),
        (whole | {gate: "model_00001.weights.h5"}, f"does not match the files: '{gate} in model_00000.weights.h5'"),
        ([], "weight_map is []"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert words in refusal(source)
    shutil.copy(source / "model_00000.weights.h5", source / "model_00001.weights.h5")
    index.write_text('{"weight_map": {"/a": ["model_00000.weights.h5", "model_00001.weights.h5"]}}')
    assert "which another file contains too" in refusal(source)


def test_not_a_number_is_named(tmp_path):
    model = make_model("gemma")
    arrays = arrays_of("gemma", model)
    name = "layers/gemma_decoder_block_2/ffw_linear/vars/0"
    arrays[name] = arrays[name].copy()
    arrays[name][40, 7] = np.nan
    assert name in refusal(save(tmp_path / "source", arrays, config_of("gemma", model)))


def test_whatever_the_bytes_are_the_outcome_is_a_conversion_or_a_refusal(tmp_path):
    model = make_model("embeddinggemma", **ONE_LAYER)
    source = save(tmp_path / "source", arrays_of("embeddinggemma", model), config_of("embeddinggemma", model))
    whole = (source / "model.weights.h5").read_bytes()
    generator = random.Random(0)
    structure = [index for index, byte in enumerate(whole) if index < 4096 or whole[index - 8 : index].isascii()]
    outcomes = {"converted": 0, "refused": 0}
    for round_number in range(100):
        damaged = bytearray(whole)
        for _ in range(generator.choice([1, 1, 2, 8])):
            place = generator.choice(structure) if round_number % 2 else generator.randrange(len(whole))
            damaged[place] = generator.choice([0, 1, 0x7F, 0xFF, generator.randrange(256)])
        if round_number % 10 == 0:
            del damaged[generator.randrange(len(whole)) :]
        (source / "model.weights.h5").write_bytes(damaged)
        outcomes[attempt(source, tmp_path / "ours")] += 1
    assert min(outcomes.values()) > 10, outcomes


def test_whatever_the_tree_is_the_outcome_is_a_conversion_or_a_refusal(tmp_path):
    model = make_model("embeddinggemma", **ONE_LAYER)
    whole, config = arrays_of("embeddinggemma", model), config_of("embeddinggemma", model)
    outcomes = {"converted": 0, "refused": 0}
    for arrays, options in mutations(whole, list(config["config"]), random.Random(1)):
        changed = config | {"config": config["config"] | options}
        outcomes[attempt(save(tmp_path / "source", arrays, changed), tmp_path / "ours")] += 1
    assert min(outcomes.values()) > 5, outcomes


def mutations(whole: Arrays, options: list[str], generator: random.Random) -> Iterator[tuple[Arrays, dict[str, Any]]]:
    """One dataset or one option becomes something else."""
    changes = [
        lambda array: array.astype(np.float16),
        lambda array: array.astype(np.int8),
        lambda array: array.astype(">f4"),
        lambda array: array.astype(ml_dtypes.bfloat16),
        lambda array: array.astype("S3"),
        lambda array: array.T,
        lambda array: array[..., :0],
        lambda array: array.sum(),
        lambda array: array[None],
        lambda array: array * np.inf,
    ]
    values = [None, True, 0, -1, 1, 2, 3.5, 1e400, 10**30, "8", [], {}, 14, 48]
    for _ in range(60):
        name = generator.choice(list(whole))
        yield whole | {name: np.asarray(generator.choice(changes)(whole[name]))}, {}
        yield whole, {generator.choice(options): generator.choice(values)}


def attempt(source: Path, destination: Path) -> str:
    try:
        convert(source, destination, dtype="float32", overwrite=True)
    except CheckpointError:
        return "refused"
    return "converted"
