"""Ready-made sweeps: every kind of funnel in a model of the paper (arXiv:2504.02877), over lengths of sequences."""

import numpy as np

from funnel_benchmarks.latency.layers import even_layers
from funnel_benchmarks.latency.suite import Batch
from funnel_engine import FunnelConfig
from funnel_engine.config import RECOVERIES

SWEEPS = ("gemma-2b", "gemma-7b")  # names of presets
LENGTHS = (512, 4096, 8192)
TOKENS = 8192  # of each batch, so that all lengths fill a device alike
QUICK_TOKENS = 512


def sweep_funnels(num_layers: int) -> tuple[FunnelConfig, ...]:
    """2:1 and 4:1 after every even layer; two 2:1 funnels; pooled queries over unpooled keys; every recovery."""
    layers = even_layers(num_layers)
    first, middle, late = layers[0], layers[(len(layers) - 1) // 2], layers[3 * len(layers) // 4]
    return (
        *(FunnelConfig.after(layer, stride=stride) for stride in (2, 4) for layer in layers),
        *(two_funnels(*places) for places in ((first, middle), (middle, late))),
        *(FunnelConfig.after(layer, pool_query_only=True) for layer in (first, middle, late)),
        *(FunnelConfig.after(middle, recovery=recovery) for recovery in RECOVERIES),
    )


def two_funnels(first: int, second: int) -> FunnelConfig:
    """2:1 after `first` layers, and 2:1 again after `second` of the model's layers."""
    return FunnelConfig(strides=(1,) * first + (2,) + (1,) * (second - first - 1) + (2,))


def sweep_batches(quick: bool) -> tuple[Batch, ...]:
    """As many tokens at every length; quickly, one sequence of 512."""
    lengths, tokens = (LENGTHS[:1], QUICK_TOKENS) if quick else (LENGTHS, TOKENS)
    return tuple(Batch(np.full(tokens // length, length, np.int32)) for length in lengths)
