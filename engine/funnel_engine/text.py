"""The preparation of texts for the encoder: prompt, tokenizer, begin and end of sequence, length limit."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funnel_engine import input_files
from funnel_engine.checks import check_positive
from funnel_engine.messages import abbreviate
from funnel_kernels.errors import CheckpointError, ConfigError, FunnelError, InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A tokenizer is a function from texts to the ids of each text, without begin or end of sequence.
Tokenize = Callable[[Sequence[str]], list[list[int]]]

MAX_FILE_BYTES = 500_000_000  # the limit for a tokenizer; Gemma 3's has 33 MB
FETCH_AGAIN = "Fetch it again, or convert without it to get a checkpoint that takes token ids only"
REPAIR = "Repair the tokenizer; most likely its vocabulary lacks the unknown token"


class UnreadableText(InputError):
    """The tokenizer fails on a text."""


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How a checkpoint prepares its texts.

    Attributes:
        begin: the id before the ids of every text (BOS), or None.
        end: the id after them (EOS), or None.
        max_tokens: the largest number of tokens of a text, with begin and end; None if only the encoder limits it.
        prompts: texts to put before an input, by name.
        default_prompt_name: the prompt of calls that do not name one.
    """

    begin: int | None = None
    end: int | None = None
    max_tokens: int | None = None
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    default_prompt_name: str | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_positive("max_tokens", self.max_tokens)
        if self.default_prompt_name not in (None, *self.prompts):
            known = ", ".join(abbreviate(self.prompts)) or "none"
            raise ConfigError(f"default_prompt_name={self.default_prompt_name!r} is not one of the prompts: {known}")

    def prompt(self, name: str | None) -> str:
        """The text of a prompt; None means the default prompt.

        Raises:
            InputError: the prompt does not exist.
        """
        if name is None:
            name = self.default_prompt_name
        if name is not None and name not in tuple(self.prompts):
            known = ", ".join(abbreviate(self.prompts)) or "none"
            raise InputError(f"prompt_name={name!r} is unknown; this checkpoint's prompts: {known}")
        return "" if name is None else self.prompts[name]


def read_tokenizer(file: Path) -> Tokenize:
    """Loads a tokenizer.json with the tokenizers library, or a SentencePiece model with sentencepiece.

    Raises:
        CheckpointError: the file is damaged, or sentencepiece is not installed.
    """
    return JsonTokenizer(file) if file.suffix == ".json" else read_sentencepiece(file)


class JsonTokenizer:
    """A tokenizer.json as a function, see `Tokenize`; `tokenizer` has the rest of what it can do, e.g. decode."""

    def __init__(self, file: Path):
        self.file = file
        self.tokenizer, _ = load_tokenizer_json(file)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        with self.reading():
            encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def reading(self) -> AbstractContextManager[None]:
        """A context in which an exception of the tokenizers library becomes `UnreadableText`."""
        return raising(UnreadableText, f"{self.file} cannot read these texts", REPAIR)


def load_tokenizer_json(file: Path) -> tuple["Tokenizer", dict[str, Any] | None]:
    """A tokenizer that neither pads nor truncates, and the truncation settings of its file."""
    from tokenizers import Tokenizer  # imported here: an engine for token ids does not need it

    check_file(file)
    with raising(CheckpointError, f"{file} is not a tokenizer that the tokenizers library reads", FETCH_AGAIN):
        tokenizer = Tokenizer.from_file(str(file))
    truncation = tokenizer.truncation
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, truncation


@contextlib.contextmanager
def raising(error: type[FunnelError], what: str, remedy: str) -> Iterator[None]:
    """Turns exceptions of the tokenizers library into an `error`.

    They are Exception, or PanicException if Rust panics, which is not a subclass of Exception and which no module
    exports. Other exceptions of this kind, e.g. KeyboardInterrupt, are not changed.
    """
    try:
        yield
    except BaseException as cause:
        if not isinstance(cause, Exception) and type(cause).__name__ != "PanicException":
            raise
        raise error(f"{what}: {cause!s:.200}. {remedy}") from cause


def check_file(file: Path) -> None:
    """Raises `CheckpointError` unless a file is regular and not too large; the libraries do not check this."""
    if not os.path.isfile(file):
        raise CheckpointError(f"{file} is not a regular file; put the tokenizer itself there")
    if (size := os.path.getsize(file)) > MAX_FILE_BYTES:
        raise CheckpointError(f"{file} has {size:,} bytes; a tokenizer has at most {MAX_FILE_BYTES:,}. {FETCH_AGAIN}")
    input_files.check_file(file)


def read_sentencepiece(file: Path) -> Tokenize:
    """A tokenizer like sentencepiece's own, but special tokens such as `<bos>` are also found inside a text.

    For sentencepiece they are plain characters there; for transformers and tokenizer.json they are tokens.
    """
    processor = load_sentencepiece(file)
    numbers = range(processor.get_piece_size())
    special = {processor.id_to_piece(i): i for i in numbers if processor.is_control(i) or processor.is_unknown(i)}
    longest_first = sorted(special, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        parts = [pattern.split(text) for text in texts]  # plain, special, plain, ..., plain
        plain = iter(processor.encode([part for text_parts in parts for part in text_parts[::2]], out_type=int))
        ids = []
        for text_parts in parts:
            ids.append(next(plain))
            for token in text_parts[1::2]:
                ids[-1] = [*ids[-1], special[token], *next(plain)]
        return ids

    return tokenize


def load_sentencepiece(file: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{file} is a SentencePiece model; to read it, run: pip install 'funnel-engine[sentencepiece]'"
        ) from error
    check_file(file)
    try:
        return SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file} is not a SentencePiece model: {error}. {FETCH_AGAIN}") from error
