"""The forward pass of a funneled Gemma encoder: one pure function, read from top to bottom.

Weights are matrices `[out, in]` as Hugging Face and safetensors have them, used in place: `q`, `k` and `v` are one
matrix, gate and up another. The layers are a Python loop over a list, not a scan over stacked weights, because a scan
copies every layer's weights out of the stack at run time.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funnel_engine.config import RECOVERIES, FunnelConfig, ModelConfig, Rope, layer_steps
from funnel_engine.packing import Batch
from funnel_kernels import attention, pool_norm, recover_norm, rms_norm

Params = Mapping[str, Any]  # names and shapes: `weights.expected_shapes`

ROWS_PER_BLOCK = 1024  # of the MLP, see `in_blocks`


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

    for weights, step in zip(params["layers"], steps, strict=True):
        # Pooling, and the norm before attention.
        if step.pool > 1:
            unpooled = x
            real = batch.levels[step.query_stride // step.pool].real
            x, normed = pool_norm(
                x, real, weights["attention_input_norm"], stride=step.pool, pool=funnel.pool, eps=eps, backend=backend
            )
        else:
            normed = rms_norm(x, weights["attention_input_norm"], eps).astype(dtype)

        # Attention: queries from the (pooled) rows, keys and values from those or from the unpooled ones.
        if step.key_stride == step.query_stride:
            q, k, v = split_columns(project(normed, weights["qkv"]), config)
        else:
            k_normed = rms_norm(unpooled, weights["attention_input_norm"], eps).astype(dtype)
            q = project(normed, weights["q"])
            k, v = jnp.split(project(k_normed, weights["kv"]), 2, axis=1)
        if config.qk_norm:
            q, k = head_norm(q, weights["query_norm"], eps), head_norm(k, weights["key_norm"], eps)
        q = rotate(q, rotations[step.query_stride, step.layer_type])
        k = rotate(k, rotations[step.key_stride, step.layer_type])
        lo, hi = batch.intervals[step.query_stride, step.key_stride, step.layer_type]
        attended = attention(
            q.astype(dtype), k.astype(dtype), v.astype(dtype), lo, hi,
            heads=config.num_heads, kv_heads=config.num_kv_heads,
            scale=config.query_scale, softcap=config.softcap, backend=backend,
        )  # fmt: skip
        update = total(project(attended, weights["attention_output"]), axis, dtype)
        if config.post_norms:
            update = rms_norm(update, weights["attention_output_norm"], eps)
        x = (x + update).astype(dtype)

        feed_forward = partial(mlp, weights, config, axis)
        x = jax.lax.platform_dependent(
            x, cpu=partial(in_blocks, partial(feed_forward, jnp.float32)), default=partial(feed_forward, dtype)
        )

        # What the recovery needs of the full-length layers, in one buffer.
        if source and step.query_stride == 1:
            full_layers += 1
            full = keep(source, full, x, full_layers)

    if recovery is None:
        return rms_norm(x, params["final_norm"], eps).astype(dtype)
    if source == "mean" and full_layers:
        full = full / full_layers
    return recover_norm(
        x, full, params["final_norm"],
        stride=funnel.total_stride, mode=recovery.mode, site=funnel.recovery_site, eps=eps, backend=backend,
    )  # fmt: skip


def mlp(weights: Params, config: ModelConfig, axis: str | None, wide: jnp.dtype, x: jax.Array) -> jax.Array:
    """`x + down(gelu(gate(x)) * up(x))` with its norms: GeGLU (arXiv:2002.05202), the tanh approximation of gelu.

    `wide` is the dtype of gate and up, the largest arrays of all. On a CPU float32 costs nothing; an accelerator must
    write and read them, so there they are rounded to the dtype of the activations, as transformers does everywhere.
    """
    normed = rms_norm(x, weights["mlp_input_norm"], config.norm_eps).astype(x.dtype)
    gate_up = project(normed, weights["gate_up"], wide)
    # Split first: XLA would widen the whole before it is written.
    gate, up = (half.astype(jnp.float32) for half in jnp.split(gate_up, 2, axis=1))
    hidden = (jax.nn.gelu(gate, approximate=True) * up).astype(x.dtype)
    update = total(project(hidden, weights["down"]), axis, x.dtype)
    if config.post_norms:
        update = rms_norm(update, weights["mlp_output_norm"], config.norm_eps)
    return (x + update).astype(x.dtype)


def in_blocks(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Replaces rows by a function of them, in blocks of near-equal size, one after another; [N, D] -> [N, D].

    The MLP's hidden rows are many times wider than its input. In blocks they stay in a CPU's cache, and their memory
    does not grow with N. On two cores a layer of Gemma 2B on 4096 rows runs at 337 GFLOP/s so, and at 296 in one block.
    An accelerator has no such cache and wants large products.
    """
    rows = x.shape[0]
    blocks = -(-rows // ROWS_PER_BLOCK)
    if blocks == 1:
        return function(x)
    size = -(-rows // blocks)

    def update(block: jax.Array, x: jax.Array) -> jax.Array:
        taken = jax.lax.dynamic_slice_in_dim(x, block * size, size)
        return jax.lax.dynamic_update_slice_in_dim(x, function(taken), block * size, axis=0)

    return jax.lax.fori_loop(0, blocks, update, jnp.pad(x, ((0, blocks * size - rows), (0, 0))))[:rows]


def project(x: jax.Array, weight: jax.Array, result: jnp.dtype = jnp.float32) -> jax.Array:
    """`x @ weight.T` of `[N, in]` and `[out, in]`, accumulated in float32 and, unless told otherwise, not rounded."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dimensions, precision=precision, preferred_element_type=result)


def gather_columns(x: jax.Array, axis: str | None) -> jax.Array:
    """Every device's columns side by side, [N, D / T] -> [N, D]; without an axis they are all here."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)


def total(update: jax.Array, axis: str | None, dtype: jnp.dtype) -> jax.Array:
    """The sum of every device's share of an update, [N, D]; without an axis the update is whole.

    It is summed in the dtype of the activations: in float32 twice as much would travel between devices.
    """
    return update if axis is None else jax.lax.psum(update.astype(dtype), axis)


def split_columns(qkv: jax.Array, config: ModelConfig) -> list[jax.Array]:
    """[N, (heads + 2 * kv_heads) * d] -> queries, keys and values side by side."""
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return jnp.split(qkv, (q_width, q_width + kv_width), axis=1)


def per_head(function: Callable[..., jax.Array], x: jax.Array, head_dim: int, *tables: jax.Array) -> jax.Array:
    """Applies a function to every head of `[N, heads * d]`; it gets `[..., d]`, and tables of N rows that fit.

    A view of the heads is free, except on a TPU, where it moves all of x: there each head is cut out by itself.
    """

    def together(x: jax.Array) -> jax.Array:
        heads = x.reshape(x.shape[0], -1, head_dim)
        return function(heads, *(table[:, None] for table in tables)).reshape(x.shape)

    def one_by_one(x: jax.Array) -> jax.Array:
        heads = jnp.split(x, x.shape[1] // head_dim, axis=1)
        return jnp.concatenate([function(head, *tables) for head in heads], axis=1)

    return jax.lax.platform_dependent(x, tpu=one_by_one, default=together)


def head_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm of every head of `[N, heads * d]` by itself, with `weight` [d] (Gemma 3's query and key norms)."""
    return per_head(lambda head: rms_norm(head, weight, eps), x, weight.shape[0])


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


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates every head of `[N, heads * d]`, pairing the halves of a head; float32."""

    def turn(head: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        first, second = jnp.split(head, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    return per_head(turn, x, 2 * cos_sin[0].shape[1], *cos_sin)


def keep(source: str, kept: jax.Array, x: jax.Array, layers: int) -> jax.Array:
    """The recovery buffer after the `layers`-th full-length layer, whose output is `x`."""
    if layers == 1:  # from here on the buffer no longer holds the embedding, which only stands in for no layer at all
        return x.astype(jnp.float32) if source == "mean" else x
    if source == "max":
        return jnp.maximum(kept, x)
    if source == "mean":
        return kept + x  # a float32 sum until it is divided
    return x if source == "last" else kept
