"""The inputs of a request become token ids that the engine runs, cut to a limit if that is asked for."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from funnel_engine import Engine, InputError
from funnel_engine.inputs import Ragged, TooLong, check_lengths, join, read_inputs
from funnel_engine.packing import Ints
from funnel_engine.pairs import ADDED, Cut, Joined, NoPairs, join_pairs
from funnel_engine.text import JsonTokenizer, UnreadableText
from funnel_serving.answers import Inputs, Texts, Token, TokenIds
from funnel_serving.refusals import Refusal

UNLIMITED = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """What the engine runs, and how many inputs were cut.

    Attributes:
        kept: for each input, which of its tokens remain; None if all of them do.
    """

    inputs: Ragged
    kept: Sequence[Ints | None]

    @property
    def truncated(self) -> int:
        return sum(kept is not None for kept in self.kept)


def read_request(
    engine: Engine,
    inputs: Inputs,
    *,
    prompt_name: str | None = None,
    cut: Cut | None = None,
) -> Tokenized:
    """The token ids of texts, of texts and pairs of texts, or ids as they are. None as `cut` refuses what is too long.

    Raises:
        Refusal: an input cannot be run.
    """
    if len(inputs) == 0:
        raise Refusal("empty", "there are no inputs; send at least one")
    for index, item in enumerate(inputs):
        if len(item) == 0 or (isinstance(item, tuple) and not all(item)):
            raise Refusal("empty", f"input {index} is empty; leave it out")
    try:
        if any(isinstance(item, tuple) for item in inputs):
            joined = join_pairs(inputs, engine.tokenizer, engine.text)
        else:
            joined = read_singles(engine, inputs, prompt_name)
        too_long = [cut is not None and len(each.ids) > cut.tokens for each in joined]
        kept = [cut.kept(each.texts) if cut and long else None for each, long in zip(joined, too_long, strict=True)]
        ragged = join(select([each.ids for each in joined], kept))
        if engine.config.token_types:
            ragged = ragged._replace(types=np.concatenate(select([each.types for each in joined], kept)))
        check_lengths(ragged.lengths, engine.max_length)
    except TooLong as error:
        raise Refusal.invalid(
            f"input {error.index} has {error.tokens} tokens, more than the limit of {error.limit}; shorten it, or ask "
            "the server to truncate it"
        ) from error
    except UnreadableText as error:
        raise Refusal("tokenization", str(error)) from error
    except NoPairs as error:
        raise Refusal("unsupported", str(error)) from error
    except InputError as error:
        raise Refusal.invalid(str(error)) from error
    return Tokenized(ragged, kept)


def select(sequences: Sequence[Ints], kept: Sequence[Ints | None]) -> list[Ints]:
    """Of each sequence the part that is kept; None is all of it."""
    return [each if some is None else each[some] for each, some in zip(sequences, kept, strict=True)]


def read_singles(engine: Engine, inputs: Inputs, prompt_name: str | None) -> list[Joined]:
    """The tokens of texts, or ids as they are."""
    if engine.tokenizer is None and isinstance(inputs[0], str):
        raise Refusal("unsupported", "this checkpoint has no tokenizer; send token ids")
    read = read_inputs(
        inputs,
        engine.tokenizer,
        engine.text,
        prompt_name=prompt_name,
        vocab_size=engine.config.vocab_size,
        max_length=UNLIMITED,
        token_types=engine.config.token_types,
    )
    texts = np.zeros(len(read.ids), np.int32)
    if isinstance(inputs[0], str):
        if engine.text.begin is not None:
            texts[read.offsets[:-1]] = ADDED
        if engine.text.end is not None:
            texts[read.offsets[1:] - 1] = ADDED
    types = np.zeros(len(read.ids), np.int32) if read.types is None else read.types
    return list(map(Joined, *(np.split(each, read.offsets[1:-1]) for each in (read.ids, texts, types))))


def describe_tokens(
    engine: Engine, inputs: Texts, *, add_special_tokens: bool = True, prompt_name: str | None = None
) -> list[list[Token]]:
    """What each token of texts is, in the order in which the engine runs them.

    Raises:
        Refusal: the checkpoint has no tokenizer.json, or no such prompt, or the tokenizer cannot read a text.
    """
    tokenizer = tokenizer_of(engine)
    try:
        prompt = engine.text.prompt(prompt_name)
        with tokenizer.reading():
            encodings = tokenizer.tokenizer.encode_batch([prompt + text for text in inputs], add_special_tokens=False)
    except UnreadableText as error:
        raise Refusal("tokenization", str(error)) from error
    except InputError as error:
        raise Refusal.invalid(str(error), param="prompt_name") from error
    begin, end = (
        [Token(added, str(tokenizer.tokenizer.id_to_token(added)), True, None, None)]
        if add_special_tokens and added is not None
        else []
        for added in (engine.text.begin, engine.text.end)
    )
    described = []
    for encoding in encodings:
        tokens = []
        for number, text, (start, stop) in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True):
            is_prompt = stop <= len(prompt) and prompt
            place = (None, None) if is_prompt else (max(0, start - len(prompt)), stop - len(prompt))
            tokens.append(Token(number, text, False, *place))
        described.append([*begin, *tokens, *end])
    return described


def decode(engine: Engine, ids: TokenIds, *, skip_special_tokens: bool) -> list[str]:
    """The text of each list of ids.

    Raises:
        Refusal: there is no tokenizer.json, or an id is not in the vocabulary.
    """
    tokenizer = tokenizer_of(engine)
    last = engine.config.vocab_size - 1
    for index, sequence in enumerate(ids):
        if wrong := [number for number in sequence if not 0 <= number <= last]:
            raise Refusal.invalid(f"ids {index} has {wrong[0]}; ids must be from 0 to {last}", param="ids")
    texts: list[str] = tokenizer.tokenizer.decode_batch(ids, skip_special_tokens=skip_special_tokens)
    return texts


def tokenizer_of(engine: Engine) -> JsonTokenizer:
    if not isinstance(engine.tokenizer, JsonTokenizer):
        raise Refusal("unsupported", "this needs a checkpoint with tokenizer.json; convert one that has it")
    return engine.tokenizer
