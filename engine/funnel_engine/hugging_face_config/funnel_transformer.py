"""Reads the config.json of a Funnel-Transformer."""

from typing import Any

from funnel_engine.checks import check_flag, check_option
from funnel_engine.config import FunnelConfig
from funnel_engine.funnel_transformer_config import FunnelTransformerConfig
from funnel_engine.hugging_face_config.fields import (
    MAX_LAYERS,
    integer,
    number,
    refuse_other_files,
    refuse_own_code,
    refuse_quantized,
)
from funnel_engine.messages import shorten
from funnel_kernels.errors import ConfigError

DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "block_sizes": [4, 4, 4],
    "num_decoder_layers": 2,
    "d_model": 768,
    "n_head": 12,
    "d_head": 64,
    "d_inner": 3072,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-9,
    "pooling_type": "mean",
    "separate_cls": True,
    "truncate_seq": True,
    "pool_q_only": True,
    "max_position_embeddings": 512,
}
MAX_BLOCKS = 20  # pairs are pooled between blocks; 2**20 tokens are more than any sequence has


def read_funnel_transformer_config(
    config: dict[str, Any], has_decoder: bool
) -> tuple[FunnelTransformerConfig, FunnelConfig]:
    """The architecture of a config.json, and the funnel between its blocks.

    `attention_type` is not read: the two types are two ways to compute the same.

    Args:
        has_decoder: whether the checkpoint has the decoder's layers; a base model has not.

    Raises:
        ConfigError: a feature is not supported, or a value is not valid.
    """
    refuse_own_code(config)
    refuse_other_files(config)
    refuse_quantized(config)
    fields = DEFAULTS | {name: value for name, value in config.items() if value is not None}
    if fields["hidden_act"] not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ConfigError(f"activation {shorten(fields['hidden_act'])} is not supported; it must be 'gelu_new'")
    check_option("pooling_type", fields["pooling_type"], ("mean", "max"))
    sizes = read_blocks("block_sizes", fields["block_sizes"])
    repeats = read_blocks("block_repeats", fields.get("block_repeats", [1] * len(sizes)))
    model = FunnelTransformerConfig(
        vocab_size=integer(fields, "vocab_size"),
        hidden_size=integer(fields, "d_model"),
        intermediate_size=integer(fields, "d_inner"),
        num_heads=integer(fields, "n_head"),
        head_dim=integer(fields, "d_head"),
        block_sizes=sizes,
        block_repeats=repeats,
        decoder_layers=integer(fields, "num_decoder_layers", least=0, most=MAX_LAYERS) if has_decoder else 0,
        separate_cls=check_flag("separate_cls", fields["separate_cls"]),
        truncate=check_flag("truncate_seq", fields["truncate_seq"]),
        max_positions=integer(fields, "max_position_embeddings"),
        norm_eps=number(fields, "layer_norm_eps"),
    )
    pool_query_only = check_flag("pool_q_only", fields["pool_q_only"])
    return model, model.funnel(pool=fields["pooling_type"], pool_query_only=pool_query_only)


def read_blocks(name: str, values: Any) -> tuple[int, ...]:
    """A number for each block."""
    if not isinstance(values, list) or not 1 <= len(values) <= MAX_BLOCKS:
        raise ConfigError(f"{name}={shorten(values)} must list a number for each block, of at most {MAX_BLOCKS}")
    return tuple(integer({f"{name}[{i}]": value}, f"{name}[{i}]", most=MAX_LAYERS) for i, value in enumerate(values))
