"""A forward-only engine for transformer encoders whose token sequence is pooled partway through the stack."""

from funnel_engine.checkpoints.convert import convert
from funnel_engine.config import FunnelByLength, FunnelConfig, ModelConfig, parse_funnel
from funnel_engine.engine import Engine
from funnel_engine.funnel_transformer_config import FunnelTransformerConfig
from funnel_engine.heads import HeadConfig
from funnel_engine.inputs import Ragged
from funnel_engine.presets import preset
from funnel_kernels.errors import BackendUnavailable, CheckpointError, ConfigError, FunnelError, InputError

__all__ = [
    "BackendUnavailable",
    "CheckpointError",
    "ConfigError",
    "Engine",
    "FunnelByLength",
    "FunnelConfig",
    "FunnelError",
    "FunnelTransformerConfig",
    "HeadConfig",
    "InputError",
    "ModelConfig",
    "Ragged",
    "convert",
    "parse_funnel",
    "preset",
]
