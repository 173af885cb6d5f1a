"""Tagged words in CoNLL columns: F1 of the spans that the checkpoint's token classifier finds."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from funnel_engine import Engine
from funnel_engine.inputs import Ragged, TooLong, join
from funnel_engine.messages import quote
from funnel_kernels.errors import ConfigError, InputError
from funnel_training.data_files import hashes, read_file
from funnel_training.scores import Ints, RatioOfSums, Score
from funnel_training.statistics import check_units
from funnel_training.tasks.labels import finite_logits
from funnel_training.tasks.task import Side, Task

Span = tuple[int, int, str]  # first word, word after the last, type
TAG = re.compile(r"O|[BIES]-.+")
DOCUMENT_START = "-DOCSTART-"  # a line of CoNLL-2003 between documents


class WordTokens(NamedTuple):
    """Tokenized sentences, and for each of them where the first token of each word is."""

    ids: Ragged
    first_tokens: list[Ints]

    @property
    def lengths(self) -> Ints:
        return self.ids.lengths


@dataclasses.dataclass(frozen=True)
class Tags(Task):
    """Sentences of words. A word has the label of its first token."""

    words: tuple[tuple[str, ...], ...]
    tags: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]  # of the checkpoint's classifier, or of the file
    kind: ClassVar[str] = "tags"
    unit: ClassVar[str] = "sentences"
    per_token: ClassVar[bool] = True

    @property
    def units(self) -> int:
        return len(self.words)

    def take(self, units: Ints, share: float) -> "Tags":
        words, tags = (tuple(values[unit] for unit in units) for values in (self.words, self.tags))
        return dataclasses.replace(self, sides=(self.sides[0].take(units),), words=words, tags=tags)

    def inputs(self, engine: Engine, truncate: bool) -> list[WordTokens]:
        """Words are tokenized one by one; all but the first of a sentence have a space in front of them."""
        if truncate:
            raise ConfigError("tagged sentences cannot be cut, because every word has a tag; leave truncate out")
        if engine.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer, which tags need; convert it again with its tokenizer")
        before = [] if engine.text.begin is None else [engine.text.begin]
        after = [] if engine.text.end is None else [engine.text.end]
        sequences, first_tokens = [], []
        for words, place in zip(self.words, self.sides[0].places, strict=True):
            ids = engine.tokenizer([words[0], *(f" {word}" for word in words[1:])])
            if [] in ids:
                raise InputError(
                    f"{place}: the word {words[ids.index([])]!r:.40} has no tokens; leave the sentence out"
                )
            sequences.append(np.array(sum(ids, before) + after, np.int32))
            first_tokens.append(len(before) + np.cumsum([0, *map(len, ids[:-1])]))
        try:
            return [WordTokens(engine.token_ids(join(sequences)), first_tokens)]
        except TooLong as error:
            raise InputError(
                f"{self.sides[0].places[error.index]}: the sentence has {error.tokens} tokens, more than the limit of "
                f"{error.limit}; split it"
            ) from error

    def run(self, engine: Engine, inputs: WordTokens) -> list[np.ndarray]:
        """For each sentence the label of each word, as its index."""
        logits = engine.tag(inputs.ids)
        return [
            finite_logits(rows[first]).argmax(axis=1) for rows, first in zip(logits, inputs.first_tokens, strict=True)
        ]

    def scores(self, outputs: list[Any], baseline: list[Any]) -> dict[str, Score]:
        counts = []  # right, predicted and gold spans; right words and words; of each sentence
        for predicted, tags in zip(outputs[0], self.tags, strict=True):
            words = [self.labels[index] for index in predicted]
            found, gold = spans(words), spans(tags)
            right_words = sum(word == tag for word, tag in zip(words, tags, strict=True))
            counts.append((len(found & gold), len(found), len(gold), right_words, len(tags)))
        right, found_spans, gold_spans, right_words, all_words = np.array(counts, np.float64).T
        return {
            "span F1": RatioOfSums(2 * right, found_spans + gold_spans),
            "word accuracy": RatioOfSums(right_words, all_words),
        }


def read_tags(path: Path, labels: Sequence[str] = ()) -> Tags:
    """Reads CoNLL columns: a word first and its tag last in each line, and a blank line between sentences.

    Args:
        labels: those of the checkpoint's token classifier; () are those of the file. Spans are marked as IOB2 or IOBES:
            B-X, I-X, E-X, S-X, O.

    Raises:
        InputError: a line has one column, a tag is unknown, no word has a span, or there are too few sentences.
    """
    file = read_file(path)
    sentences: list[tuple[str, list[str], list[str]]] = []  # the place, words and tags
    begins = True
    for number, line in enumerate(file.text.split("\n"), start=1):
        columns, place = line.split(), f"{path.name}, line {number}"
        if not columns or columns[0] == DOCUMENT_START:
            begins = True
            continue
        if len(columns) < 2:
            raise InputError(f"{place} has one column; it must have a word first and its tag last")
        word, tag = columns[0], columns[-1]
        if not TAG.fullmatch(tag):
            raise InputError(
                f"{place}: tag {tag!r:.40} must be O, or B, I, E or S with a hyphen and a type, as in B-PER"
            )
        if labels and tag not in labels:
            raise InputError(f"{place}: tag {tag!r:.40} is not one of the checkpoint's labels: {quote(labels)}")
        if begins:
            sentences.append((place, [], []))
            begins = False
        sentences[-1][1].append(word)
        sentences[-1][2].append(tag)
    distinct: dict[tuple[str, ...], tuple[str, list[str], list[str]]] = {}
    for sentence in sentences:
        distinct.setdefault(tuple(sentence[1]), sentence)
    check_units(len(distinct), f"different sentences in {path.name}")
    places, words, tags = zip(*distinct.values(), strict=True)
    if not any(map(spans, tags)):
        raise InputError(f"{path.name} has no span: every tag is O; give sentences with spans")
    side = Side("sentences", [" ".join(sentence) for sentence in words], places)
    return Tags(
        files=hashes(file),
        duplicates=len(sentences) - len(distinct),
        sides=(side,),
        words=tuple(map(tuple, words)),
        tags=tuple(map(tuple, tags)),
        labels=tuple(labels) or tuple(sorted(set().union(*tags))),
    )


def spans(tags: Sequence[str]) -> set[Span]:
    """The spans of one sentence. As in conlleval, a span also begins at an I or E that continues nothing."""
    found, first, kind = set(), None, ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, tag_kind = tag.partition("-")
        if first is not None and (prefix not in "IE" or tag_kind != kind):
            found.add((first, index, kind))
            first = None
        if prefix != "O" and first is None:
            first, kind = index, tag_kind
        if prefix in "ES" and first is not None:
            found.add((first, index + 1, kind))
            first = None
    return found
