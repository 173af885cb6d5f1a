"""Makes a small Gemma checkpoint in Hugging Face format, with random weights and its own tokenizer.

It has Gemma 1's 18 layers, so the funnel can sit in all the places of the paper's Figure 4, and is small enough to be
measured in all of them within minutes on two cores, yet wide enough for matrix products to dominate.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from funnel_benchmarks.random_checkpoint import write_random_model

CONFIG: dict[str, Any] = {
    "model_type": "gemma",
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "use_bidirectional_attention": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]  # ids 0 ... 3, as in every Gemma
SENTENCES = (
    "A funnel pools neighbouring tokens into one, and every later layer works on the shorter sequence.",
    "The first layers read the whole text; the last ones need fewer rows to say what it means.",
    "Latency falls with the number of rows, because nearly all the work is done row by row.",
    "If each token must have an answer, the short sequence is tiled back to its full length.",
    "How much quality a model keeps depends on where the funnel sits and on what it was trained for.",
)


def make_demo_model(directory: Path) -> None:
    """Writes a checkpoint with its tokenizer into `directory`; the same every time."""
    write_random_model(directory, CONFIG)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    # Its rules are not those of Gemma's own tokenizers, whose class a Gemma without this file has.
    tokenizer_config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    (directory / "tokenizer_config.json").write_text(tokenizer_config, encoding="utf-8")


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE learnt from a few sentences; puts `<bos>` before every text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", CONFIG["bos_token_id"])])
    return tokenizer
