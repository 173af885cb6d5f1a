"""`funnel_benchmarks.peers.gguf_file`: a model in the names and numbers of llama.cpp."""

import dataclasses

import gguf
import numpy as np
import pytest
from safetensors import numpy as safetensors

from funnel_benchmarks.peers.gguf_file import architecture, metadata, tensor_name, write_gguf
from funnel_benchmarks.random_checkpoint import tensor_shapes, write_random_model
from funnel_engine import preset
from funnel_engine.config import Rope
from funnel_engine.hugging_face_config import read_model_config
from funnel_kernels.errors import ConfigError
from tiny_peers import MODELS

GEMMA = dataclasses.replace(preset("gemma-2b"), attention="bidirectional")
EMBEDDING_GEMMA = preset("embeddinggemma-300m")


def test_metadata_of_gemma():
    assert metadata(GEMMA) == {
        "gemma.vocab_size": 256000,
        "gemma.context_length": 8192,
        "gemma.embedding_length": 2048,
        "gemma.block_count": 18,
        "gemma.feed_forward_length": 16384,
        "gemma.attention.head_count": 8,
        "gemma.attention.head_count_kv": 1,
        "gemma.attention.key_length": 256,
        "gemma.attention.value_length": 256,
        "gemma.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma.attention.causal": False,
        "gemma.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "none",
    }


def test_metadata_of_embeddinggemma():
    fields = metadata(EMBEDDING_GEMMA)
    assert fields["gemma-embedding.attention.sliding_window"] == 512
    assert fields["gemma-embedding.rope.freq_base"] == 1e6
    assert fields["gemma-embedding.rope.freq_base_swa"] == 1e4
    sliding = fields["gemma-embedding.attention.sliding_window_pattern"]
    assert [layer for layer in range(24) if not sliding[layer]] == [5, 11, 17, 23]
    assert {type(value) for value in fields.values()} == {int, float, bool, str, list}  # what GGUF has types for


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (preset("gemma-2b"), "runs no causal gemma as an encoder"),
        (preset("t5gemma-s"), "runs no bidirectional t5gemma as an encoder"),
        (dataclasses.replace(EMBEDDING_GEMMA, layer_types=("sliding",) * 2), "this model has sliding, sliding$"),
        (dataclasses.replace(EMBEDDING_GEMMA, query_scale=0.5), "scores times 0.5$"),
        (dataclasses.replace(EMBEDDING_GEMMA, full_rope=Rope(1e6, 8.0)), "has RoPE factors 8 and 1"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        architecture(config)


def test_names_of_tensors():
    names = {name: tensor_name(name, EMBEDDING_GEMMA) for name in tensor_shapes(EMBEDDING_GEMMA)}
    assert len(set(names.values())) == len(names) == 24 * 13 + 2
    assert names["embed_tokens.weight"] == "token_embd.weight"
    assert names["norm.weight"] == "output_norm.weight"
    assert {name: names[f"layers.7.{name}.weight"] for name in ("self_attn.o_proj", "post_attention_layernorm")} == {
        "self_attn.o_proj": "blk.7.attn_output.weight",
        "post_attention_layernorm": "blk.7.post_attention_norm.weight",
    }
    assert tensor_name("layers.0.post_attention_layernorm.weight", GEMMA) == "blk.0.ffn_norm.weight"
    assert names["layers.0.pre_feedforward_layernorm.weight"] == "blk.0.ffn_norm.weight"


class Writer:
    """Keeps what `gguf.GGUFWriter` is given."""

    def __init__(self, path, architecture):
        self.path, self.architecture, self.fields, self.tensors, self.steps = path, architecture, {}, {}, []
        Writer.last = self

    def add_tensor(self, name, values, raw_dtype=None):
        self.tensors[name] = np.array(values), raw_dtype

    def __getattr__(self, name):
        if name.startswith("add_"):
            return lambda key, value: self.fields.update({key: (name.removeprefix("add_"), value)})
        return lambda: self.steps.append(name)


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float32", "F32"), ("int8", "Q8_0")])
def test_a_file_has_the_weights_and_norms_plus_one(tmp_path, monkeypatch, dtype, kind):
    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    layers = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    fields = MODELS["embeddinggemma"] | layers
    write_random_model(tmp_path / "source", fields)
    write_gguf(tmp_path / "source", tmp_path / "model.gguf", dtype)
    file, config = Writer.last, read_model_config(fields)
    assert (file.path, file.architecture) == (tmp_path / "model.gguf", "gemma-embedding")
    assert {key: value for key, (_, value) in file.fields.items()} == metadata(config)
    kinds = {key.partition(".")[2]: kind for key, (kind, _) in file.fields.items()}
    assert (kinds["attention.causal"], kinds["block_count"], kinds["rope.freq_base"]) == ("bool", "uint32", "float32")
    assert (kinds["attention.sliding_window_pattern"], kinds["ggml.model"]) == ("array", "string")
    weights = safetensors.load_file(tmp_path / "source" / "model.safetensors")
    assert len(file.tensors) == len(weights)
    for name, weight in weights.items():
        values, stored = file.tensors[tensor_name(name, config)]
        if weight.ndim == 2:
            assert stored == gguf.GGMLQuantizationType[kind]
            read = gguf.quants.dequantize(values, stored)
            largest = np.abs(weight.astype(np.float32)).reshape(len(weight), -1, 32).max(2).repeat(32, axis=1)
            step = largest / 127 if dtype == "int8" else 0  # the other two have the weights as they are
            assert np.all(np.abs(read - weight.astype(np.float32)) <= 0.6 * step)  # half a step, and a scale in float16
        else:
            assert (values.dtype, stored) == (np.float32, None)
            np.testing.assert_array_equal(values, weight.astype(np.float32) + 1)
    assert file.steps == ["write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"]
