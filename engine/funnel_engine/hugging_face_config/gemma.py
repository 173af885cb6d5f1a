"""Gemma 1, 2 and 3, EmbeddingGemma, and the encoders of T5Gemma and T5Gemma 2.

Their classes are `GemmaConfig`, `Gemma2Config`, `Gemma3TextConfig`, `T5GemmaModuleConfig` and `T5Gemma2TextConfig`.
"""

from typing import Any

from funnel_engine.checks import check_flag, check_number
from funnel_engine.config import ModelConfig, Rope, Window
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

COMMON = {
    "vocab_size": 256000,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
}
GEMMA_2 = COMMON | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA_3 = GEMMA_2 | {"vocab_size": 262208, "max_position_embeddings": 131072}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": COMMON
    | {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "gemma2": GEMMA_2 | {"attn_logit_softcapping": 50.0},
    "t5gemma": GEMMA_2 | {"attn_logit_softcapping": 50.0},
    "gemma3_text": GEMMA_3,
    "t5gemma2_text": GEMMA_3,
}
ENCODERS = ("t5gemma", "t5gemma2_text")  # always bidirectional
LIKE_GEMMA_3 = ("gemma3_text", "t5gemma2_text")  # norms of queries and keys, every 6th layer full, two RoPEs
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")  # the legacy value "gelu" means tanh too (transformers PR 29402)


def read_gemma(config: Config) -> ModelConfig:
    family, fields = config.family, config.fields
    refuse_unsupported(family, fields)
    num_layers = integer(fields, "num_hidden_layers", most=MAX_LAYERS)
    layer_types = ("full",) * num_layers
    if family != "gemma":
        layer_types = read_layer_types(fields, num_layers, period=6 if family in LIKE_GEMMA_3 else 2)
    causal_window, bidirectional_window = read_windows(family, fields, layer_types)
    head_dim = integer(fields, "head_dim")
    softcap = None if family in ("gemma", "gemma3_text") else fields.get("attn_logit_softcapping")
    if config.text.get("attn_logit_softcapping", softcap) is None:  # an explicit null means no softcap
        softcap = None
    scalar = float(head_dim) if family == "gemma" else number(fields, "query_pre_attn_scalar")
    full_rope, sliding_rope = read_ropes(family, fields)
    return ModelConfig(
        family=family,
        vocab_size=integer(fields, "vocab_size"),
        hidden_size=integer(fields, "hidden_size"),
        intermediate_size=integer(fields, "intermediate_size"),
        num_heads=integer(fields, "num_attention_heads"),
        num_kv_heads=integer(fields, "num_key_value_heads"),
        head_dim=head_dim,
        layer_types=layer_types,
        query_scale=scalar**-0.5,
        attention="bidirectional" if is_bidirectional(family, fields) else "causal",
        max_positions=integer(fields, "max_position_embeddings"),
        full_rope=full_rope,
        sliding_rope=sliding_rope,
        causal_window=causal_window,
        bidirectional_window=bidirectional_window,
        softcap=None if softcap is None else check_number("attn_logit_softcapping", softcap),
        post_norms=family != "gemma",
        qk_norm=family in LIKE_GEMMA_3,
        attention_bias=check_flag("attention_bias", fields.get("attention_bias") or False),
        norm_eps=number(fields, "rms_norm_eps"),
        pad_token_id=read_pad_token_id(family, config.whole, config.text),
    )


def read_pad_token_id(family: str, config: dict[str, Any], text: dict[str, Any]) -> int | None:
    """The id that a classifier skips; null skips nothing.

    For T5Gemma it is in the outermost config, or else in the decoder's.
    """
    configs = [text]
    if family == "t5gemma":
        decoder = config.get("decoder")
        configs = [config, decoder if isinstance(decoder, dict) else {}]
    fields = next((fields for fields in configs if "pad_token_id" in fields), COMMON)
    return None if fields["pad_token_id"] is None else integer(fields, "pad_token_id", least=0)


def refuse_unsupported(family: str, fields: dict[str, Any]) -> None:
    activation = fields.get("hidden_activation") or fields.get("hidden_act") or ACTIVATIONS[0]
    if activation not in (ACTIVATIONS if family == "gemma" else ACTIVATIONS[:1]):
        raise ConfigError(f"activation {shorten(activation)} is not supported; it must be Gemma's {ACTIVATIONS[0]!r}")
    for name in ("use_bidirectional_attention", "is_causal"):
        check_flag(name, fields.get(name, False))


def is_bidirectional(family: str, fields: dict[str, Any]) -> bool:
    """True for an encoder, if `use_bidirectional_attention` is true, or if `is_causal` is false."""
    if family in ENCODERS:
        return True
    return fields.get("use_bidirectional_attention", False) is True or fields.get("is_causal", True) is False


def read_windows(
    family: str, fields: dict[str, Any], layer_types: tuple[str, ...]
) -> tuple[Window | None, Window | None]:
    """Inclusive (left, right) radii of a sliding layer, causal and bidirectional, from the config's `sliding_window`.

    A causal window contains W keys, with the query's own. With bidirectional attention Gemma 3 halves W (transformers
    PR 40700). So does T5Gemma 2, whose two sides and the query's own key are W keys together. The other families do not
    halve it (google-deepmind/gemma).
    """
    if "sliding" not in layer_types:
        return None, None
    width = integer(fields, "sliding_window")
    if family == "gemma3_text":
        if fields.get("is_causal", True) is False and not fields.get("use_bidirectional_attention"):
            raise ConfigError(
                f"is_causal=false makes a Gemma 3 see {width} tokens on each side in transformers, but a bidirectional "
                "Gemma 3 sees half of them; if it is a bidirectional one, set use_bidirectional_attention=true"
            )
        if width % 2 and is_bidirectional(family, fields):
            raise ConfigError(
                f"sliding_window={width} is odd in a bidirectional Gemma 3: an old version of transformers saved the "
                "halved window. Give the original value: --sliding-window 512 for EmbeddingGemma"
            )
        return (width - 1, 0), (width // 2, width // 2)
    if family == "t5gemma2_text":
        return (width - 1, 0), ((width + 1) // 2 - 1, width // 2)
    return (width - 1, 0), (width - 1, width - 1)


def read_ropes(family: str, fields: dict[str, Any]) -> tuple[Rope, Rope]:
    """RoPE of the full layers and of the sliding layers, from `rope_parameters` or the older fields."""
    parameters, scaling = read_rope_fields(fields)
    if family not in LIKE_GEMMA_3:
        rope = read_rope({"rope_theta": fields.get("rope_theta", 10_000.0)} | scaling | parameters)
        return rope, rope
    full = {"rope_theta": fields.get("rope_theta", 1_000_000.0)} | scaling
    sliding = {"rope_theta": fields.get("rope_local_base_freq", 10_000.0)}
    nested = [parameters.get(key) or {} for key in ("full_attention", "sliding_attention")]
    if not all(isinstance(value, dict) for value in nested):
        raise ConfigError(f"rope_parameters of {family} must contain two JSON objects; it is {shorten(parameters)}")
    return read_rope(full | nested[0]), read_rope(sliding | nested[1])
