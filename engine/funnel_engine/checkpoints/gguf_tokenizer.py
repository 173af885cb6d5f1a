"""Rebuilds Gemma's tokenizer.json from the vocabulary in a GGUF file.

llama.cpp stores what the SentencePiece model contains: the pieces, their scores and their types. SentencePiece merges
the pair of neighbours whose union has the highest score. The tokenizers library has a list of merges instead, in order;
the list is made as transformers makes it from a SentencePiece model, so the result has the merges of the original
tokenizer.json in the same order.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from funnel_engine.input_files import decode
from funnel_engine.messages import quote
from funnel_engine.text import REPAIR, TextConfig, raising
from funnel_kernels.errors import CheckpointError

KEYS = "tokenizer.ggml."
MODEL = f"{KEYS}model"
SENTENCEPIECE = "llama"  # llama.cpp's name of this kind of tokenizer
MAX_PIECE = 256  # characters of a piece; Gemma's longest has 32
SPACE = "\u2581"  # stands for a space in a piece
# SentencePiece's types of pieces. Only normal pieces have a score that means something. Pieces of the types in WHOLE
# are found as a whole in a text, before anything is merged.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)
# Options that change ids -> the value with which Gemma's tokenizer was made, and llama.cpp's value for a missing one.
OPTIONS: dict[str, tuple[Any, Any]] = {
    "add_space_prefix": (False, True),
    "remove_extra_whitespaces": (False, False),
    "precompiled_charsmap": ([], []),
}


def rebuild_tokenizer(path: Path, fields: Mapping[str, Any], vocab_size: int) -> tuple[TextConfig, str]:
    """The ids that the tokenizer of a file adds to a text, and the content of its tokenizer.json.

    Args:
        fields: the values in the file's header.
        vocab_size: the number of rows of the embedding table.

    Raises:
        CheckpointError: the vocabulary is damaged, does not fit the model, or is not used as Gemma uses it.
    """
    for name, (value, default) in OPTIONS.items():
        if (found := fields.get(KEYS + name, default)) != value:
            raise CheckpointError(
                f"{path}: {KEYS}{name} is {found!r:.80}, but Gemma's tokenizer has {value!r}; fetch a file with "
                "Gemma's own tokenizer"
            )

    def array(name: str, kind: type) -> list[Any]:
        values = fields.get(KEYS + name)
        if not isinstance(values, list) or len(values) != vocab_size or type(values[0]) is not kind:
            raise CheckpointError(
                f"{path}: {KEYS}{name} must be a list with one {kind.__name__} for each of the model's {vocab_size:,} "
                "tokens; fetch the file again"
            )
        return values

    def special_id(name: str, default: int) -> int:
        number: int = decode(int, fields.get(KEYS + name, default), f"{path}: {KEYS}{name}")
        if not 0 <= number < vocab_size or types[number] == UNUSED:
            raise CheckpointError(f"{path}: {KEYS}{name} is {number}, which is not a token; fetch it again")
        return number

    def flag(name: str, default: bool) -> bool:
        value: bool = decode(bool, fields.get(KEYS + name, default), f"{path}: {KEYS}{name}")
        return value

    types, scores = array("token_type", int), array("scores", float)
    pieces = [  # llama.cpp writes user-defined pieces with plain spaces
        piece.replace(" ", SPACE) if kind == USER_DEFINED else piece
        for piece, kind in zip(array("tokens", str), types, strict=True)
    ]
    used = [piece for piece, kind in zip(pieces, types, strict=True) if kind != UNUSED]
    wrong = [piece for piece in used if not 1 <= len(piece) <= MAX_PIECE]
    if wrong or len(set(used)) < len(used) or not np.isfinite(scores).all():
        raise CheckpointError(
            f"{path} has a token twice, one that is empty or longer than {MAX_PIECE} characters ({quote(wrong)}), or a "
            "score that is not finite; fetch it again"
        )
    begin = special_id("bos_token_id", 1) if flag("add_bos_token", True) else None
    end = special_id("eos_token_id", 2) if flag("add_eos_token", False) else None
    unknown = special_id("unknown_token_id", 0)
    with raising(CheckpointError, f"{path} has a vocabulary that the tokenizers library does not read", REPAIR):
        content = tokenizer_json(pieces, types, scores, unknown, begin, end)
    return TextConfig(begin, end), content


def tokenizer_json(
    pieces: list[str], types: list[int], scores: list[float], unknown: int, begin: int | None, end: int | None
) -> str:
    """The content of a tokenizer.json like Gemma's own; the last three arguments are ids, see `rebuild_tokenizer`."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    vocabulary = {piece: number for number, piece in enumerate(pieces) if types[number] != UNUSED}
    ranks = [score if kind == NORMAL else 0.0 for score, kind in zip(scores, types, strict=True)]
    merges = find_merges(vocabulary, ranks)
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=pieces[unknown], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens(
        [
            AddedToken(piece, normalized=False, special=types[number] != USER_DEFINED)
            for piece, number in vocabulary.items()
            if types[number] in WHOLE
        ]
    )
    before, after = ([] if number is None else [(pieces[number], number)] for number in (begin, end))
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(piece for piece, _ in before), "$A", *(piece for piece, _ in after)],
            special_tokens=[*before, *after],
        )
    content: str = tokenizer.to_str()
    return content


def find_merges(vocabulary: Mapping[str, int], ranks: list[float]) -> list[tuple[str, str]]:
    """All pairs of pieces whose union is a piece.

    They are ordered by the union's rank, then by the length of the left piece, then of the right one; the highest come
    first. transformers orders them so.

    Args:
        ranks: the rank of each piece, by its id.
    """
    merges, keys = [], []
    for union, number in vocabulary.items():
        for cut in range(1, len(union)):
            left = union[:cut]
            if left in vocabulary and (right := union[cut:]) in vocabulary:
                merges.append((left, right))
                keys.append((len(right), len(left), ranks[number]))
    if not merges:
        return []
    order = np.lexsort(-np.array(keys).T)  # the last key is the first one to sort by
    return [merges[index] for index in order]
