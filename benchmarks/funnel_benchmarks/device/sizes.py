"""How large everything is that gets measured: on an accelerator, and in a rehearsal on a CPU."""

import dataclasses

from funnel_engine import ModelConfig, preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of one run.

    Attributes:
        matrix: rows and columns of the two factors of the matrix product.
        copy_bytes: of the array that is copied.
        head_dim: of attention.
        attention_heads: (query heads, key/value heads), each with all lengths; the first is used for the variants.
        attention_lengths: tokens a sequence; `tokens` in all.
        xla_length: the one length at which XLA's attention is measured too.
        strided_lengths: tokens a sequence of queries on stride 2 over keys on stride 1.
        windows: tokens that a sliding window spans, over sequences of the last of `attention_lengths`.
        padding_percent: how much of a bucket is padding, where that is measured.
        ragged_longest: of lengths drawn evenly from 1 to this; their mean is the first of `attention_lengths`.
        widths, rows: of pool_norm and recover_norm.
        rotated_bytes: how much memory the input sets of a call take together, so that no cache holds them.
        tokens: of every batch of the engine, and of attention.
        config: the engine's model.
        batches: (sequences, tokens each); the first is the one for everything but funnels.
        funnel_layers: full-length layers before the funnel.
        one: tokens of the single sequence.
        long_check: tokens of the longest sequence whose attention is checked.
        check_step: 1 for all checks, 2 for every second, and so on.
        sample_seconds: what one timing lasts at least.
        repeats: how often A B B A is run.
    """

    matrix: int
    copy_bytes: int
    head_dim: int
    attention_heads: tuple[tuple[int, int], ...]
    attention_lengths: tuple[int, ...]
    xla_length: int
    strided_lengths: tuple[int, ...]
    windows: tuple[int, ...]
    padding_percent: tuple[int, ...]
    ragged_longest: int
    widths: tuple[int, ...]
    rows: int
    rotated_bytes: int
    tokens: int
    config: ModelConfig
    batches: tuple[tuple[int, int], ...]
    funnel_layers: tuple[int, ...]
    one: int
    long_check: int
    check_step: int
    sample_seconds: float
    repeats: int


GEMMA_2B = dataclasses.replace(preset("gemma-2b"), attention="bidirectional")

FULL = Sizes(
    matrix=8192,
    copy_bytes=2**32,
    head_dim=256,
    attention_heads=((8, 1), (16, 16)),
    attention_lengths=(512, 2048, 8192, 16384),
    xla_length=2048,
    strided_lengths=(2048, 8192),
    windows=(4096, 512),
    padding_percent=(7, 45),
    ragged_longest=1023,
    widths=(768, 2048),
    rows=65536,
    rotated_bytes=10**9,
    tokens=65536,
    config=GEMMA_2B,
    batches=((128, 512), (8, 8192)),
    funnel_layers=(2, 8, 14),
    one=128,
    long_check=4097,
    check_step=1,
    sample_seconds=0.02,
    repeats=5,
)

SMALL = Sizes(
    matrix=256,
    copy_bytes=2**20,
    head_dim=32,
    attention_heads=((4, 1), (2, 2)),
    attention_lengths=(32, 128),
    xla_length=32,
    strided_lengths=(32,),
    windows=(16,),
    padding_percent=(25, 50),
    ragged_longest=63,
    widths=(64,),
    rows=256,
    rotated_bytes=2**17,
    tokens=256,
    config=dataclasses.replace(
        GEMMA_2B,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        head_dim=16,
        layer_types=("full",) * 3,
    ),
    batches=((8, 32), (2, 128)),
    funnel_layers=(1, 2),
    one=16,
    long_check=130,
    check_step=7,
    sample_seconds=0.001,
    repeats=1,
)
