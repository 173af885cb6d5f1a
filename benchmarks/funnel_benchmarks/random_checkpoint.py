"""Random weights in the files of Hugging Face, which its own code and `funnel_engine.convert` read alike."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from funnel_engine import ModelConfig
from funnel_engine.checkpoints.hugging_face import ZERO_CENTRED, encoder_parts
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
    return {part.name: part.shape for parts in encoder_parts(config, prefix="").values() for part in parts}
