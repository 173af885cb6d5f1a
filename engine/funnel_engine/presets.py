"""Published architectures by name: the fields of their Hugging Face `config.json` that differ from the defaults."""

from typing import Any

from funnel_engine.config import FunnelConfig, ModelConfig
from funnel_engine.funnel_transformer_config import FunnelTransformerConfig
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.hugging_face_config.funnel_transformer import read_funnel_transformer_config
from funnel_kernels.errors import ConfigError

Fields = dict[str, Any]


def sizes(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int) -> Fields:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "query_pre_attn_scalar": head_dim,
    }


def gemma3(*shape: int, window: int, **fields: Any) -> Fields:
    return {"model_type": "gemma3_text", "sliding_window": window, **sizes(*shape), **fields}


def t5gemma(*shape: int) -> Fields:
    return {"model_type": "t5gemma", "encoder": sizes(*shape)}


def t5gemma2(*shape: int, window: int, **fields: Any) -> Fields:
    return {"model_type": "t5gemma2", "encoder": {"text_config": {**sizes(*shape), "sliding_window": window, **fields}}}


def llama3(*shape: int, stretched: float) -> Fields:
    scaling = {"rope_type": "llama3", "factor": stretched, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_theta": 500_000.0, "rope_scaling": scaling | {"original_max_position_embeddings": 8192}}
    fields = {"vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    return {"model_type": "llama", **sizes(*shape), **fields, **rope}


def qwen3_embedding(*shape: int, vocabulary: int, positions: int) -> Fields:
    fields = {"vocab_size": vocabulary, "max_position_embeddings": positions, "rope_theta": 1_000_000.0}
    return {"model_type": "qwen3", **sizes(*shape), **fields}


def eurobert(*shape: int) -> Fields:
    return {"model_type": "eurobert", **sizes(*shape), "rope_theta": 250_000.0}


def gemma4(*shape: int, layer_types: str, shared: int, **fields: Any) -> Fields:
    """`layer_types` has a letter for each layer of a period: "s" for sliding, "f" for full."""
    names = [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in layer_types]
    layers = {"layer_types": names * (shape[0] // len(names)), "num_kv_shared_layers": shared}
    return {"model_type": "gemma4_text", **sizes(*shape), **layers, **fields}


SMALL_3 = {"vocab_size": 262144, "max_position_embeddings": 32768}
STRETCHED = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}

PRESETS: dict[str, Fields] = {
    "gemma-2b": {"model_type": "gemma", **sizes(18, 2048, 8, 1, 256, 16384)},
    "gemma-7b": {"model_type": "gemma", **sizes(28, 3072, 16, 16, 256, 24576)},
    "gemma2-2b": {"model_type": "gemma2", **sizes(26, 2304, 8, 4, 256, 9216)},
    "gemma2-9b": {"model_type": "gemma2", **sizes(42, 3584, 16, 8, 256, 14336)},
    "gemma2-27b": {"model_type": "gemma2", **sizes(46, 4608, 32, 16, 128, 36864), "query_pre_attn_scalar": 144},
    "gemma3-270m": gemma3(18, 640, 4, 1, 256, 2048, window=512, **SMALL_3),
    "gemma3-1b": gemma3(26, 1152, 4, 1, 256, 6912, window=512, **SMALL_3),
    "gemma3-4b": gemma3(34, 2560, 8, 4, 256, 10240, window=1024, **STRETCHED),
    "gemma3-12b": gemma3(48, 3840, 16, 8, 256, 15360, window=1024, **STRETCHED),
    "gemma3-27b": gemma3(62, 5376, 32, 16, 128, 21504, window=1024, **STRETCHED, query_pre_attn_scalar=168),
    "embeddinggemma-300m": gemma3(
        24,
        768,
        3,
        1,
        256,
        1152,
        window=512,
        vocab_size=262144,
        max_position_embeddings=2048,
        use_bidirectional_attention=True,
    ),
    "embeddinggemma-2": {"model_type": "embedding_gemma2_text"},
    "gemma4-e2b": gemma4(35, 1536, 8, 1, 256, 6144, layer_types="ssssf", shared=20, use_double_wide_mlp=True),
    "gemma4-e4b": gemma4(42, 2560, 8, 2, 256, 10240, layer_types="sssssf", shared=18),
    "t5gemma-s": t5gemma(8, 512, 8, 8, 64, 1024),
    "t5gemma-b": t5gemma(12, 768, 12, 12, 64, 2048),
    "t5gemma-l": t5gemma(24, 1024, 16, 16, 64, 2816),
    "t5gemma-ml": t5gemma(26, 1152, 4, 4, 256, 6912),
    "t5gemma-xl": t5gemma(24, 2048, 32, 32, 64, 5120),
    "t5gemma-2b": t5gemma(26, 2304, 8, 4, 256, 9216),
    "t5gemma-9b": t5gemma(42, 3584, 16, 8, 256, 14336),
    # The encoders of T5Gemma 2 begin as Gemma 3 models of the same sizes (arXiv:2512.14856). We have seen the config of
    # the smallest only; the vocabulary and RoPE of the other two are assumed to be the same.
    "t5gemma2-270m": t5gemma2(18, 640, 4, 1, 256, 2048, window=512, **SMALL_3, **STRETCHED),
    "t5gemma2-1b": t5gemma2(26, 1152, 4, 1, 256, 6912, window=512, **SMALL_3, **STRETCHED),
    "t5gemma2-4b": t5gemma2(34, 2560, 8, 4, 256, 10240, window=1024, vocab_size=262144, **STRETCHED),
    "qwen3-embedding-0.6b": qwen3_embedding(28, 1024, 16, 8, 128, 3072, vocabulary=151669, positions=32768),
    "qwen3-embedding-4b": qwen3_embedding(36, 2560, 32, 8, 128, 9728, vocabulary=151665, positions=40960),
    "qwen3-embedding-8b": qwen3_embedding(36, 4096, 32, 8, 128, 12288, vocabulary=151665, positions=40960),
    "llama3.2-1b": llama3(16, 2048, 32, 8, 64, 8192, stretched=32.0),
    "llama3.1-8b": llama3(32, 4096, 32, 8, 128, 14336, stretched=8.0),
    "mistral-7b": {
        "model_type": "mistral",
        **sizes(32, 4096, 32, 8, 128, 14336),
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
    },
    "eurobert-210m": eurobert(12, 768, 12, 12, 64, 3072),
    "eurobert-610m": eurobert(26, 1152, 18, 6, 64, 4096),
    "eurobert-2.1b": eurobert(32, 2304, 18, 6, 128, 6144),
}


# Dai et al. 2020, with a decoder; the name with "-base" at its end is the same model without one.
FUNNEL_TRANSFORMERS: dict[str, Fields] = {
    "funnel-small": {"block_sizes": [4, 4, 4]},  # B4-4-4
    "funnel-medium": {"block_sizes": [6, 3, 3], "block_repeats": [1, 2, 2]},  # B6-3x2-3x2
    "funnel-intermediate": {"block_sizes": [6, 6, 6]},  # B6-6-6
    "funnel-large": {"block_sizes": [8, 8, 8], "d_model": 1024, "n_head": 16, "d_inner": 4096},  # B8-8-8
    "funnel-xlarge": {"block_sizes": [10, 10, 10], "d_model": 1024, "n_head": 16, "d_inner": 4096},  # B10-10-10
}


def funnel_transformer(name: str) -> tuple[FunnelTransformerConfig, FunnelConfig]:
    """The architecture of a published Funnel-Transformer and its funnel, e.g. "funnel-small" or "funnel-small-base".

    Raises:
        ConfigError: the name is not that of a published model; the message lists all of them.
    """
    if not is_funnel_transformer(name):
        raise ConfigError(f"{name!r} is unknown; choose one of {', '.join(FUNNEL_TRANSFORMERS)}, or add '-base' to one")
    full = name.removesuffix("-base")
    return read_funnel_transformer_config(FUNNEL_TRANSFORMERS[full], has_decoder=name == full)


def is_funnel_transformer(name: str) -> bool:
    """Whether this is the name of a published Funnel-Transformer."""
    return name.removesuffix("-base") in FUNNEL_TRANSFORMERS


def preset(name: str) -> ModelConfig:
    """The architecture of a published model, e.g. "gemma-2b", with the attention that its config says.

    Raises:
        ConfigError: the preset does not exist, or is a Funnel-Transformer; the message lists all presets.
    """
    if is_funnel_transformer(name):
        raise ConfigError(
            f"{name!r} is a Funnel-Transformer, which this is not for; choose one of {', '.join(PRESETS)}"
        )
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return read_model_config(PRESETS[name])
