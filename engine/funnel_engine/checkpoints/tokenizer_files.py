"""Finds a source's tokenizer, and the ids that it puts before and after a text.

The two ids are written into our manifest, so that both kinds of tokenizer add them by the same rule. Where they come
from is as in transformers 5:

- tokenizer.json: its post-processor alone; without one nothing is added. Where tokenizer_config.json says otherwise
  (`add_bos_token`, `add_eos_token`), transformers 4 follows it and 5 does not, so such a tokenizer is refused.
- A SentencePiece model has no such rule. `add_bos_token` and `add_eos_token` of tokenizer_config.json decide; if only
  one is there, the other counts as false. If neither is there, Gemma's own rule holds, which transformers 5 has
  dropped: BOS, and for EmbeddingGemma EOS too.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from funnel_engine.checkpoints.architectures import is_embedding_gemma
from funnel_engine.checkpoints.files import decode, optional_file, read_json
from funnel_engine.config import ModelConfig
from funnel_engine.text import REPAIR, TextConfig, load_sentencepiece, load_tokenizer_json, raising
from funnel_kernels.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
CONFIG = "tokenizer_config.json"
PROBES = ("a", "b a")  # two, so that no id of the text itself is taken for one that is added
REMEDY = (
    "load it with transformers, set tokenizer.add_bos_token and tokenizer.add_eos_token to True or False, and save it"
)


def find_tokenizer(
    directory: Path, config: ModelConfig, sentencepiece: str = SENTENCEPIECE
) -> tuple[TextConfig, Path | None]:
    """What the tokenizer in a directory adds to a text, and its file: tokenizer.json, or else a SentencePiece model.

    Without either, texts cannot be read: the file is None.

    Raises:
        CheckpointError: it cannot be read, or treats a text in a way that the engine does not.
    """
    config_file = optional_file(directory, CONFIG)
    fields = read_json(config_file) if config_file else {}
    if file := optional_file(directory, TOKENIZER_JSON):
        tokenizer = load_tokenizer_json(file)
        begin, end = added_by(tokenizer, file)
        check_flags(tokenizer, file, directory, fields, (begin, end))
    elif file := optional_file(directory, sentencepiece):
        begin, end = added_to(load_sentencepiece(file), file, directory, fields, config)
    else:
        return TextConfig(), None
    for name, allowed in (("split_special_tokens", False), ("truncation_side", "right")):
        if fields.get(name) not in (None, allowed):
            raise CheckpointError(
                f"{config_file}: {name} is {fields[name]!r}; this engine only runs {allowed!r}. Set it so if that is "
                "what you want"
            )
    for identifier in (begin, end):
        if identifier is not None and identifier >= config.vocab_size:
            raise CheckpointError(
                f"{file} adds id {identifier} to every text, but the model's vocabulary has {config.vocab_size}; they "
                "do not belong together, so fetch the model's own tokenizer"
            )
    return TextConfig(begin, end), file


def added_by(tokenizer: "Tokenizer", file: Path) -> tuple[int | None, int | None]:
    """The ids that the post-processor of a tokenizer.json puts before and after every text."""
    readings = []
    for probe in PROBES:
        with raising(CheckpointError, f"{file} cannot read the text {probe!r}", REPAIR):
            bare, full = (tokenizer.encode(probe, add_special_tokens=add).ids for add in (False, True))
        around = [(full[:at], full[at + len(bare) :]) for at in (0, 1) if full[at : at + len(bare)] == bare]
        readings.append([(before, after) for before, after in around if bare and len(after) <= 1])
    for before, after in readings[0]:
        if (before, after) in readings[1]:
            return (before[0] if before else None), (after[0] if after else None)
    raise CheckpointError(
        f"{file} makes {full} of a text whose own ids are {bare}; this engine adds at most one id before a text and "
        f"one after it. Give the file such a post-processor: {REMEDY}"
    )


def check_flags(
    tokenizer: "Tokenizer", file: Path, directory: Path, fields: dict[str, Any], added: tuple[int | None, int | None]
) -> None:
    """Raises `CheckpointError` if tokenizer_config.json says something else of the ids that a tokenizer.json adds."""
    where = str(directory / CONFIG)
    for kind, identifier in zip(("bos", "eos"), added, strict=True):
        flag = decode(bool | None, fields.get(f"add_{kind}_token"), f"{where}: add_{kind}_token")
        piece = token_text(fields.get(f"{kind}_token"), f"{where}: {kind}_token")
        other = flag and piece is not None and tokenizer.token_to_id(piece) != identifier
        added_id = "nothing" if identifier is None else f"id {identifier}"
        if flag is not None and (flag != (identifier is not None) or other):
            raise CheckpointError(
                f"{where}: add_{kind}_token is {flag}, but the post-processor of {file} adds {added_id} as "
                f"{kind.upper()}; versions of transformers differ in which of the two counts. To settle it, {REMEDY}"
            )


def added_to(
    processor: Any, file: Path, directory: Path, fields: dict[str, Any], config: ModelConfig
) -> tuple[int | None, int | None]:
    """The ids that go before and after a text of a SentencePiece model, by the files beside it."""
    where = str(directory / CONFIG)
    check_added_tokens(processor, file, directory, fields, config.vocab_size)
    stated = [decode(bool | None, fields.get(name), f"{where}: {name}") for name in ("add_bos_token", "add_eos_token")]
    adds = family_rule(config) if stated == [None, None] else stated
    ids: list[int | None] = []
    for kind, add, own in zip(("bos", "eos"), adds, (processor.bos_id(), processor.eos_id()), strict=True):
        piece = token_text(fields.get(f"{kind}_token"), f"{where}: {kind}_token")
        identifier: int = own if piece is None else piece_id(processor, piece)  # -1 if there is none
        if add and identifier < 0:
            raise CheckpointError(
                f"{file} has no {kind.upper()} token to add to every text; repair the tokenizer, or, if the model was "
                f'trained without, put "add_{kind}_token": false into {where}'
            )
        ids.append(identifier if add else None)
    return ids[0], ids[1]


def check_added_tokens(processor: Any, file: Path, directory: Path, fields: dict[str, Any], vocab_size: int) -> None:
    """Raises `CheckpointError` if the files beside a SentencePiece model add tokens that are not in it.

    Those beyond the model's vocabulary do not count, e.g. Gemma 3's image token: no text encoder can take them.
    """
    where = f"{directory / CONFIG}: added_tokens_decoder"
    tokens = decode(dict[str, Any], fields.get("added_tokens_decoder") or {}, where)
    added = {token_text(token, where): number for number, token in tokens.items()}
    if more := optional_file(directory, "added_tokens.json"):
        added |= {token: str(number) for token, number in read_json(more).items()}
    missing = [
        token
        for token, number in added.items()
        if token is not None
        and str(piece_id(processor, token)) != number
        and not (number.isdecimal() and float(number) >= vocab_size)  # int() refuses very many digits
    ]
    if missing:
        raise CheckpointError(
            f"{file} does not have all the tokens that are added to it, e.g. {missing[0]!r}; load the tokenizer with "
            "transformers and save it, which writes a tokenizer.json that has them"
        )


def piece_id(processor: Any, piece: str) -> int:
    """The id of a piece; -1 if there is none."""
    identifier: int = processor.piece_to_id(piece)
    return identifier if processor.id_to_piece(identifier) == piece else -1


def token_text(value: Any, where: str) -> str | None:
    """A special token is written as a string, or as an object with the string as its content; null is none."""
    return decode(str | None, value.get("content") if isinstance(value, dict) else value, where)


def family_rule(config: ModelConfig) -> tuple[bool, bool]:
    """Gemma adds BOS; EmbeddingGemma adds EOS too."""
    return True, is_embedding_gemma(config)
