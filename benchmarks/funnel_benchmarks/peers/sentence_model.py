"""Random weights in a folder of sentence-transformers, with heads as published and one word for each token id.

`funnel_engine.convert` reads such folders too, heads and tokenizer included, so both embed the same texts.
"""

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

from funnel_benchmarks.peers.peer_process import not_installed
from funnel_benchmarks.random_checkpoint import write_random_model
from funnel_benchmarks.results import LeftOut
from funnel_engine.hugging_face_config import read_model_config, read_projection_width
from funnel_engine.presets import Fields

WIDENING = 4  # the first dense layer makes rows this many times as wide, the second takes it back


def write_sentence_model(directory: Path, fields: Fields) -> None:
    """Writes the encoder of `write_random_model`, then pooling and normalisation.

    As published, a causal model has last-token pooling, and others have mean pooling. Two dense layers follow, unless
    the encoder projects its rows itself.

    Args:
        directory: of the model, which is made.
        fields: of config.json, as `write_random_model` takes them.

    Raises:
        LeftOut: sentence-transformers is not installed.
    """
    try:
        torch, transformers, library = map(importlib.import_module, ("torch", "transformers", "sentence_transformers"))
        modules: Any = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    except ModuleNotFoundError as error:
        raise LeftOut(not_installed(error.name or "")) from None
    transformers.utils.logging.disable_progress_bar()  # of loading and saving, which takes no time here
    config, projection = read_model_config(fields), read_projection_width(fields)
    width = projection or config.hidden_size
    with tempfile.TemporaryDirectory() as folder:
        encoder = Path(folder) / "encoder"
        write_random_model(encoder, fields)
        write_tokenizer(encoder, config.vocab_size)
        torch.manual_seed(0)
        sizes = ((width, WIDENING * width), (WIDENING * width, width))
        identity = torch.nn.Identity()
        dense = [modules.Dense(*pair, bias=False, activation_function=identity) for pair in sizes]
        transformer = modules.Transformer(str(encoder))
        if config.attention == "causal":
            head = [modules.Pooling(width, "lasttoken")]
        else:
            head = [modules.Pooling(width, "mean"), *([] if projection else dense)]
        parts = [transformer, *head, modules.Normalize()]
        library.SentenceTransformer(modules=parts, device="cpu").save(str(directory), create_model_card=False)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Writes a tokenizer into a model's folder that makes the ids of `text_of` of its text, and adds no token."""
    from tokenizers import Tokenizer  # not at the top: benchmarks on devices run without it
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {word_of(number): number for number in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=word_of(0)))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([word_of(0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": word_of(0)}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")


def text_of(ids: list[int]) -> str:
    """A text with exactly these token ids."""
    return " ".join(map(word_of, ids))


def word_of(number: int) -> str:
    return f"w{number}" if number else "<pad>"
