"""The ops of a Funnel-Transformer at its sizes, as `cases` has those of the other models."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from funnel_benchmarks.kernels.cases import STRIDE, Case, Sizes, forward_case, linear_case, op_case, pool_case
from funnel_benchmarks.kernels.layouts import Layout, packed
from funnel_engine import FunnelTransformerConfig
from funnel_kernels import Target, post_norm, relative_attention


def funnel_transformer_cases(sizes: Sizes, config: FunnelTransformerConfig) -> list[Case]:
    """Products, attention of all rows and of pooled queries, what works on whole rows, and the whole forward pass."""
    width, mlp, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    return [
        linear_case(sizes, width, 3 * heads),
        linear_case(sizes, heads, width),
        linear_case(sizes, width, mlp),
        linear_case(sizes, mlp, width),
        *(relative_attention_case(sizes, config, stride) for stride in (1, STRIDE)),
        post_norm_case(sizes, config),
        pool_case(sizes, STRIDE, "mean"),
        forward_case(sizes),
    ]


def relative_attention_case(sizes: Sizes, config: FunnelTransformerConfig, stride: int) -> Case:
    """Queries on a stride over keys on stride 1, with a row for every distance that the model has."""
    layout, width = packed(sizes.lengths, stride=stride), config.num_heads * config.head_dim
    distances = 2 * min(config.max_positions, layout.keys) + 1

    def arrays(target: Target) -> tuple[Any, ...]:
        shapes = (layout.queries, width), (layout.keys, width), (layout.keys, width)
        q, k, v = (sizes.normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
        terms = (sizes.normal(rows, width, seed=3 + seed) for seed, rows in enumerate((3, distances, 2)))
        return q, k, v, *bounds_and_types(layout), *terms

    heads = f"{config.num_heads} heads of {config.head_dim}"
    name = f"relative_attention, {layout.queries} queries on stride {stride}, {heads}"
    moved = sizes.itemsize * width * (2 * layout.queries + 2 * layout.keys + 3 + distances + 2)
    options: Any = {"heads": config.num_heads, "scale": config.head_dim**-0.5, "stride": stride}
    options["separate_first"] = config.separate_cls
    return op_case(name, relative_attention, arrays, 6 * width * layout.pairs, moved, **options)


def bounds_and_types(layout: Layout) -> list[Any]:
    """The intervals of the queries, and random types of queries and keys."""
    generator = np.random.default_rng(0)
    types = [generator.integers(0, 2, rows).astype(np.int32) for rows in (layout.queries, layout.keys)]
    return [jnp.asarray(array) for array in (layout.lo, layout.hi, *types)]


def post_norm_case(sizes: Sizes, config: FunnelTransformerConfig) -> Case:
    """The end of a sub-layer. Its output is float32, as that of a product is."""
    rows, width = sizes.row_wise_rows, config.hidden_size

    def arrays(target: Target) -> tuple[Any, ...]:
        update = sizes.normal(rows, width, seed=1).astype(jnp.float32)
        return sizes.normal(rows, width), update, sizes.normal(2, width, seed=2)

    moved = (2 * sizes.itemsize + 4) * rows * width
    return op_case(f"post_norm, {rows} x {width}", post_norm, arrays, 0, moved, eps=config.norm_eps)
