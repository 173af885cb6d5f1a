"""A checkpoint of two layers whose vectors mean something: texts of one topic are near each other."""

import dataclasses
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from funnel_engine import HeadConfig, ModelConfig
from funnel_engine.checkpoints.native import read_checkpoint, write_checkpoint
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.checkpoints.tensors import ArrayTensor
from funnel_engine.config import Rope
from funnel_engine.text import TextConfig
from funnel_engine.weights import random_weights

WORDS = 400
CONFIG = ModelConfig(
    family="gemma3_text",
    vocab_size=WORDS,
    hidden_size=32,
    intermediate_size=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    layer_types=("full", "full"),
    query_scale=0.25,
    attention="bidirectional",
    max_positions=128,
    full_rope=Rope(10_000.0),
    sliding_rope=Rope(10_000.0),
    post_norms=True,
    qk_norm=True,
)


def write_toy(directory: Path, head: HeadConfig = HeadConfig(), *, causal: bool = False) -> Path:  # noqa: B008
    """Writes `directory`/model, whose matrices are large enough for attention to matter."""
    config = dataclasses.replace(CONFIG, attention="causal") if causal else CONFIG
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    file = directory / "tokenizer.json"
    tokenizer.save(str(file))
    weights = {
        name: ArrayTensor.of(name, array * (8 if array.ndim == 2 else 1), file)
        for name, array in random_weights(config, head, "float32", seed=1).items()
    }
    model = SourceModel("funnel", config, head, weights, {}, TextConfig(), file, directory)
    write_checkpoint(directory / "model", model, "float32")
    return directory / "model"


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in read_checkpoint(path).weights.items()}


def write_texts(path: Path, count: int, seed: int = 0) -> Path:
    """Writes a text in each line; the words of a text have neighbouring numbers."""
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        words = generator.integers(0, WORDS) + np.rint(6 * generator.standard_normal(generator.integers(4, 24)))
        lines.append(" ".join(f"w{1 + int(word) % (WORDS - 1)}" for word in words))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
