"""Reads a Hugging Face `config.json` into a `ModelConfig`: old and new field names, nested configs, class defaults.

There is a file for each group of families. Field names and defaults are those of the configuration classes of
transformers 5.24. A config file does not contain fields that have the class default.
"""

from collections.abc import Callable
from typing import Any

from funnel_engine.config import ModelConfig
from funnel_engine.hugging_face_config import gemma, gemma4, llama
from funnel_engine.hugging_face_config.fields import (
    Config,
    refuse_other_files,
    refuse_own_code,
    refuse_quantized,
)
from funnel_engine.messages import shorten
from funnel_kernels.errors import ConfigError

DEFAULTS: dict[str, dict[str, Any]] = {  # of the fields of each family
    **gemma.DEFAULTS,
    **gemma4.DEFAULTS,
    **llama.DEFAULTS,
}
READERS: dict[str, Callable[[Config], ModelConfig]] = {
    **dict.fromkeys(gemma.DEFAULTS, gemma.read_gemma),
    "embedding_gemma2_text": gemma4.read_embedding_gemma2,
    "gemma4_text": gemma4.read_gemma4_text,
    **dict.fromkeys(llama.DEFAULTS, llama.read_llama),
}
# model_type -> the keys that lead to its nested text config, and the family of that config
NESTED: dict[str, tuple[tuple[str, ...], str]] = {
    "gemma3": (("text_config",), "gemma3_text"),
    "t5gemma": (("encoder",), "t5gemma"),
    "t5gemma2": (("encoder", "text_config"), "t5gemma2_text"),
    "t5gemma2_encoder": (("text_config",), "t5gemma2_text"),
    "embedding_gemma2": (("text_config",), "embedding_gemma2_text"),
    "gemma4": (("text_config",), "gemma4_text"),
}


def read_model_config(config: dict[str, Any], sliding_window: int | None = None) -> ModelConfig:
    """Reads the content of a `config.json`; of a model with a decoder or with towers, that of its text encoder.

    Args:
        sliding_window: replaces the value in the config, if that is known to be wrong.

    Raises:
        ConfigError: the family or a feature is not supported, or a value is not valid.
    """
    found = read_config(config, sliding_window)
    model = READERS[found.family](found)
    if sliding_window is not None and "sliding" not in model.layer_types:
        raise ConfigError(f"sliding_window={sliding_window} is given, but this model has no sliding layers")
    return model


def read_projection_width(config: dict[str, Any]) -> int | None:
    """The width to which the encoder of a `config.json` projects its rows; None if it does not.

    Raises:
        ConfigError: see `read_model_config`.
    """
    return gemma4.projection_width(read_config(config))


def read_config(config: dict[str, Any], sliding_window: int | None = None) -> Config:
    """The fields of the text encoder, with the defaults of its family."""
    if not isinstance(config, dict):
        raise ConfigError(f"the config is a {type(config).__name__}; it must be a JSON object")
    refuse_own_code(config)
    refuse_other_files(config)
    refuse_quantized(config)
    family = config.get("model_type")
    text = config
    if isinstance(family, str) and family in NESTED:
        keys, family = NESTED[family]
        for key in keys:
            text = text.get(key) or {}
            if not isinstance(text, dict):
                raise ConfigError(f"{key} in the config is a {type(text).__name__}; it must be a JSON object")
            refuse_quantized(text)
    if not isinstance(family, str) or family not in READERS:
        known = ", ".join(name for name in sorted({*READERS, *NESTED}) if not name.endswith("_text"))
        raise ConfigError(f"model_type {shorten(family)} is not supported; this engine runs {known}")

    fields = DEFAULTS[family] | {key: value for key, value in text.items() if value is not None}
    if sliding_window is not None:
        fields["sliding_window"] = sliding_window
    return Config(family, config, text, fields)
