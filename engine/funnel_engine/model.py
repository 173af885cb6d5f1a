"""The forward pass of a funneled Gemma encoder: one pure function, read from top to bottom.

Weights are matrices `[out, in]` as Hugging Face and safetensors have them: `q`, `k` and `v` are one matrix, gate and up
another. A backend may have them in a layout of its own (`funnel_kernels.linear.prepare`). The layers are a Python loop
over a list, not a scan over stacked weights, because a scan copies every layer's weights out of the stack at run time.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funnel_engine.config import RECOVERIES, FunnelConfig, ModelConfig, Rope, layer_steps
from funnel_engine.packing import Batch
from funnel_kernels import (
    Weight,
    add_norm,
    attention,
    gated_linear,
    linear,
    linear_add_norm,
    pool_norm,
    project_heads,
    recover_norm,
)

Params = Mapping[str, Any]  # names and shapes: `weights.expected_shapes`

HIDDEN_PER_BLOCK = 2**24  # numbers between the MLP's products in one block of rows, see `in_blocks`


def forward(
    params: Params,
    batch: Batch,
    *,
    config: ModelConfig,
    funnel: FunnelConfig,
    backend: str = "auto",
    axis: str | None = None,
) -> jax.Array:
    """Runs the encoder on a packed batch.

    Args:
        params: weights, see `weights.expected_shapes`; float32 or bfloat16, which is the dtype of the activations.
        batch: N packed rows, made by `packing.pack` with the plan of the same `config` and `funnel`.
        config, funnel: the architecture and its funnel.
        backend: which implementation runs the ops, see `funnel_kernels.dispatch`.
        axis: inside a `jax.shard_map`, the mesh axis along which devices share the heads and the MLP's width; `config`
            and `params` are then one device's, see `sharding`.

    Returns:
        [N / funnel.output_stride, hidden_size] rows after the final norm, in the dtype of the weights. Rows that hold
        no token are finite and mean nothing.

    Raises:
        ConfigError: the funnel does not fit the model.
        BackendUnavailable: an op is not served by the backend.
    """
    dtype = params["embedding"].dtype
    eps = config.norm_eps
    recovery = RECOVERIES[funnel.recovery] if funnel.recovery else None
    source = recovery.source if recovery else None
    steps = layer_steps(config, funnel)

    x = gather_columns(params["embedding"][batch.ids], axis)  # [N, D], the residual stream
    x = x * jnp.asarray(config.hidden_size**0.5, dtype)
    full: Any = x if source else None  # full-length activations kept for the recovery: one buffer
    full_layers = 0  # how many layers' outputs it holds
    rotations = {
        (stride, step.layer_type): rotation(config.rope(step.layer_type), config.head_dim, level.positions)
        for stride, level in batch.levels.items()
        for step in steps
        if stride in (step.query_stride, step.key_stride)
    }

    # What comes before each sub-layer is the norm of the residual stream, made together with the stream itself.
    layers = params["layers"]
    x, normed = add_norm(x, None, layers[0]["attention_input_norm"], eps=eps, backend=backend)
    next_norms = [*(weights["attention_input_norm"] for weights in layers[1:]), params["final_norm"]]

    for weights, step, next_norm in zip(layers, steps, next_norms, strict=True):
        unpooled = normed
        if step.pool > 1:
            real = batch.levels[step.query_stride // step.pool].real
            x, normed = pool_norm(
                x, real, weights["attention_input_norm"], stride=step.pool, pool=funnel.pool, eps=eps, backend=backend
            )

        # Attention: queries from the (pooled) rows, keys and values from those or from the unpooled ones.
        norms = (weights["query_norm"], weights["key_norm"]) if config.qk_norm else None
        heads, kv_heads = config.num_heads, config.num_kv_heads
        project = partial(project_heads, eps=eps, backend=backend)
        if step.key_stride == step.query_stride:
            angles = rotations[step.query_stride, step.layer_type]
            q, k, v = project(normed, weights["qkv"], *angles, norms, heads=(heads, kv_heads), plain_heads=kv_heads)
        else:
            query_angles, key_angles = (rotations[s, step.layer_type] for s in (step.query_stride, step.key_stride))
            query_norm, key_norm = ((norm,) for norm in norms) if norms else (None, None)
            (q,) = project(normed, weights["q"], *query_angles, query_norm, heads=(heads,))
            k, v = project(unpooled, weights["kv"], *key_angles, key_norm, heads=(kv_heads,), plain_heads=kv_heads)
        lo, hi = batch.intervals[step.query_stride, step.key_stride, step.layer_type]
        attended = attention(
            q, k, v, lo, hi,
            heads=heads, kv_heads=kv_heads, scale=config.query_scale, softcap=config.softcap, backend=backend,
        )  # fmt: skip
        post_norm = weights["attention_output_norm"] if config.post_norms else None
        x, normed = add_product(
            x, attended, weights["attention_output"], post_norm, weights["mlp_input_norm"], eps, axis, backend
        )

        feed_forward = partial(mlp, weights, next_norm, config, axis, backend)
        blocks = partial(in_blocks, feed_forward, rows_per_block(config))
        x, normed = jax.lax.platform_dependent(x, normed, cpu=blocks, default=feed_forward)

        # What the recovery needs of the full-length layers, in one buffer.
        if source and step.query_stride == 1:
            full_layers += 1
            full = keep(source, full, x, full_layers)

    if recovery is None:
        return normed
    if source == "mean" and full_layers:
        full = full / full_layers
    return recover_norm(
        x, full, params["final_norm"],
        stride=funnel.total_stride, mode=recovery.mode, site=funnel.recovery_site, eps=eps, backend=backend,
    )  # fmt: skip


def mlp(
    weights: Params,
    next_norm: jax.Array,
    config: ModelConfig,
    axis: str | None,
    backend: str,
    x: jax.Array,  # [N, D]
    normed: jax.Array,  # [N, D]
) -> tuple[jax.Array, jax.Array]:  # [N, D] each
    """`x + down(gelu(gate(normed)) * up(normed))`, and the norm that the next layer begins with."""
    hidden = gated_linear(normed, weights["gate_up"], backend=backend)
    post_norm = weights["mlp_output_norm"] if config.post_norms else None
    return add_product(x, hidden, weights["down"], post_norm, next_norm, config.norm_eps, axis, backend)


def add_product(
    x: jax.Array,  # [N, D], the residual stream
    rows: jax.Array,  # [N, in]
    weight: Weight,  # [D, in]
    post_norm: jax.Array | None,  # [D]
    next_norm: jax.Array,  # [D]
    eps: float,
    axis: str | None,
    backend: str,
) -> tuple[jax.Array, jax.Array]:  # [N, D] each
    """The end of a sub-layer: `x + rows @ weight.T`, and its norm with the weight `next_norm`.

    The product is summed over devices, and normalised before it is added if the family does that.
    """
    if axis is None:
        return linear_add_norm(rows, weight, x, next_norm, update_weight=post_norm, eps=eps, backend=backend)
    update = total(linear(rows, weight, backend=backend), axis, x.dtype)
    return add_norm(x, update, next_norm, update_weight=post_norm, eps=eps, backend=backend)


Rows = tuple[jax.Array, ...]  # [N, D] each


def rows_per_block(config: ModelConfig) -> int:
    """How many rows the MLP takes at a time on a CPU: 1024 of Gemma 2B's, all of a small model's."""
    return max(1, HIDDEN_PER_BLOCK // config.intermediate_size)


def in_blocks(function: Callable[..., Rows], most_rows: int, *arrays: jax.Array) -> Rows:
    """Replaces rows of arrays by a function of them, in blocks of near-equal size, one after another.

    The MLP's hidden rows are many times wider than its input. In blocks their memory does not grow with N, and XLA
    multiplies faster: a layer of Gemma 2B on 4096 rows runs at 337 GFLOP/s on two cores so, and at 296 in one block.
    Copying a block's rows in and out costs nothing beside that, unless the MLP is narrow: EmbeddingGemma's takes a
    third longer in blocks of 1024 rows. An accelerator wants large products.
    """
    rows = arrays[0].shape[0]
    blocks = -(-rows // most_rows)
    if blocks == 1:
        return function(*arrays)
    size = -(-rows // blocks)

    def update(block: jax.Array, arrays: Rows) -> Rows:
        taken = [jax.lax.dynamic_slice_in_dim(array, block * size, size) for array in arrays]
        replaced = zip(arrays, function(*taken), strict=True)
        return tuple(jax.lax.dynamic_update_slice_in_dim(array, new, block * size, axis=0) for array, new in replaced)

    padded = tuple(jnp.pad(array, ((0, blocks * size - rows), (0, 0))) for array in arrays)
    return tuple(array[:rows] for array in jax.lax.fori_loop(0, blocks, update, padded))


def gather_columns(x: jax.Array, axis: str | None) -> jax.Array:
    """Every device's columns side by side, [N, D / T] -> [N, D]; without an axis they are all here."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)


