"""EmbeddingGemma 2 and the text model of Gemma 4. Their classes are `EmbeddingGemma2TextConfig`, `Gemma4TextConfig`.

In both the full layers have heads of their own, which `per_layer_config` lists for each layer.
"""

import re
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
)
from funnel_engine.messages import shorten
from funnel_kernels.errors import ConfigError

COMMON = {
    "vocab_size": 262144,
    "head_dim": 256,
    "global_head_dim": 512,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "sliding_window": 512,
    "hidden_activation": "gelu_pytorch_tanh",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "embedding_gemma2_text": COMMON
    | {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "max_position_embeddings": 262144,
        "hidden_size_per_layer_input": 512,
        "embedding_dim": 768,
    },
    "gemma4_text": COMMON
    | {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": False,
        "use_double_wide_mlp": False,
    },
}
ROPES = {
    "embedding_gemma2_text": {"full_attention": Rope(1e6), "sliding_attention": Rope(1e4)},
    "gemma4_text": {"full_attention": Rope(1e6, rotated=0.25), "sliding_attention": Rope(1e4)},
}


def read_embedding_gemma2(config: Config) -> ModelConfig:
    """A sliding layer sees `sliding_window` tokens on each side. Every layer reads projections of the embedding."""
    window = integer(config.fields, "sliding_window")
    per_layer_width = integer(config.fields, "hidden_size_per_layer_input")
    return read_gemma4(
        config, attention="bidirectional", causal=window, bidirectional=window, per_layer_width=per_layer_width
    )


def read_gemma4_text(config: Config) -> ModelConfig:
    """A causal window contains W keys, with the query's own. A bidirectional one has half of W on each side."""
    fields = config.fields
    bidirectional = fields.get("use_bidirectional_attention")
    if bidirectional not in (None, "all", "vision"):  # "vision" is causal for text
        raise ConfigError(
            f"use_bidirectional_attention={shorten(bidirectional)} is unknown; it must be 'all', 'vision' or null"
        )
    window = integer(fields, "sliding_window")
    per_layer_width = integer(fields, "hidden_size_per_layer_input", least=0)
    return read_gemma4(
        config,
        attention="bidirectional" if bidirectional == "all" else "causal",
        causal=window - 1,
        bidirectional=window // 2,
        per_layer_width=per_layer_width,
        per_layer_vocab=integer(fields, "vocab_size_per_layer_input") if per_layer_width else 0,
        kv_shared_layers=integer(fields, "num_kv_shared_layers", least=0),
        keys_as_values=check_flag("attention_k_eq_v", fields["attention_k_eq_v"]),
        double_wide_mlp=check_flag("use_double_wide_mlp", fields["use_double_wide_mlp"]),
    )


def read_gemma4(config: Config, *, attention: str, causal: int, bidirectional: int, **own: Any) -> ModelConfig:
    """What both families share.

    Args:
        causal, bidirectional: inclusive radii of a sliding layer.
        own: fields of `ModelConfig` that one family sets.
    """
    fields = config.fields
    refuse_unsupported(fields)
    num_layers = integer(fields, "num_hidden_layers", most=MAX_LAYERS)
    layer_types = (*read_layer_types(fields, num_layers, period=6)[:-1], "full")  # as transformers, which warns
    full_rope, sliding_rope = read_ropes(config)
    full_kv_heads, full_head_dim = read_full_heads(fields, layer_types)
    return ModelConfig(
        family=config.family,
        vocab_size=integer(fields, "vocab_size"),
        hidden_size=integer(fields, "hidden_size"),
        intermediate_size=integer(fields, "intermediate_size"),
        num_heads=integer(fields, "num_attention_heads"),
        num_kv_heads=integer(fields, "num_key_value_heads"),
        head_dim=integer(fields, "head_dim"),
        full_kv_heads=full_kv_heads,
        full_head_dim=full_head_dim,
        layer_types=layer_types,
        query_scale=1.0,
        attention=attention,
        max_positions=integer(fields, "max_position_embeddings"),
        full_rope=full_rope,
        sliding_rope=sliding_rope,
        causal_window=(causal, 0),
        bidirectional_window=(bidirectional, bidirectional),
        post_norms=True,
        qk_norm=True,
        value_norm=True,
        layer_scalar=True,
        attention_bias=check_flag("attention_bias", fields.get("attention_bias", False)),
        norm_eps=number(fields, "rms_norm_eps"),
        pad_token_id=None if config.text.get("pad_token_id", 0) is None else integer(fields, "pad_token_id", least=0),
        **own,
    )


