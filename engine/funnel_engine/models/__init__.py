"""The forward passes: one for all architectures whose differences are data, and those of the others, a file each."""

from collections.abc import Callable

import jax

from funnel_engine import model
from funnel_engine.funnel_transformer_config import EncoderConfig, FunnelTransformerConfig
from funnel_engine.models import funnel_transformer


def forward_of(config: EncoderConfig) -> Callable[..., jax.Array]:
    """The function with the arguments of `model.forward` that runs an architecture on a packed batch."""
    return funnel_transformer.forward if isinstance(config, FunnelTransformerConfig) else model.forward
