"""Reads the fields that configs of all families share: numbers, layer types, RoPE, and what no reader accepts."""

from typing import Any, NamedTuple

from funnel_engine.checks import check_integer, check_number
from funnel_engine.config import Llama3Scaling, Rope
from funnel_engine.messages import shorten
from funnel_kernels.errors import ConfigError

LAYER_TYPES = {"full_attention": "full", "sliding_attention": "sliding"}
MAX_LAYERS = 1000  # the largest model has 80; a damaged file must not fill the memory with layers


class Config(NamedTuple):
    """The content of a config.json.

    Attributes:
        family: the `model_type` of the encoder.
        whole: the content of the file.
        text: the config of the encoder, which may be nested in it.
        fields: `text` with the defaults of the family.
    """

    family: str
    whole: dict[str, Any]
    text: dict[str, Any]
    fields: dict[str, Any]


def refuse_own_code(config: dict[str, Any]) -> None:
    """Raises `ConfigError` if `auto_map` names a class in the checkpoint's own code, which may mask differently."""
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, dict) or any(name.startswith("AutoModel") for name in auto_map):
        raise ConfigError(
            f"auto_map={shorten(auto_map)} names a class in the checkpoint's own code, which is not run; if it is like "
            "a known family, delete auto_map from config.json, and set model_type, and is_causal=false if bidirectional"
        )


def refuse_other_files(config: dict[str, Any]) -> None:
    """Raises `ConfigError` if a field names other files, which transformers would read instead of the usual ones."""
    for name in ("transformers_weights", "configuration_files"):
        if config.get(name):
            raise ConfigError(
                f"{name}={shorten(config[name])} names files that this engine does not read; load the model with "
                "transformers and save it, which writes one config.json and model.safetensors"
            )


def refuse_quantized(config: dict[str, Any]) -> None:
    for name in ("quantization_config", "compression_config", "quantization"):
        value = config.get(name)
        if value:
            method = value.get("quant_method") if isinstance(value, dict) else value
            by = shorten(method or ("mlx" if "quantization" in config else value))
            raise ConfigError(
                f"{name} says that the weights are quantized, by {by}; this engine reads plain weights. Convert the "
                "original model, or load this one with transformers, call model.dequantize() and save it"
            )


def read_layer_types(fields: dict[str, Any], num_layers: int, period: int) -> tuple[str, ...]:
    """The type of each layer. Where the config does not list them, the last of each `period` layers is full."""
    names = fields.get("layer_types")
    if names is None:
        spelling = "sliding_window_pattern" if "sliding_window_pattern" in fields else "_sliding_window_pattern"
        period = integer({spelling: period} | fields, spelling)
        names = [("full" if (i + 1) % period == 0 else "sliding") + "_attention" for i in range(num_layers)]
    if not isinstance(names, list) or len(names) != num_layers:
        raise ConfigError(f"layer_types must list one type for each of the {num_layers} layers; it is {shorten(names)}")
    unknown = [name for name in names if not isinstance(name, str) or name not in LAYER_TYPES]
    if unknown:
        raise ConfigError(f"layer type {shorten(unknown[0])} is unknown; it must be {' or '.join(LAYER_TYPES)}")
    return tuple(LAYER_TYPES[name] for name in names)


def read_rope_fields(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields `rope_parameters` and, of older files, `rope_scaling`; an empty object where one is missing."""
    parameters, scaling = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} is a {type(value).__name__}; it must be a JSON object")
    return parameters, scaling


def read_rope(parameters: dict[str, Any], kinds: tuple[str, ...] = ("default", "linear")) -> Rope:
    """RoPE of a type that the family has."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = number(parameters, "rope_theta")
    if kind not in kinds:
        raise ConfigError(f"RoPE type {shorten(kind)} is not supported; it must be {' or '.join(map(repr, kinds))}")
    if kind == "proportional":
        factor, rotated = (parameters.get(name, 1.0) for name in ("factor", "partial_rotary_factor"))
        return Rope(theta, check_number("RoPE factor", factor), check_number("partial_rotary_factor of RoPE", rotated))
    if parameters.get("partial_rotary_factor") not in (None, 1):
        factor = shorten(parameters["partial_rotary_factor"])
        raise ConfigError(f"partial_rotary_factor={factor} is not supported; this family rotates whole heads")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, check_number("RoPE factor", parameters.get("factor")))
    names = ("factor", "low_freq_factor", "high_freq_factor")
    stretch, low, high = (check_number(f"RoPE {name}", parameters.get(name)) for name in names)
    positions = integer(parameters, "original_max_position_embeddings")
    return Rope(theta, llama3=Llama3Scaling(stretch, low, high, positions))


def integer(fields: dict[str, Any], name: str, *, least: int = 1, most: int = 2**31 - 1) -> int:
    return check_integer(name, fields.get(name), least=least, most=most)


def number(fields: dict[str, Any], name: str) -> float:
    return check_number(name, fields.get(name))
