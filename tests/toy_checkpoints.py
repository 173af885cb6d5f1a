"""Tiny random checkpoints with a tokenizer, and texts for them."""

from pathlib import Path

import numpy as np
import transformers

from funnel_engine import convert
from hugging_face_models import build, gemma2
from tiny_models import WORDS, make_tokenizer


def random_texts(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    texts = (" ".join(generator.choice(WORDS[4:], generator.integers(5, 12))) for _ in range(10 * count))
    return list(dict.fromkeys(texts))[:count]


def save(folder: Path, class_name: str, **fields: object) -> Path:
    """A converted checkpoint with a tokenizer."""
    build(getattr(transformers, class_name), gemma2(**fields)).save_pretrained(folder / "source")
    make_tokenizer().save(str(folder / "source" / "tokenizer.json"))
    convert(folder / "source", folder / "model", dtype="float32")
    return folder / "model"
