"""The forward pass of a funneled encoder: two pure functions, to be read from top to bottom.

Weights are matrices `[out, in]`, as in Hugging Face checkpoints. `q`, `k` and `v` are one matrix, and so are gate and
up. A backend may store them in its own layout (`funnel_kernels.linear.prepare`). The layers are a Python loop over a
list and not a scan over stacked weights, because a scan copies the weights of every layer out of the stack at run time.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funnel_engine.config import (
    RECOVERIES,
    FunnelConfig,
    LayerStep,
    Llama3Scaling,
    ModelConfig,
    Rope,
    layer_steps,
)
from funnel_engine.packing import Batch
from funnel_kernels import (
    Target,
    add_norm,
    attention,
    gated_linear,
    linear,
    linear_add_norm,
    mlp,
    pool_norm,
    project_heads,
    recover_norm,
)

Params = Mapping[str, Any]  # names and shapes: `weights.expected_shapes`
KeysValues = tuple[jax.Array, jax.Array]


def forward(
    params: Params,
    batch: Batch,
    *,
    config: ModelConfig,
    funnel: FunnelConfig,
    dtype: Any,
    target: Target,
    axis: str | None = None,
    recompute: bool = False,
) -> jax.Array:
    """Runs the encoder on a packed batch.

    Args:
        params: weights, see `weights.expected_shapes`. Norms are float32. Matrices have the dtype of the activations,
            or they are int8, or bfloat16 beside activations of float32.
        batch: N packed rows, made by `packing.pack` with the plan of the same `config` and `funnel`.
        config, funnel: the architecture and its funnel.
        dtype: of the activations, float32 or bfloat16.
        target: where it runs, and with which kernels.
        axis: inside a `jax.shard_map`, the mesh axis along which the heads and the MLP's width are divided; `config`
            and `params` are then the part of one device, see `sharding`.
        recompute: keep only the arrays between layers for the derivative, which computes each layer once more.

    Returns:
        [N / funnel.output_stride, hidden_size] rows after the final norm, in the dtype of the activations. Rows
        without a token are finite, but have no meaning.

    Raises:
        ConfigError: the funnel does not fit the model.
        BackendUnavailable: the backend does not support an op.
    """
    eps = config.norm_eps
    recovery = RECOVERIES[funnel.recovery] if funnel.recovery else None
    source = recovery.source if recovery else None
    steps = layer_steps(config, funnel)

    x = gather_columns(params["embedding"][batch.ids].astype(dtype), axis)  # [N, D], the residual stream
    if config.scale_embedding:
        x = x * jnp.asarray(config.hidden_size**0.5, dtype)
    full: Any = x if source else None  # one buffer of full-length activations, for the recovery
    full_layers = 0  # the number of layers whose outputs are in it
    rotations = {
        (stride, step.layer_type): rotation(
            config.rope(step.layer_type), config.heads(step.layer_type).dim, level.positions
        )
        for stride, level in batch.levels.items()
        for step in steps
        if stride in (step.query_stride, step.key_stride)
    }

    # The input of each sub-layer is the norm of the residual stream, which is computed together with the stream.
    layers, embedded = params["layers"], x
    kept: dict[str, KeysValues] = {}  # of the last layer of each type
    x, normed = add_norm(x, None, layers[0]["attention_input_norm"], eps=eps, target=target)
    next_norms = [*(weights["attention_input_norm"] for weights in layers[1:]), params["final_norm"]]

    for weights, step, next_norm in zip(layers, steps, next_norms, strict=True):
        run = partial(
            layer,
            step,
            config=config,
            funnel=funnel,
            batch=batch,
            rotations=rotations,
            per_layer=partial(per_layer_input, step, params, embedded, batch=batch, config=config, target=target),
            target=target,
            axis=axis,
            recompute=recompute,
        )
        shared = kept[step.layer_type] if step.shares_keys else None
        x, normed, kept[step.layer_type] = (jax.checkpoint(run) if recompute else run)(
            weights, next_norm, x, normed, shared
        )

        if source and step.query_stride == 1:
            full_layers += 1
            full = update_recovery_buffer(full, x, source=source, layer=full_layers)

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


def layer(
    step: LayerStep,
    weights: Params,
    next_norm: jax.Array,
    x: jax.Array,
    normed: jax.Array,
    shared: KeysValues | None,
    *,
    config: ModelConfig,
    funnel: FunnelConfig,
    batch: Batch,
    rotations: Mapping[tuple[int, str], tuple[jax.Array, jax.Array]],
    per_layer: Callable[[jax.Array], jax.Array],
    target: Target,
    axis: str | None,
    recompute: bool,
) -> tuple[jax.Array, jax.Array, KeysValues]:
    """One layer, with the pooling before it: the residual stream `x` and its norm, [N, D] each, become the next ones.

    Args:
        weights: of this layer.
        next_norm: the weight of the norm that the next layer begins with.
        shared: the keys and values of an earlier layer, if this one has none of its own.
        rotations: RoPE's cosines and sines by stride and type of layer.
        per_layer: makes the per-layer input from the weight of its projection, see `per_layer_input`.

    Returns:
        The stream, its norm, and the keys and values of this layer.
    """
    eps = config.norm_eps
    unpooled = normed
    if step.pool > 1:
        real = batch.levels[step.query_stride // step.pool].real
        x, normed = pool_norm(
            x, real, weights["attention_input_norm"], stride=step.pool, pool=funnel.pool, eps=eps, target=target
        )

    # Attention: queries from the (pooled) rows, keys and values from the same rows or from the unpooled ones.
    heads, kv_heads, head_dim = config.heads(step.layer_type)
    query_norm, key_norm = weights.get("query_norm"), weights.get("key_norm")
    value_norm = jnp.zeros(head_dim, jnp.float32) if config.value_norm else None  # a factor of 1
    norms: tuple[Any, ...]

    def project(rows: jax.Array, name: str, *arrays: Any, **counts: Any) -> tuple[jax.Array, ...]:
        bias = weights.get(f"{name}_bias")
        return project_heads(rows, weights[name], *arrays, bias=bias, **counts, eps=eps, target=target)

    if shared is not None:
        angles = rotations[step.query_stride, step.layer_type]
        (q,) = project(normed, "q", *angles, (query_norm,), heads=(heads,))
        k, v = shared
    elif step.key_stride == step.query_stride:
        angles = rotations[step.query_stride, step.layer_type]
        norms = (query_norm, key_norm, value_norm)
        q, k, v = project(normed, "qkv", *angles, norms, heads=(heads, kv_heads), plain_heads=kv_heads)
    else:
        query_angles, key_angles = (rotations[s, step.layer_type] for s in (step.query_stride, step.key_stride))
        (q,) = project(normed, "q", *query_angles, (query_norm,), heads=(heads,))
        norms = key_norm, value_norm
        k, v = project(unpooled, "kv", *key_angles, norms, heads=(kv_heads,), plain_heads=kv_heads)
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
        bias=weights.get("attention_output_bias"),
        eps=eps,
        axis=axis,
        target=target,
    )
    scale = weights.get("layer_scalar")
    x, normed = mlp(
        x,
        normed,
        weights["gate_up"],
        weights["down"],
        next_norm,
        update_weight=weights.get("mlp_output_norm"),
        scale=None if config.per_layer_width else scale,
        gate_up_bias=weights.get("gate_up_bias"),
        down_bias=weights.get("down_bias"),
        activation=config.activation,
        eps=eps,
        axis=axis,
        one_block=recompute,
        target=target,
    )
    if config.per_layer_width:  # a third sub-layer: its gate reads the stream itself, not the norm of it
        per_layer_rows = per_layer(weights["per_layer_input"])
        hidden = gated_linear(x, weights["per_layer_gate"], per_layer_rows, activation=config.activation, target=target)
        x, normed = linear_add_norm(
            hidden,
            weights["per_layer_output"],
            x,
            next_norm,
            update_weight=weights["per_layer_output_norm"],
            scale=scale,
            eps=eps,
            target=target,
        )
    return x, normed, (k, v)


def per_layer_input(
    step: LayerStep,
    params: Params,
    embedded: jax.Array,
    projection: Any,
    *,
    batch: Batch,
    config: ModelConfig,
    target: Target,
) -> jax.Array:
    """What a layer reads of the tokens besides the residual stream (Gemma 4), `[N / query stride, per_layer_width]`.

    The embedding of each token is projected and normalised, and the token's row of a table is added, if there is one.
    After a funnel it is the mean over the tokens of each window, whatever the pooling of the stream is.

    Args:
        embedded: [N, D], the embedding of each token.
        projection: the rows of the layer, [per_layer_width, D].
    """
    # The product is divided by the root of the width before the norm, which is the same as a larger eps.
    eps = config.norm_eps * config.hidden_size
    product = linear(embedded, projection, target=target)
    _, rows = add_norm(product, None, params["per_layer_input_norm"], eps=eps, target=target)  # float32
    if config.per_layer_vocab:
        table = params["per_layer_embedding"][batch.ids * config.num_layers + step.layer].astype(rows.dtype)
        rows = (rows + table * config.per_layer_width**0.5) * 2**-0.5
    if step.query_stride > 1:
        real = batch.levels[1].real.reshape(-1, step.query_stride, 1)
        total = jnp.where(real, rows.reshape(*real.shape[:2], -1), 0.0).sum(axis=1)
        rows = total / jnp.maximum(real.sum(axis=1), 1)
    return rows.astype(embedded.dtype)


def gather_columns(x: jax.Array, axis: str | None) -> jax.Array:
    """The columns of all devices side by side, [N, D / T] -> [N, D]; without an axis x has all columns."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)


