"""The rules of a tokenizer.json, and those that transformers puts in their place for some tokenizer classes.

A class of the library may make a tokenizer of its own rules from the vocabulary in the file, in transformers 5, while
transformers 4 uses the file as it is. The two must then be the same. Rules are: the normalizer, how a text is cut into
words, and the options of the byte-pair encoder.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funnel_engine.checkpoints.word_piece import bert_normalizer
from funnel_kernels.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # with them, transformers uses a file as it is
GEMMA, QWEN, LLAMA, FUNNEL = "GemmaTokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "FunnelTokenizer"
# The class of its own that a family has; those that are not listed have Gemma's, and some have none.
OWN_CLASSES = {"llama": LLAMA, "mistral": LLAMA, "qwen3": QWEN, "eurobert": None, "funnel": FUNNEL}
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_TOKEN = "<|endoftext|>"  # the class adds it to a vocabulary that does not have it
SPACES = " a  B\t\u00e9 e\u0301 \ufb01\n "  # a normaliser other than Gemma's would change it


def own_class(family: str) -> str | None:
    """The tokenizer class of a family, without "Fast"; None if it has none."""
    return OWN_CLASSES.get(family, GEMMA)


def supported_classes(family: str) -> tuple[str, ...]:
    """The values of `tokenizer_class` that a folder of this family may have."""
    own = own_class(family)
    return (own, f"{own}Fast", *PLAIN_CLASSES) if own else PLAIN_CLASSES


def check_rules(tokenizer: "Tokenizer", file: Path, family: str, fields: dict[str, Any], where: str) -> None:
    """Raises `CheckpointError` if a tokenizer.json is random, or has a class with rules of its own but not those rules.

    For such a class, transformers 5 takes the vocabulary from the file but uses the rules of the class; transformers 4
    uses the rules in the file.
    """
    model = tokenizer.model
    if getattr(model, "dropout", None):
        raise CheckpointError(
            f"{file} drops merges at random (dropout {model.dropout}), which is for training only; set dropout to null"
        )
    own, name = own_class(family), fields.get("tokenizer_class")
    if own is None or name not in (None, own, f"{own}Fast"):
        return
    if family == "mistral" or (family == "llama" and name is None):
        return  # transformers uses the file as it is
    if own == LLAMA and '"ByteLevel"' in file.read_text(encoding="utf-8"):
        return  # the same, since such files name this class by mistake
    has_rules, description = RULES[own]
    if not has_rules(tokenizer, fields):
        raise CheckpointError(
            f"{file} does not have the rules of {description}, but its class is {name or own}; transformers 4 follows "
            f'the file and 5 the class. If the file is right, put "tokenizer_class": "{PLAIN_CLASSES[0]}" into {where}'
        )


def has_gemma_rules(tokenizer: "Tokenizer", fields: dict[str, Any]) -> bool:
    """Only byte-pair encoders are checked."""
    model = tokenizer.model
    if type(model).__name__ != "BPE":
        return True
    text = SPACES if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(SPACES)
    cuts = [] if tokenizer.pre_tokenizer is None else tokenizer.pre_tokenizer.pre_tokenize_str(text)
    spaces = SPACES.replace(" ", "\u2581")
    return bool(text == spaces and len(cuts) <= 1 and model.fuse_unk and model.byte_fallback)


def has_qwen_rules(tokenizer: "Tokenizer", fields: dict[str, Any]) -> bool:
    from tokenizers import Regex, normalizers, pre_tokenizers

    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=bool(fields.get("add_prefix_space")), use_regex=False)
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    return (
        state(tokenizer.normalizer) == state(normalizers.NFC())
        and state(tokenizer.pre_tokenizer) == state(pre_tokenizers.Sequence([words, in_bytes]))
        and byte_pairs(tokenizer) == (False, False, False, None, None)
        and tokenizer.model.unk_token is None
        and QWEN_TOKEN in {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    )


def has_llama_rules(tokenizer: "Tokenizer", fields: dict[str, Any]) -> bool:
    from tokenizers import pre_tokenizers

    scheme = "never" if fields.get("add_prefix_space") is False else "always" if fields.get("legacy") else "first"
    spaces = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme, split=False)
    return (
        tokenizer.normalizer is None
        and state(tokenizer.pre_tokenizer) == state(spaces)
        and byte_pairs(tokenizer) == (True, True, False, None, None)
    )


def has_funnel_rules(tokenizer: "Tokenizer", fields: dict[str, Any]) -> bool:
    from tokenizers import pre_tokenizers

    return (
        type(tokenizer.model).__name__ == "WordPiece"
        and state(tokenizer.normalizer) == state(bert_normalizer(fields))
        and state(tokenizer.pre_tokenizer) == state(pre_tokenizers.BertPreTokenizer())
    )


def state(part: Any) -> Any:
    """A part of a tokenizer as JSON, without the option that moves offsets and leaves ids as they are."""

    def without_offsets(fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name != "trim_offsets"}

    return None if part is None else json.loads(part.__getstate__(), object_hook=without_offsets)


def byte_pairs(tokenizer: "Tokenizer") -> tuple[Any, ...] | None:
    """The rules of a byte-pair encoder, but for its unknown token; None for another kind of model."""
    model = tokenizer.model
    if type(model).__name__ != "BPE":
        return None
    around = model.continuing_subword_prefix or None, model.end_of_word_suffix or None
    return (model.fuse_unk, model.byte_fallback, model.ignore_merges, *around)


Rules = Callable[["Tokenizer", dict[str, Any]], bool]  # reads tokenizer_config.json too
RULES: dict[str, tuple[Rules, str]] = {
    GEMMA: (has_gemma_rules, "Gemma's tokenizer (a space becomes \u2581, an unknown character its bytes)"),
    QWEN: (has_qwen_rules, "Qwen2's tokenizer (NFC, words cut by its expression, bytes, the token <|endoftext|>)"),
    LLAMA: (
        has_llama_rules,
        "Llama's tokenizer in transformers 5 (no normalizer; Metaspace, with \u2581 before a text; byte fallback)",
    ),
    FUNNEL: (has_funnel_rules, "Funnel-Transformer's tokenizer (BERT's normalizer and words, pieces of words)"),
}
