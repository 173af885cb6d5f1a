"""Llama, Mistral, Qwen3 and EuroBERT: blocks of Llama, with windows, with normed queries and keys, or bidirectional.

Their classes are `LlamaConfig`, `MistralConfig`, `Qwen3Config` and `EuroBertConfig`.
"""

from typing import Any

from funnel_engine.checks import check_flag
from funnel_engine.config import ModelConfig, Rope
from funnel_engine.hugging_face_config.fields import (
    MAX_LAYERS,
    Config,
    integer,
    number,
    read_layer_types,
    read_rope,
    read_rope_fields,
)
from funnel_engine.messages import shorten
from funnel_kernels.errors import ConfigError

# Without `num_key_value_heads` there are as many as query heads; without `head_dim` it is the width divided by them.
COMMON = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen3": COMMON
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "eurobert": {
        "vocab_size": 128256,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 128001,
    },
}


def read_llama(config: Config) -> ModelConfig:
    family = config.family
    # A null is the class's own rule for None, and not its default.
    fields = {name: value for name, value in config.fields.items() if config.text.get(name, value) is not None}
    refuse_unsupported(fields)
    hidden_size, num_heads = integer(fields, "hidden_size"), integer(fields, "num_attention_heads")
    fields = {"num_key_value_heads": num_heads, "head_dim": hidden_size // num_heads} | fields
    head_dim = integer(fields, "head_dim")
    layer_types = read_layers(family, fields)
    width = integer(fields, "sliding_window") if "sliding" in layer_types else None
    rope = read_flat_rope(fields)
    return ModelConfig(
        family=family,
        vocab_size=integer(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer(fields, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=integer(fields, "num_key_value_heads"),
        head_dim=head_dim,
        layer_types=layer_types,
        query_scale=head_dim**-0.5,
        attention="causal" if family != "eurobert" and fields.get("is_causal", True) else "bidirectional",
        max_positions=integer(fields, "max_position_embeddings"),
        full_rope=rope,
        sliding_rope=rope,
        # A causal window contains `width` keys, with the query's own. If `is_causal` is false, a query of transformers
        # sees `width` tokens on each side.
        causal_window=(width - 1, 0) if width else None,
        bidirectional_window=(width, width) if width else None,
        activation="silu",
        scale_embedding=False,
        qk_norm=family == "qwen3",
        attention_bias=read_bias(family, fields, "attention_bias", ("llama", "qwen3", "eurobert")),
        mlp_bias=read_bias(family, fields, "mlp_bias", ("llama", "eurobert")),
        norm_eps=number(fields, "rms_norm_eps"),
        pad_token_id=integer(fields, "pad_token_id", least=0) if "pad_token_id" in fields else None,
    )


def refuse_unsupported(fields: dict[str, Any]) -> None:
    if fields.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"activation {shorten(fields['hidden_act'])} is not supported; it must be 'silu'")
    check_flag("is_causal", fields.get("is_causal", True))
    if fields.get("use_bidirectional_attention"):
        raise ConfigError(
            "use_bidirectional_attention=true has no effect on this family in transformers; if every token of the "
            "model sees all others, set is_causal=false instead"
        )


def read_bias(family: str, fields: dict[str, Any], name: str, families: tuple[str, ...]) -> bool:
    """Whether products have a bias; the classes of the other families ignore this field."""
    return family in families and check_flag(name, fields.get(name, False))


def read_layers(family: str, fields: dict[str, Any]) -> tuple[str, ...]:
    """The type of each layer. A Mistral with a window has it in every layer; Qwen3 has it in the last layers."""
    num_layers = integer(fields, "num_hidden_layers", most=MAX_LAYERS)
    if family != "qwen3":
        return ("sliding" if family == "mistral" and "sliding_window" in fields else "full",) * num_layers
    uses_window = check_flag("use_sliding_window", fields.get("use_sliding_window", False))
    has_window = uses_window and "sliding_window" in fields
    first = integer(fields, "max_window_layers", least=0) if has_window else num_layers
    names = [("sliding" if index >= first else "full") + "_attention" for index in range(num_layers)]
    layer_types = read_layer_types({"layer_types": names} | fields, num_layers, period=1)
    if "sliding" in layer_types and not has_window:
        raise ConfigError(
            "layer_types lists sliding_attention, but the config has no window for it; set use_sliding_window=true "
            "and sliding_window to the number of tokens"
        )
    return layer_types


def read_flat_rope(fields: dict[str, Any]) -> Rope:
    """RoPE of all layers, from `rope_parameters` or the older fields."""
    parameters, scaling = read_rope_fields(fields)
    for name in ("full_attention", "sliding_attention"):
        if name in parameters:
            raise ConfigError(f"rope_parameters must be for all layers of this family, but it has {name!r}")
    original = "original_max_position_embeddings"
    defaults = {
        "rope_theta": fields.get("rope_theta", 10_000.0),
        "partial_rotary_factor": fields.get("partial_rotary_factor"),
        original: fields.get("max_position_embeddings"),
    }
    outer = {original: fields[original]} if original in fields else {}  # transformers prefers it
    return read_rope(defaults | scaling | parameters | outer, ("default", "linear", "llama3"))
