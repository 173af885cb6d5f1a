"""Tiny checkpoints of every kind that the server serves, with tokenizers like Gemma's."""

from pathlib import Path

import transformers

from funnel_engine import convert
from hugging_face_models import build, gemma2
from sentence_models import VOCAB_SIZE, save_embedding_gemma, train_tokenizer

LABELS = {
    "Gemma2ForSequenceClassification": ("news", "sport", "other"),
    "Gemma2ForTokenClassification": ("O", "B-PLACE", "I-PLACE", "B-TIME"),
}


def save_embedder(folder: Path) -> Path:
    """Like EmbeddingGemma: mean pooling, two linear layers, prompts "query" and "document"."""
    save_embedding_gemma(folder)
    convert(folder / "source", folder / "embedder", dtype="float32")
    return folder / "embedder"


def save_classifier(folder: Path, class_name: str, labels: tuple[str, ...] | None = None) -> Path:
    """A classifier of sequences or of tokens. One with a single label is a re-ranker."""
    config = gemma2(vocab_size=VOCAB_SIZE, pad_token_id=0)
    config.id2label = dict(enumerate(labels or LABELS[class_name]))
    config.label2id = {label: number for number, label in config.id2label.items()}
    build(getattr(transformers, class_name), config).save_pretrained(folder / "source")
    train_tokenizer("<bos> $A").save(str(folder / "source" / "tokenizer.json"))
    convert(folder / "source", folder / "classifier", dtype="float32")
    return folder / "classifier"