def total(update: jax.Array, axis: str, dtype: jnp.dtype) -> jax.Array:
    """The sum of every device's share of an update, [N, D].

    It is summed in the dtype of the activations: in float32 twice as much would travel between devices.
    """
    return jax.lax.psum(update.astype(dtype), axis)


def rotation(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """RoPE's cosines and sines, `[N, head_dim / 2]` float32 each, of positions [N].

    The frequencies are made by jax.numpy on the host in the order of operations of transformers, and stay constants
    of the program: another power function moves a cosine at position 8191 by 7e-4.
    """
    with jax.ensure_compile_time_eval(), jax.default_device(jax.local_devices(backend="cpu")[0]):
        exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        frequencies = 1.0 / (rope.theta**exponents) / rope.factor
    angles = positions[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def keep(source: str, kept: jax.Array, x: jax.Array, layers: int) -> jax.Array:
    """The recovery buffer after the `layers`-th full-length layer, whose output is `x`."""
    if layers == 1:  # from here on the buffer no longer holds the embedding, which only stands in for no layer at all
        return x.astype(jnp.float32) if source == "mean" else x
    if source == "max":
        return jnp.maximum(kept, x)
    if source == "mean":
        return kept + x  # a float32 sum until it is divided
    return x if source == "last" else kept
