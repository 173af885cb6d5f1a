"""What a caller hands in -> checked ragged token ids."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from funnel_engine.packing import Ints
from funnel_engine.text import TextConfig, Tokenize
from funnel_kernels.errors import InputError


class Ragged(NamedTuple):
    """Sequences one after another: sequence `b` is `ids[offsets[b]:offsets[b + 1]]`."""

    ids: Ints  # [total] int32
    offsets: Ints  # [B + 1] int32

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)

    def take(self, order: Ints) -> "Ragged":
        """The sequences of these indices, in this order."""
        lengths = self.lengths[order]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[order] - offsets[:-1], lengths)
        return Ragged(self.ids[index], offsets)


def holds_texts(inputs: Any) -> bool:
    """Whether these inputs are texts rather than token ids."""
    return isinstance(inputs, str) or (isinstance(inputs, Sequence) and any(isinstance(item, str) for item in inputs))


def read_inputs(
    inputs: Any,
    tokenize: Tokenize | None,
    text: TextConfig,
    *,
    prompt: str = "",
    vocab_size: int,
    max_length: int,
    truncate: bool = False,
) -> Ragged:
    """Accepts one text, a list of texts, a list of id sequences, or a tuple `(ids, offsets)` of integer arrays.

    Args:
        inputs: see above.
        tokenize: for texts; None if the checkpoint has no tokenizer.
        text: the ids that go before and after those of a text; token ids are taken as they are.
        prompt: put before every text.
        vocab_size: ids must lie in `[0, vocab_size)`.
        max_length: the most tokens a sequence may have.
        truncate: cut the end off what is longer (of a text, before its last id is added), instead of refusing it.

    Raises:
        InputError: anything that cannot be run, with the index of the first offender.
    """
    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, np.ndarray):
        inputs = list(np.atleast_1d(inputs))
    if isinstance(inputs, tuple) and len(inputs) == 2 and not holds_texts(inputs):
        if not all(hasattr(part, "dtype") for part in inputs):
            raise InputError(
                "a tuple of two is (ids, offsets), and both must be integer arrays; give two sequences as a list"
            )
        ragged = read_ragged(*inputs)
    elif not isinstance(inputs, Sequence) or isinstance(inputs, bytes):
        raise InputError(
            f"inputs of type {type(inputs).__name__} cannot be read; give a text, a list of texts, a list of token-id "
            "sequences, or a tuple (ids, offsets) of integer arrays"
        )
    elif len(inputs) == 0:
        raise InputError("the list of inputs is empty; give at least one text or sequence")
    elif holds_texts(inputs):
        ragged = join(read_texts(inputs, tokenize, text, prompt, max_length if truncate else None))
    else:
        ragged = join([read_ids(index, item) for index, item in enumerate(inputs)])
    if truncate and ragged.lengths.max() > max_length:
        ragged = join([ids[:max_length] for ids in np.split(ragged.ids, ragged.offsets[1:-1])])
    check_lengths(ragged.lengths, max_length)
    check_vocabulary(ragged, vocab_size)
    return ragged


def read_texts(
    texts: Any, tokenize: Tokenize | None, text: TextConfig, prompt: str, max_length: int | None
) -> list[Ints]:
    """The ids of texts, with those that the checkpoint puts before and after; cut to `max_length` if there is one."""
    if tokenize is None:
        raise InputError(
            "this checkpoint has no tokenizer, so it takes token ids only; put tokenizer.json or tokenizer.model "
            "beside the source checkpoint and convert again"
        )
    for index, item in enumerate(texts):
        if not isinstance(item, str):
            raise InputError(f"input {index} is a {type(item).__name__} among texts; give texts only, or ids only")
        if not item:
            raise InputError(f"input {index} is an empty text; leave it out")
        try:
            item.encode()
        except UnicodeEncodeError:
            message = f"input {index} holds half of a surrogate pair, which is no character; decode it anew"
            raise InputError(message) from None
    begin = [text.begin] if text.begin is not None else []
    end = [text.end] if text.end is not None else []
    room = None if max_length is None else max(0, max_length - len(begin) - len(end))
    return [
        to_int32(f"input {index}", np.asarray(begin + ids[:room] + end, np.int64))
        for index, ids in enumerate(tokenize([prompt + item for item in texts]))
    ]


def read_ids(index: int, item: Any) -> Ints:
    """One sequence of token ids."""
    try:
        ids = np.asarray(item)
    except ValueError:  # nested lists of unequal lengths
        raise InputError(f"input {index} is not a flat sequence of token ids") from None
    if ids.ndim == 0:
        raise InputError(f"input {index} is {item!r:.40}, no sequence of token ids; one sequence is [[2, 5, 7]]")
    if ids.ndim != 1:
        raise InputError(f"input {index} has {ids.ndim} axes; a sequence of token ids has one")
    if ids.size == 0:
        raise InputError(f"input {index} is an empty sequence; give at least one token id")
    return to_int32(f"input {index}", ids)


def read_ragged(ids: Any, offsets: Any) -> Ragged:
    """The pair (ids [total], offsets [B + 1]), also known as cumulative sequence lengths."""
    ids, offsets = to_int32("ids", np.asarray(ids)), to_int32("offsets", np.asarray(offsets))
    if ids.ndim != 1 or offsets.ndim != 1:
        raise InputError(f"ids and offsets have {ids.ndim} and {offsets.ndim} axes; both have one")
    if offsets.size < 2:
        raise InputError(f"offsets has {offsets.size} entries; it needs one more than there are sequences, at least 2")
    if offsets[0] != 0:
        raise InputError(f"offsets starts at {offsets[0]}; it must start at 0")
    falling = np.flatnonzero(np.diff(offsets) < 0)
    if falling.size:
        at = falling[0]
        raise InputError(f"offsets decreases from {offsets[at]} to {offsets[at + 1]} at entry {at + 1}; it must grow")
    if offsets[-1] != ids.size:
        raise InputError(f"offsets ends at {offsets[-1]} but there are {ids.size} ids; it must end there")
    return Ragged(ids, offsets)


def join(sequences: list[Ints]) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])]).astype(np.int32)
    return Ragged(np.concatenate(sequences), offsets)


def to_int32(name: str, array: np.ndarray) -> Ints:
    if array.dtype.kind not in "iu":
        nan = " (it holds NaN)" if array.dtype.kind == "f" and np.isnan(array).any() else ""
        raise InputError(f"{name} has dtype {array.dtype}{nan}; it must be an integer array")
    limits = np.iinfo(np.int32)
    if array.size and (array.max() > limits.max or array.min() < limits.min):
        raise InputError(f"{name} holds {array.min()} ... {array.max()}, beyond int32; no vocabulary is that large")
    return array.astype(np.int32, copy=False)


def check_lengths(lengths: Ints, max_length: int) -> None:
    index = int(np.argmin(lengths))
    if lengths[index] == 0:
        raise InputError(f"input {index} is an empty sequence; give at least one token id")
    index = int(np.argmax(lengths))
    if lengths[index] > max_length:
        raise InputError(
            f"input {index} has {lengths[index]} tokens, more than the limit of {max_length} (the smallest of the "
            "model's max_positions, its checkpoint's max_tokens and the engine's max_batch_tokens); shorten it, cut "
            "its end off with truncate=True, or raise max_batch_tokens"
        )


def check_vocabulary(ragged: Ragged, vocab_size: int) -> None:
    bad = np.flatnonzero((ragged.ids < 0) | (ragged.ids >= vocab_size))
    if bad.size:
        index = int(np.searchsorted(ragged.offsets, bad[0], side="right")) - 1
        raise InputError(
            f"input {index} holds token id {ragged.ids[bad[0]]}; ids lie in 0 ... {vocab_size - 1}. "
            "Was it made by another model's tokenizer?"
        )
