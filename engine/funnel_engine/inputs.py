"""Converts the inputs of a call to ragged token ids, and checks them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from funnel_engine.packing import Ints
from funnel_engine.pairs import Cut, join_pairs
from funnel_engine.text import TextConfig, Tokenize
from funnel_kernels.errors import InputError

FIRST_TYPE = LARGEST_TYPE = 2  # of a token: 0 and 1 for the two texts of a pair, 2 for [CLS]


class Ragged(NamedTuple):
    """Sequences of token ids, one after another: sequence `b` is `ids[offsets[b]:offsets[b + 1]]`."""

    ids: Ints  # [total] int32
    offsets: Ints  # [B + 1] int32
    types: Ints | None = None  # [total] int32, of the tokens; None is 0 for all of them

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)

    def take(self, order: Ints) -> "Ragged":
        """The sequences with these indices, in this order."""
        lengths = self.lengths[order]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[order] - offsets[:-1], lengths)
        return Ragged(self.ids[index], offsets, None if self.types is None else self.types[index])

    def cut(self, max_length: int) -> "Ragged":
        """The sequences without the tokens after the first `max_length`."""
        kept = np.arange(len(self.ids)) - np.repeat(self.offsets[:-1], self.lengths) < max_length
        offsets = np.concatenate([[0], np.cumsum(np.minimum(self.lengths, max_length))]).astype(np.int32)
        return Ragged(self.ids[kept], offsets, None if self.types is None else self.types[kept])


class TooLong(InputError):
    """An input has more tokens than the limit of the engine."""

    def __init__(self, index: int, tokens: int, limit: int):
        super().__init__(
            f"input {index} has {tokens} tokens, more than the limit of {limit} (the smallest of the model's "
            "max_positions, its checkpoint's max_tokens and the engine's max_batch_tokens); shorten it, cut off "
            "its end with truncate=True, or raise max_batch_tokens"
        )
        self.index, self.tokens, self.limit = index, tokens, limit


def read_inputs(
    inputs: Any,
    tokenize: Tokenize | None,
    text: TextConfig,
    *,
    prompt_name: str | None = None,
    vocab_size: int,
    max_length: int,
    truncate: bool = False,
    token_types: bool = False,
) -> Ragged:
    """Accepts one text, several texts, sequences of token ids, or a tuple `(ids, offsets)` of integer arrays.

    Several texts or sequences are a list, a tuple, or anything that NumPy can convert to an array, e.g. arrays of
    PyTorch and JAX and columns of pandas. In a list, a tuple of two texts is a pair, which tokenizer.json joins.

    Args:
        inputs: see above.
        tokenize: the tokenizer for texts; None if the checkpoint has none.
        text: the prompts, and the ids to put before and after the ids of a text. Token ids are not changed.
        prompt_name: the name of the prompt to put before every text.
        vocab_size: ids must be in `[0, vocab_size)`.
        max_length: the largest number of tokens of a sequence.
        truncate: cut off the end of longer inputs (of a text, before its last id is added; of a pair, as `Cut` says),
            instead of raising.
        token_types: whether tokens of texts get types.

    Raises:
        InputError: an input cannot be run; the message contains the index of the first such input.
    """
    prompt = text.prompt(prompt_name)
    items = list_items(inputs)
    has_pairs = any(is_pair(item) for item in items)
    is_texts = any(isinstance(item, str) for item in items) and not has_pairs
    if prompt_name is not None and has_pairs:
        raise InputError(f"prompt_name={prompt_name!r} is for single texts; put the prompt into the texts of the pairs")
    if prompt_name is not None and not is_texts:
        raise InputError(
            f"prompt_name={prompt_name!r} needs texts; token ids must already begin with the ids of the prompt"
        )
    if is_texts:
        ragged = join(read_texts(items, tokenize, text, prompt, max_length if truncate else None))
        if token_types:
            types = np.zeros(len(ragged.ids), np.int32)
            if text.begin is not None:
                types[ragged.offsets[:-1]] = FIRST_TYPE
            ragged = ragged._replace(types=types)
    elif has_pairs:
        ragged = read_pairs(items, tokenize, text, max_length if truncate else None, token_types)
    elif isinstance(inputs, tuple) and len(inputs) == 2:
        if not all(hasattr(part, "dtype") for part in inputs):
            raise InputError(
                "a tuple of two means (ids, offsets), and both must be integer arrays; give two sequences as a list"
            )
        ragged = read_ragged(*inputs)
    elif isinstance(inputs, Ragged):
        ragged = read_ragged(*inputs[:2])
        if inputs.types is not None:
            ragged = ragged._replace(types=read_types(inputs.types, ragged))
    else:
        ragged = join([read_ids(index, item) for index, item in enumerate(items)])
    if truncate and ragged.lengths.max() > max_length:
        ragged = ragged.cut(max_length)
    check_lengths(ragged.lengths, max_length)
    check_vocabulary(ragged, vocab_size)
    return ragged


def list_items(inputs: Any) -> Sequence[Any]:
    """The inputs as a sequence of texts or of token-id sequences."""
    if isinstance(inputs, str):
        return [inputs]
    if hasattr(inputs, "__array__"):
        inputs = list(np.atleast_1d(to_array("the array of inputs", inputs)))
    if not isinstance(inputs, Sequence) or isinstance(inputs, (bytes, bytearray, memoryview)):
        raise InputError(
            f"inputs of type {type(inputs).__name__} cannot be read; give a text, a list of texts or pairs of texts, a "
            "list of token-id sequences, or a tuple (ids, offsets) of integer arrays"
        )
    if len(inputs) == 0:
        raise InputError("the list of inputs is empty; give at least one text or sequence")
    return inputs


def read_texts(
    texts: Any, tokenize: Tokenize | None, text: TextConfig, prompt: str, max_length: int | None
) -> list[Ints]:
    """The ids of texts, with the ids that the checkpoint adds before and after; cut to `max_length` if given."""
    if tokenize is None:
        raise InputError(
            "this checkpoint has no tokenizer, so it takes token ids only; put tokenizer.json or tokenizer.model "
            "into the folder of the source checkpoint and convert it again"
        )
    for index, item in enumerate(texts):
        check_text(index, item)
    begin = [text.begin] if text.begin is not None else []
    end = [text.end] if text.end is not None else []
    room = None if max_length is None else max(0, max_length - len(begin) - len(end))
    return [
        to_int32(f"input {index}", np.asarray(begin + ids[:room] + end, np.int64))
        for index, ids in enumerate(tokenize([prompt + item for item in texts]))
    ]


def is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and any(isinstance(text, str) for text in item)


def read_pairs(
    items: Any, tokenize: Tokenize | None, text: TextConfig, max_length: int | None, token_types: bool
) -> Ragged:
    """Pairs of texts, and texts between them; cut to `max_length` if given."""
    for index, item in enumerate(items):
        for part in item if is_pair(item) else [item]:
            check_text(index, part)
    joined = join_pairs(items, tokenize, text)
    cut = None if max_length is None else Cut(max_length)
    kept = [slice(None) if cut is None or len(each.ids) <= cut.tokens else cut.kept(each.texts) for each in joined]
    ragged = join([each.ids[some] for each, some in zip(joined, kept, strict=True)])
    if not token_types:
        return ragged
    return ragged._replace(types=np.concatenate([each.types[some] for each, some in zip(joined, kept, strict=True)]))


def check_text(index: int, text: Any) -> None:
    """Raises `InputError` unless this is a text that a tokenizer can read; `index` is that of the input."""
    if not isinstance(text, str):
        raise InputError(
            f"input {index} is a {type(text).__name__}, but other inputs are texts; give only texts, or only ids"
        )
    if not text:
        raise InputError(f"input {index} is an empty text; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"input {index} contains half of a surrogate pair, which is not a character; decode the text again"
        raise InputError(message) from None


def read_ids(index: int, item: Any) -> Ints:
    """One sequence of token ids."""
    ids = to_array(f"input {index}", item)
    if ids.ndim == 0:
        raise InputError(
            f"input {index} is {item!r:.40}, not a sequence of token ids; write a single sequence as [[2, 5, 7]]"
        )
    if ids.size == 0:
        raise InputError(f"input {index} is an empty sequence; give at least one token id")
    ids = to_int32(f"input {index}", ids)
    if ids.ndim != 1:
        raise InputError(f"input {index} has {ids.ndim} axes; a sequence of token ids must have one")
    return ids


def read_ragged(ids: Any, offsets: Any) -> Ragged:
    """The pair (ids [total], offsets [B + 1]), also known as cumulative sequence lengths."""
    ids, offsets = to_int32("ids", to_array("ids", ids)), to_int32("offsets", to_array("offsets", offsets))
    if ids.ndim != 1 or offsets.ndim != 1:
        raise InputError(f"ids and offsets have {ids.ndim} and {offsets.ndim} axes; both must have one")
    if offsets.size < 2:
        raise InputError(
            f"offsets has {offsets.size} entries; it must have one more than there are sequences, at least 2"
        )
    if offsets[0] != 0:
        raise InputError(f"offsets starts at {offsets[0]}; it must start at 0")
    falling = np.flatnonzero(np.diff(offsets) < 0)
    if falling.size:
        at = falling[0]
        raise InputError(
            f"offsets decreases from {offsets[at]} to {offsets[at + 1]} at entry {at + 1}; it must not decrease"
        )
    if offsets[-1] != ids.size:
        raise InputError(f"offsets ends at {offsets[-1]}; it must end at the number of ids, {ids.size}")
    return Ragged(ids, offsets)


def read_types(types: Any, ragged: Ragged) -> Ints:
    """The token types of a tuple (ids, offsets, types)."""
    types = to_int32("types", to_array("types", types))
    if types.shape != ragged.ids.shape:
        raise InputError(
            f"types has shape {types.shape}; it must have one number for each of the {ragged.ids.size} ids"
        )
    if types.size and (types.min() < 0 or types.max() > LARGEST_TYPE):
        raise InputError(f"types are from {types.min()} to {types.max()}; they must be from 0 to {LARGEST_TYPE}")
    return types


def join(sequences: list[Ints]) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])]).astype(np.int32)
    return Ragged(np.concatenate(sequences), offsets)


def to_array(name: str, value: Any) -> np.ndarray:
    """Converts a list, or an array of any library, to a NumPy array."""
    try:
        return np.asarray(value)
    except ValueError:  # nested lists of unequal lengths
        raise InputError(f"{name} is not a flat sequence of token ids") from None
    except jax.errors.TracerArrayConversionError:
        raise InputError(
            f"{name} is traced by jax.jit or another transformation of JAX, so it has no values; call the engine "
            "outside of the transformed function"
        ) from None
    except Exception as error:  # raised by the array's library, e.g. because the array is on an accelerator
        raise InputError(
            f"{name}, of type {type(value).__name__}, cannot be read as a NumPy array ({error!s:.200}); copy it to the "
            "host first"
        ) from error


def to_int32(name: str, array: np.ndarray) -> Ints:
    if array.dtype.kind in "USTO" and any(isinstance(value, (str, bytes)) for value in array.flat):
        raise InputError(
            f"{name} contains several texts where token ids are needed; give texts in one flat list, and a pair of "
            "texts as a tuple of two"
        )
    if array.dtype.kind not in "iu":
        nan = " (it contains NaN)" if array.dtype.kind == "f" and np.isnan(array).any() else ""
        raise InputError(f"{name} has dtype {array.dtype}{nan}; it must be an integer array")
    limits = np.iinfo(np.int32)
    if array.size and (array.max() > limits.max or array.min() < limits.min):
        raise InputError(f"{name} has values from {array.min()} to {array.max()}; they must be in the range of int32")
    return array.astype(np.int32, copy=False)


def check_lengths(lengths: Ints, max_length: int) -> None:
    index = int(np.argmin(lengths))
    if lengths[index] == 0:
        raise InputError(f"input {index} is an empty sequence; give at least one token id")
    index = int(np.argmax(lengths))
    if lengths[index] > max_length:
        raise TooLong(index, int(lengths[index]), max_length)


def check_vocabulary(ragged: Ragged, vocab_size: int) -> None:
    bad = np.flatnonzero((ragged.ids < 0) | (ragged.ids >= vocab_size))
    if bad.size:
        index = int(np.searchsorted(ragged.offsets, bad[0], side="right")) - 1
        raise InputError(
            f"input {index} holds token id {ragged.ids[bad[0]]}; ids must be from 0 to {vocab_size - 1}. "
            "Use the tokenizer of this model"
        )
