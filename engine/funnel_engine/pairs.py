"""Pairs of texts, which the rule of a tokenizer.json joins to one sequence, and where such a sequence is cut."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from funnel_engine.packing import Ints
from funnel_engine.text import JsonTokenizer, TextConfig, Tokenize
from funnel_kernels.errors import InputError

ADDED = -1  # instead of the number of a text: the token is one that the checkpoint adds


class NoPairs(InputError):
    """A checkpoint has no rule for pairs of texts."""


class Joined(NamedTuple):
    """The tokens of a pair of texts, or of a single text.

    Attributes:
        ids: [T].
        texts: [T], for each token 0 or 1 for the text that it is from, or `ADDED`.
        types: [T], the token types that the rule gives them.
    """

    ids: Ints
    texts: Ints
    types: Ints


@dataclasses.dataclass(frozen=True)
class Cut:
    """How inputs that are too long are cut: to how many tokens, and whether the beginning is cut off or the end."""

    tokens: int
    from_left: bool = False

    def kept(self, texts: Ints) -> Ints:
        """The indices of the tokens that remain of one input.

        The tokens that the checkpoint adds remain. Of a pair of texts the longer one is cut until both are equally
        long, as in transformers.

        Args:
            texts: for each token, 0 or 1 for the text of the pair that it is from, or `ADDED`.
        """
        first, second = np.flatnonzero(texts == 0), np.flatnonzero(texts == 1)
        room = max(0, self.tokens - int((texts == ADDED).sum()))
        of_second = min(len(second), max(room // 2, room - len(first)))
        parts = [(first, min(len(first), room - of_second)), (second, of_second)]
        kept = [part[len(part) - count :] if self.from_left else part[:count] for part, count in parts]
        return np.sort(np.concatenate([np.flatnonzero(texts == ADDED), *kept]))[: self.tokens]


def join_pairs(items: Sequence[Any], tokenize: Tokenize | None, text: TextConfig) -> list[Joined]:
    """The tokens of pairs of texts, and of texts between them.

    Raises:
        NoPairs: there is no tokenizer.json, or it does not have the rules of the checkpoint.
        UnreadableText: the tokenizer fails.
    """
    if not isinstance(tokenize, JsonTokenizer):
        raise NoPairs("pairs of texts need a checkpoint with tokenizer.json; convert one that has it")
    begin, end = ([] if added is None else [added] for added in (text.begin, text.end))
    tokenizer = tokenize.tokenizer
    with tokenize.reading():
        probe = tokenizer.encode("a").ids
        if probe != [*begin, *tokenizer.encode("a", add_special_tokens=False).ids, *end]:
            raise NoPairs(
                "the rules of this checkpoint for single texts differ from those of its tokenizer.json, so there is no "
                "rule for pairs of texts; join each pair to one text as the model was trained"
            )
        encodings = tokenizer.encode_batch(list(items))
    return [
        Joined(
            np.array(encoding.ids, np.int32),
            np.array([ADDED if number is None else number for number in encoding.sequence_ids], np.int32),
            np.array(encoding.type_ids, np.int32),
        )
        for encoding in encodings
    ]
