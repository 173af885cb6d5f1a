"""A tiny random model and tokenizer for tests of what surrounds the numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from funnel_engine import Engine, HeadConfig, ModelConfig
from funnel_engine.config import Rope
from funnel_engine.text import TextConfig
from funnel_engine.weights import random_weights

CONFIG = ModelConfig(
    family="gemma2",
    vocab_size=101,
    hidden_size=24,
    intermediate_size=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layer_types=("sliding", "full", "sliding"),
    query_scale=0.3,
    attention="bidirectional",
    max_positions=64,
    full_rope=Rope(10_000.0),
    sliding_rope=Rope(10_000.0),
    causal_window=(4, 0),
    bidirectional_window=(4, 4),
    softcap=50.0,
    post_norms=True,
)
WORDS = ("<pad>", "<eos>", "<bos>", "<unk>", "a", "small", "funnel", "pools", "pairs", "of", "tokens", "query:")


def make_engine(head: HeadConfig = HeadConfig(), config: ModelConfig = CONFIG, **options: Any) -> Engine:  # noqa: B008
    options = {"max_batch_tokens": 64} | options
    return Engine(config, head, random_weights(config, head, "float32", seed=7), **options)


TEXT = TextConfig(begin=2)


def make_tokenizer() -> Tokenizer:
    """Words to ids, with a BOS (2) in front of every text if special tokens are asked for."""
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def tokenize(texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts without BOS, as the engine wants them."""
    return [encoding.ids for encoding in make_tokenizer().encode_batch(list(texts), add_special_tokens=False)]


def random_ids(lengths: list[int], seed: int = 0, vocab_size: int = CONFIG.vocab_size) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, vocab_size, length).astype(np.int32) for length in lengths]