def refuse_unsupported(fields: dict[str, Any]) -> None:
    if fields["hidden_activation"] != COMMON["hidden_activation"]:
        raise ConfigError(
            f"activation {shorten(fields['hidden_activation'])} is not supported; it must be Gemma's "
            f"{COMMON['hidden_activation']!r}"
        )
    if check_flag("enable_moe_block", fields.get("enable_moe_block", False)):
        raise ConfigError("enable_moe_block=true: this engine does not run experts; use a dense Gemma 4")


def read_full_heads(fields: dict[str, Any], layer_types: tuple[str, ...]) -> tuple[int, int]:
    """The number of key/value heads of the full layers, and their dimension.

    `per_layer_config` lists what differs for each layer, by its index. An old config has fields for the full layers.
    """
    kv_heads = fields.get("num_key_value_heads")
    own: dict[str, Any] = {"head_dim": fields.get("global_head_dim")}
    if fields.get("attention_k_eq_v", True) and fields.get("num_global_key_value_heads") is not None:
        own["num_key_value_heads"] = fields["num_global_key_value_heads"]
    full_layers = [index for index, layer_type in enumerate(layer_types) if layer_type == "full"]
    listed = fields.get("per_layer_config", {str(index): own for index in full_layers})
    if not isinstance(listed, dict) or not all(
        isinstance(each, dict) and re.fullmatch("[0-9]{1,4}", key) for key, each in listed.items()
    ):
        raise ConfigError(
            "per_layer_config must be a JSON object of objects, whose keys are numbers of layers; it is "
            f"{shorten(listed)}"
        )
    by_layer = {int(key): each for key, each in listed.items()}  # transformers writes "05"
    own = by_layer.get(full_layers[0], {})
    expected = dict.fromkeys(full_layers, own) if own else {}
    if by_layer != expected or not own.keys() <= {"head_dim", "num_key_value_heads"}:
        raise ConfigError(
            f"per_layer_config={shorten(listed)} is not supported; it must give the same head_dim and "
            f"num_key_value_heads to each full layer, which are {', '.join(map(str, full_layers))}, and nothing else"
        )
    merged = {"head_dim": fields.get("head_dim"), "num_key_value_heads": kv_heads} | own
    return integer(merged, "num_key_value_heads"), integer(merged, "head_dim")


def read_ropes(config: Config) -> tuple[Rope, Rope]:
    """RoPE of the full layers and of the sliding layers, from `rope_parameters`."""
    parameters = config.fields.get("rope_parameters")
    defaults = ROPES[config.family]
    if parameters is None:
        return defaults["full_attention"], defaults["sliding_attention"]
    nested: list[Any] = [parameters.get(name) for name in defaults] if isinstance(parameters, dict) else [None]
    if not all(isinstance(value, dict) for value in nested):
        raise ConfigError(f"rope_parameters must contain {' and '.join(defaults)}; it is {shorten(parameters)}")
    full, sliding = (read_rope(each, ("default", "proportional")) for each in nested)
    return full, sliding


def projection_width(config: Config) -> int | None:
    """The width to which the rows of EmbeddingGemma 2 are projected; None for other families."""
    return integer(config.fields, "embedding_dim") if config.family == "embedding_gemma2_text" else None
