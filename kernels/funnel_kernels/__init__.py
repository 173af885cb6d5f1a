"""The ops of a funnel encoder on packed rows. Each op has a folder; its reference.py is the specification."""

from funnel_kernels.add_norm import add_norm
from funnel_kernels.attention import attention
from funnel_kernels.errors import BackendUnavailable, CheckpointError, ConfigError, FunnelError, InputError
from funnel_kernels.linear import (
    PackedWeight,
    QuantizedWeight,
    Weight,
    gated_linear,
    linear,
    linear_add_norm,
    prepare,
    project_heads,
    quantize,
)
from funnel_kernels.mlp import mlp
from funnel_kernels.norm import rms_norm
from funnel_kernels.pool_norm import pool_norm
from funnel_kernels.post_norm import post_norm
from funnel_kernels.recover_norm import recover_norm
from funnel_kernels.relative_attention import relative_attention
from funnel_kernels.target import BACKENDS, Record, Target

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "CheckpointError",
    "ConfigError",
    "FunnelError",
    "InputError",
    "PackedWeight",
    "QuantizedWeight",
    "Record",
    "Target",
    "Weight",
    "add_norm",
    "attention",
    "gated_linear",
    "linear",
    "linear_add_norm",
    "mlp",
    "pool_norm",
    "post_norm",
    "prepare",
    "project_heads",
    "quantize",
    "recover_norm",
    "relative_attention",
    "rms_norm",
]
