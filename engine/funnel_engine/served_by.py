"""Finds out which backends serve the ops of a model: traces its forward pass without weights."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from funnel_engine.config import FunnelConfig
from funnel_engine.devices import Tree, batch_shapes, default_activations, map_weights
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.heads import HeadConfig
from funnel_engine.models import forward_of
from funnel_engine.packing import make_plan, row_alignment, row_buckets
from funnel_engine.weights import (
    cast,
    dtype_for,
    expected_shapes,
    join_scales,
    nest,
    prepare_weight,
    tensor_types,
)
from funnel_kernels import Record, Target


def served_by(config: EncoderConfig, funnel: FunnelConfig, dtype: str, target: Target) -> Record:
    """The record of the program for the smallest bucket, with weights of a dtype. Nothing is computed.

    Raises:
        BackendUnavailable: the target's backend does not support an op.
    """
    record = Record()
    plan = make_plan(config, funnel)
    shapes = expected_shapes(config, HeadConfig())
    activations = default_activations(dtype, target)

    def make_tree(weights: Mapping[str, Any]) -> Tree:
        def in_dtype(name: str, weight: Any) -> Any:
            return cast(name, weight, dtype_for(name, dtype, activations))

        return map_weights(in_dtype, nest(weights, config, funnel))

    tree = jax.eval_shape(make_tree, join_scales(tensor_types(shapes, dtype)))
    params = map_weights(partial(prepare_weight, dtype=dtype, activations=activations, target=target), tree)
    recorded = dataclasses.replace(target, record=record)
    encoder = partial(forward_of(config), config=config, funnel=funnel, dtype=activations, target=recorded)
    jax.eval_shape(
        encoder, params, batch_shapes(plan, row_buckets(plan, 1, alignment=row_alignment(target.platform))[0])
    )
    return record
