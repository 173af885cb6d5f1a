"""The forward pass of a funneled Gemma encoder: one pure function, read from top to bottom.

Weights are matrices `[out, in]` as Hugging Face and safetensors have them: `q`, `k` and `v` are one matrix, gate and up
another. A backend may have them in a layout of its own (`funnel_kernels.linear.prepare`). The layers are a Python loop
over a list, not a scan over stacked weights, because a scan copies every layer's weights out of the stack at run time.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funnel_engine.config import RECOVERIES, FunnelConfig, ModelConfig, Rope, layer_steps
from funnel_engine.packing import Batch
from funnel_kernels import (
    Target,
    add_norm,
    attention,
    linear_add_norm,
    mlp,
    pool_norm,
    project_heads,
    recover_norm,
)

Params = Mapping[str, Any]  # names and shapes: `weights.expected_shapes`


def forward(
    params: Params,
    batch: Batch,
    *,
    config: ModelConfig,
    funnel: FunnelConfig,
    target: Target,
    axis: str | None = None,
) -> jax.Array:
    """Runs the encoder on a packed batch.

    Args:
        params: weights, see `weights.expected_shapes`; float32 or bfloat16, which is the dtype of the activations.
        batch: N packed rows, made by `packing.pack` with the plan of the same `config` and `funnel`.
        config, funnel: the architecture and its funnel.
        target: where it runs, and by whose kernels.
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
    x, normed = add_norm(x, None, layers[0]["attention_input_norm"], eps=eps, target=target)
    next_norms = [*(weights["attention_input_norm"] for weights in layers[1:]), params["final_norm"]]

    for weights, step, next_norm in zip(layers, steps, next_norms, strict=True):
        unpooled = normed
        if step.pool > 1:
            real = batch.levels[step.query_stride // step.pool].real
            x, normed = pool_norm(
                x, real, weights["attention_input_norm"], stride=step.pool, pool=funnel.pool, eps=eps, target=target
            )

        # Attention: queries from the (pooled) rows, keys and values from those or from the unpooled ones.
        norms = (weights["query_norm"], weights["key_norm"]) if config.qk_norm else None
        heads, kv_heads = config.num_heads, config.num_kv_heads
        project = partial(project_heads, eps=eps, target=target)
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
            q,
            k,
            v,
            lo,
            hi,
            heads=heads,
            kv_heads=kv_heads,
            scale=config.query_scale,
            softcap=config.softcap,
            target=target,
        )
        x, normed = linear_add_norm(
            attended,
            weights["attention_output"],
            x,
            weights["mlp_input_norm"],
            update_weight=weights.get("attention_output_norm"),
            eps=eps,
            axis=axis,
            target=target,
        )
        x, normed = mlp(
            x,
            normed,
            weights["gate_up"],
            weights["down"],
            next_norm,
            update_weight=weights.get("mlp_output_norm"),
            eps=eps,
            axis=axis,
            target=target,
        )

        # What the recovery needs of the full-length layers, in one buffer.
        if source and step.query_stride == 1:
            full_layers += 1
            full = keep(source, full, x, full_layers)

    if recovery is None:
        return normed
    if source == "mean" and full_layers:
        full = full / full_layers
    return recover_norm(
        x,
        full,
        params["final_norm"],
        stride=funnel.total_stride,
        mode=recovery.mode,
        site=funnel.recovery_site,
        eps=eps,
        target=target,
    )


def gather_columns(x: jax.Array, axis: str | None) -> jax.Array:
    """Every device's columns side by side, [N, D / T] -> [N, D]; without an axis they are all here."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)


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
