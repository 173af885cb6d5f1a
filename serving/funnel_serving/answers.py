"""What the service returns to a route."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

Texts = Sequence[str]
Pairs = Sequence[tuple[str, str]]
TokenIds = Sequence[Sequence[int]]
Inputs = Sequence[str | tuple[str, str] | Sequence[int]]  # any of these, or texts and pairs together


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the time of one request went, in seconds."""

    tokenization: float
    queue: float
    inference: float


class Token(NamedTuple):
    """A token, and the characters of the text that it covers.

    Attributes:
        id: its id.
        text: the token as the tokenizer's vocabulary writes it.
        special: whether it is not from the text, e.g. BOS.
        start, stop: the characters `text[start:stop]` of the input; None for special tokens and those of the prompt.
    """

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """The results of one request, in the order of its inputs.

    Attributes:
        results: [B, D] float32, one row per input; for `rows` and `tag` a list of one array per input.
        token_counts: the number of tokens of each input that were run, with those that the checkpoint adds.
        truncated: how many inputs were cut.
        timing: where the time went.
        tokens: for `tag` of texts, the tokens of each input, one for each row of its result; else empty.
    """

    results: Any
    token_counts: list[int]
    truncated: int
    timing: Timing
    tokens: Sequence[Sequence[Token]] = ()
