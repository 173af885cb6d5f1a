"""What is measured: models as their `config.json` has them, and batches as lengths of their sequences."""

import dataclasses
from typing import Any

import numpy as np

from funnel_benchmarks.lengths import draw
from funnel_engine.packing import Ints
from funnel_engine.presets import PRESETS

Fields = dict[str, Any]  # of a Hugging Face `config.json`
BIDIRECTIONAL: Fields = {"use_bidirectional_attention": True}
# Token ids are looked up, and then the vocabulary has no part in what is timed.
FOUR_LAYERS: Fields = {"num_hidden_layers": 4, "vocab_size": 2048}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences that a model embeds in one call.

    Attributes:
        model: a name in `Sizes.models`.
        lengths: [B], in tokens.
        goals: how many times as fast as the peer ours is to be, by the order of the peer's sequences: "equal" if all
            have the same length, else "sorted" by it, or "unsorted".
    """

    name: str
    model: str
    lengths: Ints
    goals: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a run.

    Attributes:
        products: rows, in and out features of each matrix product.
        models: config fields by name: "gemma-2b x 4" has its first layers, "gemma-2b" is whole.
        batches: what the engine and Hugging Face embed.
        funnel_layers: full-length layers before each funnel of "gemma-2b".
        funnel_lengths: of the sequences that funnels are measured with, and threads too.
        memory_lengths: of the sequences of the call whose memory is measured.
        peer_batch: most sequences in one of the peer's padded batches.
    """

    products: tuple[tuple[int, int, int], ...]
    models: dict[str, Fields]
    batches: tuple[Batch, ...]
    funnel_layers: tuple[int, ...]
    funnel_lengths: Ints
    memory_lengths: Ints
    peer_batch: int


def equal(sequences: int, tokens: int) -> Ints:
    return np.full(sequences, tokens, np.int32)


FULL = Sizes(
    products=((512, 2048, 16384), (16, 2048, 16384), (4096, 2048, 16384)),
    models={
        "gemma-2b x 4": PRESETS["gemma-2b"] | FOUR_LAYERS | BIDIRECTIONAL,
        "gemma-2b": PRESETS["gemma-2b"] | BIDIRECTIONAL,
        "embeddinggemma-300m": PRESETS["embeddinggemma-300m"],
    },
    batches=(
        Batch("2 x 512", "gemma-2b x 4", equal(2, 512), {"equal": 1.08}),
        Batch("1 x 4096", "gemma-2b x 4", equal(1, 4096), {"equal": 1.35}),
        Batch("1 x 32", "gemma-2b x 4", equal(1, 32), {"equal": 1.2}),
        Batch("64 conll", "gemma-2b x 4", draw("conll", 64, seed=0), {"sorted": 1.5, "unsorted": 2.5}),
        Batch("32 x 256", "embeddinggemma-300m", equal(32, 256), {"equal": 1.3}),
    ),
    funnel_layers=(2, 8, 14),
    funnel_lengths=equal(2, 512),
    memory_lengths=equal(32, 512),
    peer_batch=32,  # the default of sentence-transformers
)

TINY: Fields = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
}
SMALL = Sizes(
    products=((32, 64, 128), (5, 64, 128)),
    models={name: fields | TINY for name, fields in FULL.models.items()},
    batches=(
        Batch("2 x 32", "gemma-2b x 4", equal(2, 32), {"equal": 1.08}),
        Batch("6 conll", "gemma-2b x 4", draw("conll", 6, seed=0), {"sorted": 1.5, "unsorted": 2.5}),
        Batch("4 x 16", "embeddinggemma-300m", equal(4, 16), {"equal": 1.3}),
    ),
    funnel_layers=(1, 2),
    funnel_lengths=equal(2, 32),
    memory_lengths=equal(2, 64),
    peer_batch=4,
)
