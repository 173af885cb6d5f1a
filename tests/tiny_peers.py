"""Tiny models as the `config.json` of those that the peers run."""

from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "max_position_embeddings": 128,
}
GEMMA = TINY | {"use_bidirectional_attention": True}
# EmbeddingGemma sees 4 tokens to each side, but for one layer, so that short sequences meet the window's edge.
MODELS = {
    "gemma": GEMMA | {"model_type": "gemma"},
    "embeddinggemma": GEMMA
    | {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "embeddinggemma2": TINY
    | {
        "model_type": "embedding_gemma2_text",
        "global_head_dim": 64,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 16,
        "embedding_dim": 48,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "qwen3": TINY | {"model_type": "qwen3"},  # causal
    "mistral": TINY | {"model_type": "mistral", "sliding_window": 5},  # 4 tokens to the left
    "eurobert": TINY | {"model_type": "eurobert", "pad_token_id": 0},
}