def rotation(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """RoPE's cosines and sines for positions [N], `[N, head_dim / 2]` float32 each.

    The frequencies are computed by jax.numpy on the host, in the order of operations of transformers, and are constants
    of the program. Another power function changes a cosine at position 8191 by 7e-4.
    """
    with jax.ensure_compile_time_eval(), jax.default_device(jax.local_devices(backend="cpu")[0]):
        exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        frequencies = 1.0 / (rope.theta**exponents) / rope.factor
        if rope.llama3:
            frequencies = stretch(frequencies, rope.llama3)
        rotated = int(rope.rotated * head_dim // 2)
        frequencies = jnp.where(jnp.arange(head_dim // 2) < rotated, frequencies, 0.0)
    angles = positions[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def stretch(frequencies: jax.Array, scaling: Llama3Scaling) -> jax.Array:
    """The frequencies of Llama 3, [head_dim / 2] each, see `Llama3Scaling`."""
    factor, low, high, positions = scaling
    wavelengths = 2 * math.pi / frequencies
    part = (positions / wavelengths - low) / (high - low)  # of the old frequency
    between = (1 - part) * frequencies / factor + part * frequencies
    stretched = jnp.where(wavelengths > positions / low, frequencies / factor, between)
    return jnp.where(wavelengths < positions / high, frequencies, stretched)


def update_recovery_buffer(buffer: jax.Array, x: jax.Array, *, source: str, layer: int) -> jax.Array:
    """The full-length activations that the recovery reads, after full-length layer number `layer` (from 1).

    Args:
        buffer: the activations before this layer; before the first layer, the embedding.
        x: the output of this layer.
        source: which activations the recovery reads, see `config.Recovery`.
    """
    if layer == 1:  # replaces the embedding, which is only read if there is no full-length layer
        return x.astype(jnp.float32) if source == "mean" else x
    if source == "max":
        return jnp.maximum(buffer, x)
    if source == "mean":
        return buffer + x  # a float32 sum, which is divided at the end
    return x if source == "last" else buffer
