"""Finds the tokenizer of a source, and the ids that it puts before and after a text.

The two ids are written into our manifest, so that both kinds of tokenizer add them by the same rule. They are found as
in transformers 5:

- tokenizer.json: only its post-processor counts; without one nothing is added. If tokenizer_config.json says otherwise
  (`add_bos_token`, `add_eos_token`), transformers 4 follows it and 5 does not, so such a tokenizer is refused.
- A SentencePiece model has no such rule, and is read for Gemma only. `add_bos_token` and `add_eos_token` in
  tokenizer_config.json decide; if only one exists, the other is false. If neither exists, Gemma's own rule is used,
  which transformers 5 has removed: BOS, and for EmbeddingGemma also EOS.

The other files of a tokenizer also give the largest number of tokens of a text. Apart from that they must agree with
the tokenizer: they must not name a token that it does not have, or a tokenizer class or an option with which
transformers gives different ids.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funnel_engine.checkpoints.architectures import is_embedding_gemma
from funnel_engine.checkpoints.tokenizer_rules import GEMMA, check_rules, own_class, supported_classes
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.input_files import decode, is_file, optional_file, read_json
from funnel_engine.messages import quote
from funnel_engine.text import REPAIR, TextConfig, load_sentencepiece, load_tokenizer_json, raising
from funnel_kernels.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
CONFIG = "tokenizer_config.json"
TOKEN_FILES = (CONFIG, "special_tokens_map.json")  # may name special tokens, e.g. "bos_token"
ADDED_TOKENS = "added_tokens.json"
SEVERAL_TOKENS = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")  # of an added token: how it matches the text around it
UNLIMITED = 2**31  # transformers writes 1e30 where a tokenizer has no limit
# Fields of tokenizer_config.json, and the values other than null with which transformers gives the same ids as we do.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "split_special_tokens": (False,),
    "truncation_side": ("right",),
    "auto_map": (),
    "fix_mistral_regex": (False,),
    "sp_model_kwargs": ({},),
    "fast_tokenizer_files": ([TOKENIZER_JSON],),
}
PROBES = ("a", "b a")  # two texts, so that an id of a text is not mistaken for an added one
REMEDY = (
    "load it with transformers, set tokenizer.add_bos_token and tokenizer.add_eos_token to True or False, and save it"
)


def find_tokenizer(
    directory: Path, config: EncoderConfig, sentencepiece: str = SENTENCEPIECE
) -> tuple[TextConfig, Path | None]:
    """The ids that the tokenizer in a directory adds to a text, and its file: tokenizer.json or a SentencePiece model.

    The file is None if neither exists.

    Raises:
        CheckpointError: the tokenizer cannot be read, or does something that the engine does not support.
    """
    config_file = optional_file(directory, CONFIG)
    fields = read_json(config_file) if config_file else {}
    where = str(directory / CONFIG)
    max_tokens = read_limit([fields.get("model_max_length"), fields.get("max_len")], where)
    if file := optional_file(directory, TOKENIZER_JSON):
        tokenizer, truncation = load_tokenizer_json(file)
        begin, end = ids_added_by_processor(tokenizer, file)
        check_flags(tokenizer, file, directory, fields, (begin, end))
        check_rules(tokenizer, file, config.family, fields, where)
        added = tokenizer.get_added_tokens_decoder()
        known: dict[str, tuple[int, Any]] = {token.content: (number, token) for number, token in added.items()}
        if truncation is not None and "truncation_side" not in fields:
            fields["truncation_side"], where = truncation["direction"].lower(), str(file)
    elif file := optional_file(directory, sentencepiece):
        if own_class(config.family) != GEMMA:
            raise CheckpointError(
                f"{file} is a SentencePiece model, which this engine reads for Gemma only; load the tokenizer with "
                f"transformers and save it, which writes {TOKENIZER_JSON}"
            )
        processor = load_sentencepiece(file)
        begin, end = ids_for_sentencepiece(processor, file, directory, fields, config)
        known = {token: (number, None) for token, number in pieces(processor).items()}
    else:
        return TextConfig(max_tokens=max_tokens), None
    check_tokens(known, file, directory, config.vocab_size)
    refuse_options(fields, config.family, where)
    for identifier in (begin, end):
        if identifier is not None and identifier >= config.vocab_size:
            raise CheckpointError(
                f"{file} adds id {identifier} to every text, but the model's vocabulary has {config.vocab_size} ids; "
                "they do not belong together, so fetch the model's own tokenizer"
            )
    return TextConfig(begin, end, max_tokens), file


def has_tokenizer(directory: Path) -> bool:
    return is_file(directory / TOKENIZER_JSON) or is_file(directory / SENTENCEPIECE)


def read_limit(limits: list[Any], where: str) -> int | None:
    """The largest number of tokens of a text, with begin and end: the first of several fields that is not None.

    Returns None if all are None.

    Raises:
        CheckpointError: it is not a number of at least 1.
    """
    limit = next((limit for limit in limits if limit is not None), UNLIMITED)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        raise CheckpointError(f"{where}: the token limit of a text is {limit!r:.80}; it must be at least 1, or missing")
    return int(limit) if limit < UNLIMITED else None


def refuse_options(fields: dict[str, Any], family: str, where: str) -> None:
    """Raises `CheckpointError` if tokenizer_config.json has an option that the engine does not support."""
    for name, allowed in (OPTIONS | {"tokenizer_class": supported_classes(family)}).items():
        if fields.get(name) not in (None, *allowed):
            only = " or ".join(map(repr, allowed)) or "a tokenizer without it"
            raise CheckpointError(
                f"{where}: {name} is {fields[name]!r:.80}; this engine only supports {only}. Change it if that is what "
                "you want"
            )


def check_tokens(known: Mapping[str, tuple[int, Any]], file: Path, directory: Path, vocab_size: int) -> None:
    """Raises `CheckpointError` if other files name tokens that a tokenizer does not have, or give them other flags.

    Tokens outside the model's vocabulary are ignored, e.g. Gemma 3's image token; a text encoder cannot read them.

    Args:
        known: the id, and the flags if there are any, of each token that the tokenizer finds as a whole in a text.
    """
    for token, number, where in tokens_in_other_files(directory, vocab_size):
        text = token_text(token, where)
        identifier, flags = known.get(text or "", (-1, None))
        if identifier < 0 or number not in (None, str(identifier)):
            raise CheckpointError(
                f"{file} does not have all the tokens that {where} adds to it, e.g. {text!r:.80}; load the tokenizer "
                "with transformers and save it, which writes a tokenizer.json that has them"
            )
        stated = token if isinstance(token, dict) and number is not None and flags is not None else {}
        if other := [flag for flag in FLAGS if flag in stated and stated[flag] != getattr(flags, flag)]:
            raise CheckpointError(
                f"{where} has other flags for {text!r:.80} than {file} ({quote(other)}); load the tokenizer with "
                "transformers and save it, which makes both files agree"
            )


def tokens_in_other_files(directory: Path, vocab_size: int) -> list[tuple[Any, str | None, str]]:
    """The tokens that the other files of a tokenizer name: the token, its id if given, and the file that names it."""
    named: list[tuple[Any, str | None, str]] = []
    for name in TOKEN_FILES:
        if path := optional_file(directory, name):
            fields, where = read_json(path), str(path)
            decoder = decode(dict[str, Any], fields.get("added_tokens_decoder") or {}, f"{where}: added_tokens_decoder")
            named += [(token, number, where) for number, token in decoder.items()]
            tokens = [fields[key] for key in fields if key.endswith("_token")]
            for entries in (fields.get(key) or [] for key in SEVERAL_TOKENS):
                tokens += entries.values() if isinstance(entries, dict) else decode(tuple[Any, ...], entries, where)
            named += [(token, None, where) for token in tokens if isinstance(token, str | dict)]
    if path := optional_file(directory, ADDED_TOKENS):
        named += [(token, str(number), str(path)) for token, number in read_json(path).items()]
    beyond = {  # float(), because int() does not accept very many digits
        token_text(token, where)
        for token, number, where in named
        if number is not None and number.isdecimal() and float(number) >= vocab_size
    }
    return [entry for entry in named if token_text(entry[0], entry[2]) not in beyond]


def pieces(processor: Any) -> dict[str, int]:
    """The ids of all pieces of a SentencePiece model."""
    return {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}


def ids_added_by_processor(tokenizer: "Tokenizer", file: Path) -> tuple[int | None, int | None]:
    """The ids that the post-processor of a tokenizer.json adds before and after every text."""
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
        f"{file} makes {full} from a text whose own ids are {bare}; this engine adds at most one id before a text "
        f"and one after it. Give the file such a post-processor: {REMEDY}"
    )


def check_flags(
    tokenizer: "Tokenizer", file: Path, directory: Path, fields: dict[str, Any], added: tuple[int | None, int | None]
) -> None:
    """Raises `CheckpointError` if tokenizer_config.json disagrees with the ids that a tokenizer.json adds."""
    where = str(directory / CONFIG)
    for kind, identifier in zip(("bos", "eos"), added, strict=True):
        flag = decode(bool | None, fields.get(f"add_{kind}_token"), f"{where}: add_{kind}_token")
        piece = token_text(fields.get(f"{kind}_token"), f"{where}: {kind}_token")
        other = flag and piece is not None and tokenizer.token_to_id(piece) != identifier
        added_id = "nothing" if identifier is None else f"id {identifier}"
        if flag is not None and (flag != (identifier is not None) or other):
            raise CheckpointError(
                f"{where}: add_{kind}_token is {flag}, but the post-processor of {file} adds {added_id} as "
                f"{kind.upper()}; transformers 4 follows the first and 5 the second. To make them agree, {REMEDY}"
            )


def ids_for_sentencepiece(
    processor: Any, file: Path, directory: Path, fields: dict[str, Any], config: EncoderConfig
) -> tuple[int | None, int | None]:
    """The ids to add before and after a text for a SentencePiece model, from the other files in its folder."""
    where = str(directory / CONFIG)
    stated = [decode(bool | None, fields.get(name), f"{where}: {name}") for name in ("add_bos_token", "add_eos_token")]
    adds = family_rule(config) if stated == [None, None] else stated
    ids: list[int | None] = []
    for kind, add, own in zip(("bos", "eos"), adds, (processor.bos_id(), processor.eos_id()), strict=True):
        piece = token_text(fields.get(f"{kind}_token"), f"{where}: {kind}_token")
        identifier: int = own if piece is None else piece_id(processor, piece)  # -1 if there is none
        if add and identifier < 0:
            raise CheckpointError(
                f"{file} has no {kind.upper()} token to add to every text; repair the tokenizer, or, if the model was "
                f'trained without it, put "add_{kind}_token": false into {where}'
            )
        ids.append(identifier if add else None)
    return ids[0], ids[1]


def piece_id(processor: Any, piece: str) -> int:
    """The id of a piece; -1 if the piece does not exist."""
    identifier: int = processor.piece_to_id(piece)
    return identifier if processor.id_to_piece(identifier) == piece else -1


def token_text(value: Any, where: str) -> str | None:
    """The text of a special token, which is a string, or an object with the string as its content; null gives None."""
    return decode(str | None, value.get("content") if isinstance(value, dict) else value, where)


def family_rule(config: EncoderConfig) -> tuple[bool, bool]:
    """Whether a model adds BOS and EOS: Gemma adds BOS, both EmbeddingGemmas add both."""
    return True, is_embedding_gemma(config) or config.family == "embedding_gemma2_text"
