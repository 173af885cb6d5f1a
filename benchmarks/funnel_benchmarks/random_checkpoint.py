"""Random weights in the files of Hugging Face, which its own code and `funnel_engine.convert` read alike."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from funnel_engine import FunnelTransformerConfig, ModelConfig
from funnel_engine.checkpoints import funnel_transformer
from funnel_engine.checkpoints.hugging_face import ZERO_CENTRED, encoder_parts
from funnel_engine.checkpoints.safetensors_file import write_tensors
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.hugging_face_config import read_model_config, read_projection_width
from funnel_engine.hugging_face_config.funnel_transformer import read_funnel_transformer_config
from funnel_engine.presets import Fields
from funnel_engine.weights import DTYPES, Shapes, random_array

ARCHITECTURES = {
    "gemma": "GemmaModel",
    "gemma3_text": "Gemma3TextModel",
    "embedding_gemma2_text": "EmbeddingGemma2TextModel",
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen3": "Qwen3Model",
    "eurobert": "EuroBertModel",
}
FUNNEL_TRANSFORMER = "FunnelModel"  # with a decoder; without one it is a FunnelBaseModel
DTYPE = "bfloat16"


def write_random_model(directory: Path, fields: Fields) -> None:
    """Writes config.json and model.safetensors into `directory`; the same ones every time, in place of earlier ones.

    Args:
        directory: is made if it is not there.
        fields: of config.json; `model_type` is one of `ARCHITECTURES`, or "funnel" with `architectures`.
    """
    directory.mkdir(exist_ok=True)
    classes = {"architectures": [ARCHITECTURES[fields["model_type"]]]} if "architectures" not in fields else {}
    config = {"dtype": DTYPE, **classes, **fields}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model = read_encoder_config(fields)
    generator, shapes = np.random.default_rng(0), tensor_shapes(model)
    if isinstance(model, ModelConfig) and (projection := read_projection_width(fields)):
        shapes["embedding_projection.weight"] = (projection, model.hidden_size)
    values = {name: one_array(generator, shape, centre(name, shape, model)) for name, shape in shapes.items()}
    file = directory / "model.safetensors"
    file.unlink(missing_ok=True)
    types = {name: jax.ShapeDtypeStruct(shape, DTYPES[DTYPE]) for name, shape in shapes.items()}
    write_tensors(file, types, values, lambda size: None)


def read_encoder_config(fields: Fields) -> EncoderConfig:
    """The architecture of a config.json, as `write_random_model` takes it."""
    if fields["model_type"] != "funnel":
        return read_model_config(fields)
    config, _ = read_funnel_transformer_config(fields, has_decoder=FUNNEL_TRANSFORMER in fields["architectures"])
    return config


def one_array(generator: np.random.Generator, shape: tuple[int, ...], plus: float) -> Iterator[np.ndarray]:
    """Yields one array, made only when it is written: memory holds one tensor at a time.

    Args:
        plus: added to it, see `centre`.
    """
    values = random_array(generator, shape, DTYPE)
    yield values + values.dtype.type(plus) if plus else values


def centre(name: str, shape: tuple[int, ...], config: EncoderConfig) -> float:
    """What the numbers of a tensor lie around: those of matrices around 0, and a norm multiplies by about 1.

    Norms of queries and keys multiply by what makes scores as large as those of unit queries and keys that are divided
    by the root of the head's dimension. EmbeddingGemma 2 does not scale its scores: with norms around 1 a token would
    see one other token only, and which one would depend on the rounding.
    """
    if len(shape) > 1:
        return 0.0
    if isinstance(config, FunnelTransformerConfig):
        return float(name.endswith("layer_norm.weight"))
    norm_of_heads = name.endswith(("q_norm.weight", "k_norm.weight"))
    factor = (shape[0] ** -0.5 / config.query_scale) ** 0.5 if norm_of_heads else 1.0
    return factor - (config.family in ZERO_CENTRED)


def tensor_shapes(config: EncoderConfig) -> Shapes:
    """The tensors of one of Hugging Face's encoders, by name."""
    if isinstance(config, FunnelTransformerConfig):
        parts = funnel_transformer.encoder_parts(config, prefix="").values()
        shapes = {part.name: part.shape for each in parts for part in each}
        keys = [name for name in shapes if name.endswith(".k_head.weight")]
        return shapes | {f"{name.removesuffix('weight')}bias": shapes[name][:1] for name in keys}
    return {part.name: part.shape for parts in encoder_parts(config, prefix="").values() for part in parts}
