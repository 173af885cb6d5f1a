"""Random weights in the files of Hugging Face, which its own code and `funnel_engine.convert` read alike."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from funnel_engine import ModelConfig
from funnel_engine.checkpoints.hugging_face import ZERO_CENTRED
from funnel_engine.checkpoints.safetensors_file import write_tensors
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.presets import Fields
from funnel_engine.weights import Shapes, random_array, tensor_types

ARCHITECTURES = {
    "gemma": "GemmaModel",
    "gemma3_text": "Gemma3TextModel",
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen3": "Qwen3Model",
    "eurobert": "EuroBertModel",
}
DTYPE = "bfloat16"


def write_random_model(directory: Path, fields: Fields) -> None:
    """Writes config.json and model.safetensors into `directory`; the same ones every time, in place of earlier ones.

    Args:
        directory: is made if it is not there.
        fields: of config.json; `model_type` is one of `ARCHITECTURES`.
    """
    directory.mkdir(exist_ok=True)
    config = {"architectures": [ARCHITECTURES[fields["model_type"]]], "dtype": DTYPE, **fields}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model = read_model_config(fields)
    generator, shapes = np.random.default_rng(0), tensor_shapes(model)
    plus = {name: float(len(shape) == 1 and model.family not in ZERO_CENTRED) for name, shape in shapes.items()}
    values = {name: one_array(generator, shape, plus[name]) for name, shape in shapes.items()}
    file = directory / "model.safetensors"
    file.unlink(missing_ok=True)
    write_tensors(file, tensor_types(shapes, DTYPE), values, lambda size: None)


def one_array(generator: np.random.Generator, shape: tuple[int, ...], plus: float) -> Iterator[np.ndarray]:
    """Yields one array, made only when it is written: memory holds one tensor at a time.

    Args:
        plus: added to it; 1 for norms that multiply by their weights.
    """
    values = random_array(generator, shape, DTYPE)
    yield values + values.dtype.type(plus) if plus else values


def tensor_shapes(config: ModelConfig) -> Shapes:
    """The tensors of one of Hugging Face's `ARCHITECTURES`, by name."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: Shapes = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    if config.post_norms:
        layer |= {"pre_feedforward_layernorm": (hidden,), "post_feedforward_layernorm": (hidden,)}
    if config.qk_norm:
        layer |= {"self_attn.q_norm": (config.head_dim,), "self_attn.k_norm": (config.head_dim,)}
    shapes: Shapes = {"embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (hidden,)}
