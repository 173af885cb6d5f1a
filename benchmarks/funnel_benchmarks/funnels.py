"""The funnels that are measured: what they are called, and whether a model can have them."""

import dataclasses

from funnel_benchmarks.results import Row
from funnel_engine import FunnelConfig
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.packing import make_plan
from funnel_kernels.errors import ConfigError

NO_FUNNEL = FunnelConfig()


def funnel_name(funnel: FunnelConfig) -> str:
    """Its places, and every option that is not the default: "2:1 after 2, 2:1 after 8, recovery tile"."""
    places = [f"{stride}:1 after {layer}" for layer, stride in enumerate(funnel.strides) if stride > 1]
    options = {name: value for name, value in vars(funnel).items() if name != "strides"}
    chosen = [(name, value) for name, value in options.items() if value != getattr(NO_FUNNEL, name)]
    return ", ".join([*places, *(name if value is True else f"{name} {value}" for name, value in chosen)])


def funnel_facts(funnel: FunnelConfig) -> Row:
    """What a result file says about it: its name, and all its options."""
    return {"name": funnel_name(funnel), **dataclasses.asdict(funnel)}


def check_funnel(config: EncoderConfig, funnel: FunnelConfig) -> None:
    """Raises `ConfigError` for a funnel that pools nothing, or that a model cannot have."""
    if funnel.total_stride == 1:
        raise ConfigError(f"strides={funnel.strides} pool nothing; a funnel needs a stride of at least 2")
    make_plan(config, funnel)
