"""The architecture of a checkpoint without one: from a config.json in its folder, or that of a published model."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from funnel_engine.checkpoints.tensors import Parts, SourceTensor
from funnel_engine.config import ModelConfig
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.input_files import optional_file, read_json, reading
from funnel_engine.presets import PRESETS, preset
from funnel_kernels.errors import CheckpointError

FAMILIES = ("gemma", "gemma2", "gemma3_text", "t5gemma")  # that are published in the formats that need this module
IMAGE_ROWS = 64  # 262,208 - 262,144


def find_config(
    directory: Path,
    tensors: Mapping[str, SourceTensor],
    parts_of: Callable[[ModelConfig], Parts],
    vocabulary: int,
    sliding_window: int | None = None,
) -> ModelConfig:
    """The config in a directory's config.json, or else of the published model whose tensors have these shapes.

    Args:
        tensors: the tensors of the checkpoint, by name.
        parts_of: returns the tensors that a model of an architecture needs.
        vocabulary: number of rows of the embedding table.
        sliding_window: replaces the value in config.json, which must then exist.

    Raises:
        CheckpointError: config.json cannot be read or is that of another family, or it is missing although no published
            model has these shapes.
    """
    config_file = optional_file(directory, "config.json")
    if config_file:
        with reading(config_file):
            config = read_model_config(read_json(config_file), sliding_window)
        if config.family not in FAMILIES or config.attention_bias:
            biased = " whose attention has biases" if config.attention_bias else ""
            raise CheckpointError(
                f"{config_file} is that of a {config.family}{biased}, which is not read in this format but only in "
                "Hugging Face's; these files do not belong together, so fetch the model again"
            )
        return fit_vocabulary(config, vocabulary)
    if sliding_window is not None:
        raise CheckpointError(
            f"--sliding-window {sliding_window} replaces the value in config.json, but {directory} has no config.json; "
            "leave it out to take the value of the published model"
        )
    published = {name: config for name in PRESETS if (config := preset(name)).family in FAMILIES}
    for config in published.values():
        config = fit_vocabulary(config, vocabulary)
        parts = [part for weight_parts in parts_of(config).values() for part in weight_parts]
        if all(part.name in tensors and tensors[part.name].shape == part.shape for part in parts):
            return config
    raise CheckpointError(
        f"{directory} has tensors whose shapes no published model has ({', '.join(published)}); put the model's "
        "Hugging Face config.json into this folder"
    )


def fit_vocabulary(config: ModelConfig, rows: int) -> ModelConfig:
    """Removes the image rows of multimodal Gemma 3 from vocab_size; only Hugging Face's own table contains them."""
    return dataclasses.replace(config, vocab_size=rows) if config.vocab_size - rows == IMAGE_ROWS else config


def is_embedding_gemma(config: EncoderConfig) -> bool:
    """Whether a config is EmbeddingGemma's, the only published bidirectional Gemma 3."""
    return config.family == "gemma3_text" and config.attention == "bidirectional"
