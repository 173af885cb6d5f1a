"""The tasks of the study, as files that `finetune` reads: coarse genres, and parts of speech."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from funnel_training.miniature.brown import GROUPS, Document, Word, text_of
from funnel_training.tasks.labels import read_labels
from funnel_training.tasks.tags import read_tags
from funnel_training.tasks.task import Task

SENTENCES = 2  # of a text to classify
MOST_WORDS = 50  # of a sentence; longer ones are left out


def write_groups(path: Path, documents: Sequence[Document], units: int) -> None:
    """Writes texts of neighbouring sentences, labelled with the coarse genre; the same number for each genre."""
    texts: dict[str, list[str]] = {group: [] for group in GROUPS}
    for document in documents:
        sentences = short(document)
        for start in range(0, len(sentences) - SENTENCES + 1, SENTENCES):
            texts[document.group].append(" ".join(map(text_of, sentences[start : start + SENTENCES])))
    generator = np.random.default_rng(0)
    chosen = [
        {"text": texts[group][index], "label": group}
        for group in texts
        for index in generator.permutation(len(texts[group]))[: units // len(GROUPS)]
    ]
    lines = [json.dumps(chosen[index]) for index in generator.permutation(len(chosen))]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_tags(path: Path, documents: Sequence[Document], units: int) -> None:
    """Writes sentences in columns, a word and its part of speech; each word is a span of its own."""
    sentences = [sentence for document in documents for sentence in short(document)]
    chosen = np.random.default_rng(0).permutation(len(sentences))[:units]
    blocks = ["".join(f"{word.text}\tB-{word.tag}\n" for word in sentences[index]) for index in chosen]
    path.write_text("\n".join(blocks), encoding="utf-8")


def short(document: Document) -> list[list[Word]]:
    return [sentence for sentence in document.sentences if len(sentence) <= MOST_WORDS]


@dataclasses.dataclass(frozen=True)
class TaskForm:
    """How a task is written, learned and scored."""

    file: str
    form: str  # of `finetune`
    score: str  # of `Task.scores`
    pooling: str | None
    write: Callable[[Path, Sequence[Document], int], None]
    read: Callable[[Path, Sequence[str]], Task]


TASKS = {
    "groups": TaskForm("groups.jsonl", "labels", "accuracy", "attention", write_groups, read_labels),
    "tags": TaskForm("tags.txt", "tags", "word accuracy", None, write_tags, read_tags),
}
