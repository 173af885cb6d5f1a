"""Floating-point operations of a forward pass, and from them the ideal latency ratio of a funnel.

A multiply-add counts as two operations. The matrix products and attention are counted; norms, RoPE, the embedding
lookup and the heads are not. For attention, the (query, key) pairs in the intervals are counted, so the result is exact
for causality, windows, ragged lengths, odd tails, and queries on a different stride than the keys.
"""

import numpy as np

from funnel_engine.config import Funnel, FunnelConfig, LayerStep, layer_steps
from funnel_engine.funnel_transformer_config import EncoderConfig, FunnelTransformerConfig
from funnel_engine.packing import Ints, LevelRows, group_by_length, make_plan


def forward_flops(config: EncoderConfig, funnel: Funnel, lengths: np.ndarray) -> int:
    """FLOPs of one forward pass over sequences of these lengths (in tokens), without padding.

    Raises:
        ConfigError: the funnel does not fit the model.
    """
    return sum(class_flops(config, each, part) for each, part in lengths_by_funnel(funnel, lengths))


def lengths_by_funnel(funnel: Funnel, lengths: np.ndarray) -> list[tuple[FunnelConfig, Ints]]:
    """The funnels that sequences of these lengths run with, and the lengths of the sequences of each."""
    starts = [tokens for tokens, _ in funnel.classes]
    return [(funnel.classes[number].funnel, lengths[index]) for number, index in group_by_length(starts, lengths)]


def class_flops(config: EncoderConfig, funnel: FunnelConfig, lengths: Ints) -> int:
    """FLOPs of sequences that run with the same funnel."""
    plan = make_plan(config, funnel)
    levels = {stride: LevelRows(plan, lengths, stride) for stride in plan.strides}
    visible = {
        key: count_pairs(levels[key[0]], levels[key[1]], window, int(plan.rows_needed(lengths).sum()))
        for key, window in plan.windows.items()
    }
    steps = layer_steps(config, funnel)
    if isinstance(config, FunnelTransformerConfig) and funnel.recovery is not None:
        steps += [LayerStep(0, "full", 1, 1, 1, False)] * config.decoder_layers
    return sum(
        layer_flops(
            config,
            step,
            tokens=int(lengths.sum()),
            queries=len(levels[step.query_stride].row),
            keys=len(levels[step.key_stride].row),
            pairs=visible[step.query_stride, step.key_stride, step.layer_type],
        )
        for step in steps
    )


def ideal_ratio(config: EncoderConfig, funnel: Funnel, lengths: np.ndarray) -> float:
    """FLOPs with the funnel divided by FLOPs without: the latency ratio if everything but the products were free."""
    return forward_flops(config, funnel, lengths) / forward_flops(config, FunnelConfig(), lengths)


def layer_flops(config: EncoderConfig, step: LayerStep, *, tokens: int, queries: int, keys: int, pairs: int) -> int:
    """FLOPs of one layer: query, output and key/value projections, MLP, per-layer inputs, scores and weighted sum.

    Args:
        tokens: rows of stride 1, from which per-layer inputs are projected.
        queries, keys: rows of the queries, and of the keys and values.
        pairs: of a query and a key that it sees.
    """
    width, heads = config.hidden_size, config.heads(step.layer_type)
    if isinstance(config, FunnelTransformerConfig):  # no gate; a pair also has a score for its distance
        per_query = 2 * 2 * width * heads.query_width + 4 * width * config.intermediate_size
        return queries * per_query + keys * 2 * 2 * width * heads.key_width + 6 * heads.query_width * pairs
    per_layer = 2 * width * config.per_layer_width  # of one product
    per_query = 2 * 2 * width * heads.query_width + 6 * width * config.mlp_width(step.layer) + 2 * per_layer
    per_key = 0 if step.shares_keys else 2 * 2 * width * heads.key_width
    return tokens * per_layer + queries * per_query + keys * per_key + 4 * heads.query_width * pairs


def count_pairs(queries: LevelRows, keys: LevelRows, window: tuple[int | None, int | None], rows: int) -> int:
    lo, hi = queries.intervals(keys, *window, rows // queries.stride)
    return int((hi - lo).sum(dtype=np.int64))
