"""The weights of `random_checkpoint.py` as a GGUF file for llama.cpp (docs/gguf.md of github.com/ggml-org/ggml).

llama.cpp has two bidirectional Gemmas: "gemma", once its file says that attention is not causal, and "gemma-embedding",
which is Gemma 3 with windows to both sides (EmbeddingGemma). Its "gemma2" and "gemma3" have windows to the left only.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from funnel_engine import ModelConfig
from funnel_engine.checkpoints.safetensors_file import read_header
from funnel_engine.hugging_face_config import read_model_config
from funnel_kernels.errors import ConfigError

ARCHITECTURES = {"gemma": "gemma", "gemma3_text": "gemma-embedding"}  # by `ModelConfig.family`
# Hugging Face's parts of a layer -> llama.cpp's. What follows attention is normalised before or after it is added.
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {
    False: {"post_attention_layernorm": "ffn_norm"},
    True: {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}


TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}  # of matrices; int8 has a scale for every 32 weights


def write_gguf(checkpoint: Path, path: Path, dtype: str) -> None:
    """Writes a checkpoint of `write_random_model` to `path`: matrices in a dtype, norms in float32.

    Raises:
        ConfigError: no model that llama.cpp computes in the same way.
        ModuleNotFoundError: the package gguf is not installed.
    """
    gguf: Any = importlib.import_module("gguf")
    config = read_model_config(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    writer = gguf.GGUFWriter(path, architecture(config))
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata(config).items():
        add.get(type(value), writer.add_array)(key, value)
    tensors = read_header(checkpoint / "model.safetensors")
    for name, stored in tensors.items():
        if len(stored.shape) == 1:
            writer.add_tensor(tensor_name(name, config), norm(stored.read((), 0, stored.shape[0])))
        else:
            kind = gguf.GGMLQuantizationType[TYPES[dtype]]
            values = gguf.quants.quantize(stored.read((), 0, stored.shape[0]).astype(np.float32), kind)
            writer.add_tensor(tensor_name(name, config), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of a bidirectional model.

    Raises:
        ConfigError: llama.cpp has no such model, or would compute something else.
    """
    name = ARCHITECTURES.get(config.family)
    if name is None or config.attention != "bidirectional":
        raise ConfigError(
            f"llama.cpp runs no {config.attention} {config.family} as an encoder; it has the bidirectional models of "
            f"{' and '.join(ARCHITECTURES)}"
        )
    scaled = config.full_rope.factor != 1 or config.sliding_rope.factor != 1
    if scaled or not np.isclose(config.query_scale, config.head_dim**-0.5):
        raise ConfigError(
            f"llama.cpp's {name} has no scaled RoPE, and scores times head_dim ** -0.5 = {config.head_dim**-0.5:.4g}; "
            f"this model has RoPE factors {config.full_rope.factor:g} and {config.sliding_rope.factor:g}, and scores "
            f"times {config.query_scale:.4g}"
        )
    if name == "gemma-embedding" and set(config.layer_types) != {"full", "sliding"}:
        raise ConfigError(
            f"llama.cpp's {name} has full and sliding layers, and aborts if one kind is missing; this model has "
            f"{', '.join(config.layer_types)}"
        )
    return name


def metadata(config: ModelConfig) -> dict[str, Any]:
    """What a file says of its model, without the architecture's name; there is no tokenizer in it."""
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.causal": False,
        "rope.freq_base": config.full_rope.theta,
    }
    if config.bidirectional_window is not None:
        fields |= {
            "attention.sliding_window": 2 * config.bidirectional_window[0],  # llama.cpp halves it
            "attention.sliding_window_pattern": [kind == "sliding" for kind in config.layer_types],
            "rope.freq_base_swa": config.sliding_rope.theta,
        }
    name = architecture(config)
    return {f"{name}.{key}": value for key, value in fields.items()} | {"tokenizer.ggml.model": "none"}


def tensor_name(name: str, config: ModelConfig) -> str:
    """llama.cpp's name of one of Hugging Face's tensors."""
    if not name.startswith("layers."):
        return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    return f"blk.{layer}.{(PARTS | NORMS[config.post_norms])[part]}.weight"


def norm(weight: np.ndarray) -> np.ndarray:
    """Gemma scales by 1 + weight, llama.cpp by what stands in the file."""
    return 1 + weight.astype(np.float32)
