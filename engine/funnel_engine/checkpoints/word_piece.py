"""Makes the tokenizer of a Funnel-Transformer from its vocabulary: a text file with one piece a line."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from funnel_engine.checks import check_flag
from funnel_engine.input_files import check_file, optional_file, read_json, reading
from funnel_engine.messages import quote
from funnel_engine.text import MAX_FILE_BYTES
from funnel_kernels.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

VOCABULARIES = ("vocab.txt", "vocab.uncased.txt")  # of Hugging Face, and of the authors
CONFIG = "tokenizer_config.json"
UNKNOWN, FIRST, LAST = "<unk>", "<cls>", "<sep>"
SPECIAL = ("<pad>", UNKNOWN, FIRST, LAST, "<mask>", "<s>", "</s>")


def make_tokenizer(directory: Path) -> "Tokenizer | None":
    """The tokenizer for the vocabulary of a folder, with the options of its tokenizer_config.json.

    None if there is no vocabulary.

    Raises:
        CheckpointError: the vocabulary is damaged, or lacks a token that every text gets.
        ConfigError: an option is not a flag.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing

    files = [file for name in VOCABULARIES if (file := optional_file(directory, name))]
    if not files:
        return None
    file = files[0]
    check_file(file)
    if file.stat().st_size > MAX_FILE_BYTES:
        raise CheckpointError(f"{file} has more than {MAX_FILE_BYTES:,} bytes; fetch the model's own vocabulary")
    with reading(file):
        try:
            pieces = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is not UTF-8 text: {error}; fetch it again") from error
    vocabulary = {piece.rstrip("\r"): number for number, piece in enumerate(pieces)}
    if missing := [token for token in (UNKNOWN, FIRST, LAST) if token not in vocabulary]:
        raise CheckpointError(f"{file} does not have the tokens {quote(missing)}; fetch the model's own vocabulary")
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=UNKNOWN))
    config = optional_file(directory, CONFIG)
    tokenizer.normalizer = bert_normalizer(read_json(config) if config else {})
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{FIRST}:2 $A:0 {LAST}:0",
        pair=f"{FIRST}:2 $A:0 {LAST}:0 $B:1 {LAST}:1",
        special_tokens=[(token, vocabulary[token]) for token in (FIRST, LAST)],
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL if token in vocabulary])
    return tokenizer


def bert_normalizer(fields: dict[str, Any]) -> "Normalizer":
    """How a text is changed before it is cut: BERT's way, with the options of tokenizer_config.json."""
    from tokenizers.normalizers import BertNormalizer

    flags = {name: check_flag(name, fields.get(name, True)) for name in ("clean_text", "do_lower_case")}
    chinese = check_flag("tokenize_chinese_chars", fields.get("tokenize_chinese_chars", True))
    accents = fields.get("strip_accents")
    return BertNormalizer(
        clean_text=flags["clean_text"],
        handle_chinese_chars=chinese,
        strip_accents=None if accents is None else check_flag("strip_accents", accents),
        lowercase=flags["do_lower_case"],
    )
