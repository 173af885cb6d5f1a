"""The architecture of a checkpoint that carries none: a Hugging Face config.json beside it, or a published model's."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from funnel_engine.checkpoints.tensors import Parts, SourceTensor
from funnel_engine.config import ModelConfig
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.input_files import optional_file, read_json, reading
from funnel_engine.presets import PRESETS, preset
from funnel_kernels.errors import CheckpointError

IMAGE_ROWS = 64  # 262,208 - 262,144


def find_config(
    directory: Path,
    tensors: Mapping[str, SourceTensor],
    parts_of: Callable[[ModelConfig], Parts],
    vocabulary: int,
    sliding_window: int | None = None,
) -> ModelConfig:
    """The config.json in a directory; without one, that of the published model whose tensors have these shapes.

    Args:
        tensors: of the checkpoint, by name.
        parts_of: which tensors a model of some architecture needs.
        vocabulary: rows of the embedding table.
        sliding_window: stands for that of config.json, which must then be there.

    Raises:
        CheckpointError: the config cannot be read, or is needed and not there: the shapes are no published model's.
    """
    config_file = optional_file(directory, "config.json")
    if config_file:
        with reading(config_file):
            return fit_vocabulary(read_model_config(read_json(config_file), sliding_window), vocabulary)
    if sliding_window is not None:
        raise CheckpointError(
            f"--sliding-window {sliding_window} stands for a config.json's, and there is none in {directory}; leave it "
            "out to take the published model's"
        )
    for name in PRESETS:
        config = fit_vocabulary(preset(name), vocabulary)
        parts = [part for several in parts_of(config).values() for part in several]
        if all(part.name in tensors and tensors[part.name].shape == part.shape for part in parts):
            return config
    raise CheckpointError(
        f"{directory} holds tensors of shapes that no published model has ({', '.join(PRESETS)}); put a Hugging Face "
        "config.json of the model into this folder"
    )


def fit_vocabulary(config: ModelConfig, rows: int) -> ModelConfig:
    """Hugging Face's configs of multimodal Gemma 3 count rows for images, which only its own table has."""
    return dataclasses.replace(config, vocab_size=rows) if config.vocab_size - rows == IMAGE_ROWS else config


def is_embedding_gemma(config: ModelConfig) -> bool:
    """Whether it is EmbeddingGemma's, the only bidirectional Gemma 3 that is published."""
    return config.family == "gemma3_text" and config.attention == "bidirectional"
