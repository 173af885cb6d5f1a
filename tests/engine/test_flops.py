"""FLOPs against the published tables of the formula, a count pair by pair, and what compiled programs do."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funnel_engine.config import FunnelConfig, ModelConfig, Rope
from funnel_engine.flops import forward_flops, ideal_ratio
from funnel_engine.heads import HeadConfig
from funnel_engine.model import forward
from funnel_engine.packing import make_plan, pack
from funnel_engine.presets import preset
from funnel_engine.weights import expected_shapes, nest
from funnel_kernels import ConfigError, Target

# Ideal latency ratio in thousandths of one funnel after L layers, both with keys and values pooled and with
# pool_query_only, for bidirectional sequences of 512, 4096 and 8192 tokens: {L: (512, 512, 4096, 4096, 8192, 8192)}.
GEMMA_2B_STRIDE_2 = {
    0: (495, 496, 467, 469, 442, 445), 2: (551, 552, 526, 528, 504, 507), 4: (607, 608, 585, 587, 566, 569),
    6: (664, 664, 645, 647, 628, 631), 8: (720, 720, 704, 706, 690, 693), 10: (776, 776, 763, 765, 752, 755),
    12: (832, 832, 822, 824, 814, 817), 14: (888, 888, 882, 884, 876, 879), 16: (944, 944, 941, 943, 938, 941),
}  # fmt: skip
GEMMA_2B_STRIDE_4 = {
    0: (246, 247, 225, 227, 206, 209), 2: (330, 331, 311, 313, 294, 297), 4: (414, 415, 397, 399, 383, 385),
    6: (498, 498, 483, 485, 471, 474), 8: (581, 582, 570, 571, 559, 562), 10: (665, 666, 656, 657, 647, 650),
    12: (749, 749, 742, 743, 735, 738), 14: (833, 833, 828, 830, 824, 826), 16: (916, 917, 914, 916, 912, 915),
}  # fmt: skip
GEMMA_7B_STRIDE_2 = {
    0: (496, 498, 473, 475, 451, 454), 2: (532, 534, 511, 513, 490, 493), 4: (568, 570, 548, 551, 530, 533),
    6: (604, 606, 586, 588, 569, 572), 8: (640, 642, 624, 626, 608, 611), 10: (676, 678, 661, 664, 647, 650),
    12: (712, 714, 699, 701, 686, 689), 14: (748, 750, 736, 739, 726, 729), 16: (784, 786, 774, 777, 765, 768),
    18: (820, 822, 812, 814, 804, 807), 20: (856, 858, 849, 852, 843, 846), 22: (892, 894, 887, 889, 882, 885),
    24: (928, 930, 925, 927, 922, 925), 26: (964, 966, 962, 965, 961, 964),
}  # fmt: skip
GEMMA_7B_STRIDE_4 = {
    0: (247, 250, 230, 233, 213, 217), 2: (301, 303, 285, 288, 270, 273), 4: (355, 357, 340, 343, 326, 329),
    6: (409, 411, 395, 398, 382, 385), 8: (462, 465, 450, 453, 438, 441), 10: (516, 519, 505, 508, 494, 498),
    12: (570, 572, 560, 563, 551, 554), 14: (624, 626, 615, 618, 607, 610), 16: (677, 680, 670, 673, 663, 666),
    18: (731, 734, 725, 728, 719, 722), 20: (785, 787, 780, 783, 775, 779), 22: (839, 841, 835, 838, 831, 835),
    24: (892, 895, 890, 893, 888, 891), 26: (946, 949, 945, 948, 944, 947),
}  # fmt: skip


def bidirectional(name):
    return dataclasses.replace(preset(name), attention="bidirectional")


@pytest.mark.parametrize(
    ("name", "stride", "table"),
    [
        ("gemma-2b", 2, GEMMA_2B_STRIDE_2),
        ("gemma-2b", 4, GEMMA_2B_STRIDE_4),
        ("gemma-7b", 2, GEMMA_7B_STRIDE_2),
        ("gemma-7b", 4, GEMMA_7B_STRIDE_4),
    ],
)
def test_ideal_ratios_are_those_of_the_table(name, stride, table):
    config = bidirectional(name)
    for layers, row in table.items():
        for column, expected in enumerate(row):
            funnel = FunnelConfig.after(layers, stride=stride, pool_query_only=column % 2 == 1)
            ratio = ideal_ratio(config, funnel, np.array([(512, 4096, 8192)[column // 2]], np.int32))
            assert abs(1000 * ratio - expected) <= 0.5 + 1e-9, (layers, column)


@pytest.mark.parametrize(
    ("name", "per_token", "score_share"),
    [
        # GFLOP per token without the scores, and the scores' share of that in per cent at 512, 4096, 8192 tokens
        ("gemma-2b", 3.964, (1.9, 15.2, 30.5)),
        ("gemma-7b", 15.50, (1.5, 12.1, 24.2)),
    ],
)
def test_work_per_token_is_that_of_the_table(name, per_token, score_share):
    lengths = (1, 512, 4096, 8192)
    one, *sums = (forward_flops(bidirectional(name), FunnelConfig(), np.array([n], np.int32)) for n in lengths)
    config = preset(name)
    scores = 4 * config.num_heads * config.head_dim * config.num_layers
    linear = one - scores
    assert linear / 1e9 == pytest.approx(per_token, rel=5e-4)
    for total, length, share in zip(sums, lengths[1:], score_share, strict=True):
        assert total == length * linear + length**2 * scores
        assert 100 * length * scores / linear == pytest.approx(share, abs=0.05)


MIXED = ModelConfig(
    family="gemma2", vocab_size=11, hidden_size=5, intermediate_size=7, num_heads=6, num_kv_heads=3, head_dim=4,
    layer_types=("sliding", "full", "sliding", "full", "sliding"), query_scale=1.0, attention="bidirectional",
    max_positions=100, full_rope=Rope(1e4), sliding_rope=Rope(1e4), causal_window=(6, 0), bidirectional_window=(4, 3),
)  # fmt: skip


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("kept", [None, "keep_first", "keep_last"])
@pytest.mark.parametrize("pool_query_only", [False, True])
@pytest.mark.parametrize("strides", [(), (2,), (1, 3), (1, 2, 1, 2), (1, 1, 1, 1, 4)])
def test_every_pair_of_rows_is_counted_once(strides, pool_query_only, kept, attention):
    config = dataclasses.replace(MIXED, attention=attention)
    funnel = FunnelConfig(strides, pool_query_only=pool_query_only, **({kept: True} if kept else {}))
    lengths = np.array([1, 2, 9, 30, 7], np.int32)

    def places(length, stride):  # the first token of each row
        if kept == "keep_first" and stride > 1:
            return [0, *range(1, length, stride)]
        if kept == "keep_last":
            return sorted({max(0, place) for place in range(length - 1, -stride, -stride)})
        return list(range(0, length, stride))

    total = 0
    for length in lengths:
        stride = 1
        for layer, layer_type in enumerate(config.layer_types):
            before, stride = stride, stride * (strides[layer] if layer < len(strides) else 1)
            queries, keys = places(length, stride), places(length, before if pool_query_only else stride)
            left, right = {
                ("full", "bidirectional"): (99, 99), ("full", "causal"): (99, 0),
                ("sliding", "bidirectional"): (4, 3), ("sliding", "causal"): (6, 0),
            }[layer_type, attention]  # fmt: skip
            pairs = sum(-left <= key - query <= right for query in queries for key in keys)
            per_query = 2 * 5 * 24 + 3 * 5 * 7  # query and output projection, three MLP matrices
            per_key, per_pair = 2 * 5 * 12, 2 * 24  # key and value projection; score and weighted sum
            total += 2 * (len(queries) * per_query + len(keys) * per_key + pairs * per_pair)
    assert forward_flops(config, funnel, lengths) == total


def test_the_recovery_and_the_pool_are_free():
    config, lengths = preset("gemma2-2b"), np.array([300, 40], np.int32)
    plain = forward_flops(config, FunnelConfig.after(3), lengths)
    assert forward_flops(config, FunnelConfig.after(3, recovery="sum_max", pool="mean"), lengths) == plain


def test_a_funnel_that_does_not_fit_the_model_is_refused():
    with pytest.raises(ConfigError, match="19 strides but the model has only 18 layers"):
        forward_flops(preset("gemma-2b"), FunnelConfig.after(18), np.array([5], np.int32))


def test_large_batches_do_not_overflow():
    lengths = np.full(64, 8192, np.int32)
    one = forward_flops(preset("gemma-7b"), FunnelConfig(), lengths[:1])
    assert forward_flops(preset("gemma-7b"), FunnelConfig(), lengths) == 64 * one > 2**53


def program_flops(config, funnel, tokens):
    """What XLA counts in the compiled reference: its attention is dense, as that of one sequence without a window."""
    plan = make_plan(config, funnel)
    batch = pack(plan, np.zeros(tokens, np.int32), np.array([0, tokens], np.int32), tokens)
    shapes = expected_shapes(config, HeadConfig()).items()
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes}
    params = jax.eval_shape(partial(nest, config=config, funnel=funnel), weights)
    run = jax.jit(partial(forward, config=config, funnel=funnel, dtype="float32", target=Target("reference")))
    return run.lower(params, batch).compile().cost_analysis()["flops"]


COUNTED = (
    ("qwen3-embedding-0.6b", 512),
    ("gemma-2b", 512),
    ("gemma2-2b", 256),
    ("embeddinggemma-300m", 512),
    ("embeddinggemma-2", 512),
    ("gemma4-e2b", 256),
)
COUNTED_FUNNELS = (
    FunnelConfig(),
    FunnelConfig.after(1),
    FunnelConfig((4, 2)),
    FunnelConfig.after(1, pool_query_only=True),
    FunnelConfig.after(1, recovery="sum_mean"),
)


@pytest.mark.parametrize(
    ("name", "tokens", "funnel"),
    [
        pytest.param(name, tokens, funnel, marks=() if (row + column) % 3 == 0 else pytest.mark.grid)
        for row, (name, tokens) in enumerate(COUNTED)
        for column, funnel in enumerate(COUNTED_FUNNELS)
    ],
)
def test_the_compiled_program_does_as_many(name, tokens, funnel):
    changed = {"layer_types": ("full",) * 3, "vocab_size": 128}
    if name == "gemma4-e2b":
        changed |= {"kv_shared_layers": 1, "per_layer_vocab": 128}
    config = dataclasses.replace(bidirectional(name), **changed)
    counted = program_flops(config, funnel, tokens)
    # Norms, RoPE, softmax and the rest, which the formula leaves out, are less than 2 % of it.
    assert 1 < counted / forward_flops(config, funnel, np.array([tokens], np.int32)) < 1.02
