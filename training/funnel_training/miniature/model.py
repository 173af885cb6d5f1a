"""A small Gemma 3 with random weights, and a vocabulary made on the corpus."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from funnel_engine import HeadConfig, ModelConfig
from funnel_engine.checkpoints.convert import prepare_destination, save
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.checkpoints.tensors import ArrayTensor
from funnel_engine.config import Rope
from funnel_engine.text import TextConfig
from funnel_engine.weights import expected_shapes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("<pad>", "<unk>", "<mask>")
MASK = SPECIAL.index("<mask>")
HEAD_DIM = 32
RADIUS = 2  # of the window, in tokens
HEAD = HeadConfig(pooling="mean")


def make_vocabulary(texts: Iterable[str], size: int) -> "Tokenizer":
    """Byte-level BPE (as in GPT-2) on these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_config(vocabulary: int, *, layers: int, width: int, mlp_width: int) -> ModelConfig:
    """Bidirectional, heads of 32, one key/value head; the last layer sees the whole text, the others two tokens around.

    So narrow a window makes a short training learn faster: without it, attention begins as the mean of the whole text.
    """
    return ModelConfig(
        family="gemma3_text",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_heads=width // HEAD_DIM,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        layer_types=("sliding",) * (layers - 1) + ("full",),
        query_scale=HEAD_DIM**-0.5,
        attention="bidirectional",
        max_positions=512,
        full_rope=Rope(10_000.0),
        sliding_rope=Rope(10_000.0),
        causal_window=(2 * RADIUS, 0),
        bidirectional_window=(RADIUS, RADIUS),
        post_norms=True,
        qk_norm=True,
        pad_token_id=SPECIAL.index("<pad>"),
    )


def random_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Normal matrices that keep the variance of what they multiply; the zero-centred norm weights are 0."""
    generator = np.random.default_rng(seed)
    return {
        name: (generator.standard_normal(shape) * shape[-1] ** -0.5 if len(shape) == 2 else np.zeros(shape)).astype(
            np.float32
        )
        for name, shape in expected_shapes(config, HEAD).items()
    }


def write_model(folder: Path, config: ModelConfig, weights: dict[str, Any], tokenizer: Path) -> None:
    """Writes a checkpoint, which is meant for no funnel; an earlier one there is replaced."""
    tensors = {name: ArrayTensor.of(name, np.asarray(weight), tokenizer) for name, weight in weights.items()}
    model = SourceModel("funnel", config, HEAD, tensors, {}, TextConfig(), tokenizer, tokenizer.parent)
    destination = prepare_destination(folder, tokenizer, True)
    save(model, destination, "float32", overwrite=True)
