"""The funnels that a plan considers, and what they cost as far as that is known without running them."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from funnel_engine.config import Funnel, FunnelConfig, layer_steps
from funnel_engine.flops import forward_flops, layer_flops, lengths_by_funnel
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.packing import make_plan, spans
from funnel_training.scores import Ints

DEPTHS = 6  # places of a funnel
STRIDES = (2, 3, 4, 8)


def grid(num_layers: int, *, reads_last: bool = False, recovery: str | None = None) -> list[FunnelConfig]:
    """One funnel at each depth with each stride and options, and two of stride 2 at each pair of depths.

    207 funnels for a model of 7 layers or more.

    Args:
        reads_last: the model reads the last token's row, which `keep_last` leaves alone; else `keep_first` is tried.
    """
    places, kept = depths(num_layers), "keep_last" if reads_last else "keep_first"
    # Position "last" is left out: RoPE is relative, so it differs from "first" only in windows that are not full.
    choices: tuple[dict[str, Any], ...] = (
        {"pool": "mean"},
        {"pool": "mean", kept: True},
        {"pool": "mean", "positions": "mid"},
        {"pool": "mean", "positions": "compact"},
        {"pool": "mean", "pool_query_only": True},
        {"pool": "max"},
        {"pool": "max", kept: True},
        {"pool": "first"},
    )
    single = [
        FunnelConfig.after(layer, stride=stride, recovery=recovery, **options)
        for layer, stride, options in itertools.product(places, STRIDES, choices)
    ]
    double = [
        FunnelConfig((1,) * first + (2,) + (1,) * (second - first - 1) + (2,), pool="mean", recovery=recovery)
        for first, second in itertools.combinations(places, 2)
    ]
    return single + double


def depths(num_layers: int) -> list[int]:
    """Numbers of full-length layers, evenly spaced, from a ninth of the layers to all but one: 2, 5, ... 17 of 18."""
    last = num_layers - 1
    return sorted({round(place) for place in np.linspace(min(max(1, num_layers // 9), last), last, DEPTHS)})


def pools_more(funnel: FunnelConfig, other: FunnelConfig) -> bool:
    """Whether two funnels have the same options, and this one has no more rows at any layer, and fewer at some."""
    if funnel == other or dataclasses.replace(funnel, strides=other.strides) != other:
        return False
    layers = max(len(funnel.strides), len(other.strides))
    totals = (np.cumprod(each.strides + (1,) * (layers - len(each.strides))) for each in (funnel, other))
    return bool(np.greater_equal(*totals).all())


def computed_flops(config: EncoderConfig, funnel: Funnel, lengths: Ints) -> int:
    """FLOPs of a forward pass with the rows of padding that the funnel needs.

    A sequence starts at a multiple of the total stride. So a large stride, and `keep_first` and `keep_last` even more,
    add rows before the funnel, which `forward_flops` leaves out.
    """
    return forward_flops(config, funnel, lengths) + sum(
        padding_flops(config, each, part) for each, part in lengths_by_funnel(funnel, lengths)
    )


def padding_flops(config: EncoderConfig, funnel: FunnelConfig, lengths: Ints) -> int:
    """FLOPs of the rows of padding of sequences that run with the same funnel."""
    plan, steps = make_plan(config, funnel), layer_steps(config, funnel)
    padded = int(plan.rows_needed(lengths).sum())
    padding = {stride: padded // stride - int(spans(plan, lengths, stride).rows.sum()) for stride in plan.strides}
    return sum(
        layer_flops(
            config,
            step,
            tokens=padding[1],
            queries=padding[step.query_stride],
            keys=padding[step.key_stride],
            pairs=0,
        )
        for step in steps
    )
