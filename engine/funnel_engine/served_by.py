"""Finds out which backends serve the ops of a model: traces its forward pass without weights."""

import dataclasses
from functools import partial

import jax

from funnel_engine.config import FunnelConfig, ModelConfig
from funnel_engine.devices import batch_shapes, map_weights
from funnel_engine.heads import HeadConfig
from funnel_engine.model import forward
from funnel_engine.packing import make_plan, row_buckets
from funnel_engine.weights import DTYPES, expected_shapes, nest, prepare_weight
from funnel_kernels import Record, Target


def served_by(config: ModelConfig, funnel: FunnelConfig, dtype: str, target: Target) -> Record:
    """The record of the program for the smallest bucket. Nothing is computed.

    Raises:
        BackendUnavailable: the target's backend does not support an op.
    """
    record = Record()
    plan = make_plan(config, funnel)
    shapes = expected_shapes(config, HeadConfig())
    weights = {name: jax.ShapeDtypeStruct(shape, DTYPES[dtype]) for name, shape in shapes.items()}
    tree = jax.eval_shape(partial(nest, config=config, funnel=funnel), weights)
    params = map_weights(partial(prepare_weight, dtype=dtype, target=target), tree)
    encoder = partial(forward, config=config, funnel=funnel, target=dataclasses.replace(target, record=record))
    jax.eval_shape(encoder, params, batch_shapes(plan, row_buckets(plan, 1)[0]))
    return record
