"""Funnel-Transformer (Dai et al. 2020, arXiv:2006.03236): its weights and its forward pass, from top to bottom.

It differs from `model.py` in every part of a layer: norms come after the sub-layers and have a bias, as the products
do; attention adds a term for the distance of two rows and one for their token types. What is the same is the funnel:
rows, pooling, [CLS] alone in its window, and intervals of keys are those of `packing`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funnel_engine.config import FunnelConfig, LayerStep, layer_steps
from funnel_engine.funnel_transformer_config import FunnelTransformerConfig
from funnel_engine.packing import Batch
from funnel_kernels import Target, linear, pool_norm, post_norm, relative_attention
from funnel_kernels.errors import ConfigError
from funnel_kernels.norm import widened

Params = Mapping[str, Any]


def weight_shapes(config: FunnelTransformerConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by its name in our checkpoint format. Matrices are `[out, in]`.

    A norm is its zero-centred factors and what it adds. `qkv` contains the rows of the query, key and value
    projections, `relative_biases` those of content, position and token type, and `relative_types` a row for different
    types and one for the same type. Keys have no bias: it changes all scores of a query by the same number.
    """
    width, mlp, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    layer = {
        "qkv": (3 * heads, width),
        "value_bias": (heads,),
        "relative_biases": (3, heads),
        "relative_positions": (heads, width),
        "relative_types": (2, heads),
        "attention_output": (width, heads),
        "attention_output_bias": (width,),
        "attention_norm": (2, width),
        "up": (mlp, width),
        "up_bias": (mlp,),
        "down": (width, mlp),
        "down_bias": (width,),
        "mlp_norm": (2, width),
    }
    numbers = {"layers": sum(config.block_sizes), "decoder": config.decoder_layers}
    return {"embedding": (config.vocab_size, width), "embedding_norm": (2, width)} | {
        f"{part}.{index}.{name}": shape
        for part, count in numbers.items()
        for index in range(count)
        for name, shape in layer.items()
    }


def nest(flat: Params, config: FunnelTransformerConfig) -> dict[str, Any]:
    """The tree that `forward` reads: the layers of both parts are lists, and a head's weights keep their names.

    A projection of positions becomes `offsets`, what it makes of every distance: this is the same for every batch.
    `qkv` becomes `q`, `k` and `v`, so that neither weights nor rows are split at run time.
    """
    tree: dict[str, Any] = {
        "layers": [{} for _ in range(sum(config.block_sizes))],
        "decoder": [{} for _ in range(config.decoder_layers)],
    }
    distances, width = position_rows(config.max_positions, config.hidden_size), config.num_heads * config.head_dim
    for name, weight in flat.items():
        part, _, rest = name.partition(".")
        if part not in ("layers", "decoder"):
            tree[name] = weight
            continue
        index, leaf = rest.split(".")
        layer = tree[part][int(index)]
        if leaf == "relative_positions":
            layer["offsets"] = jnp.matmul(distances, widened(weight).T, precision=jax.lax.Precision.HIGHEST)
        elif leaf == "qkv":
            layer |= {each: weight[i * width : (i + 1) * width] for i, each in enumerate("qkv")}
        else:
            layer[leaf] = weight
    return tree


def position_rows(reach: int, width: int) -> np.ndarray:
    """A row of sines and one of cosines, side by side, for each distance from -reach to reach tokens; float32."""
    frequencies = 10000.0 ** (-np.arange(width // 2) / (width / 2))
    angles = np.arange(-reach, reach + 1)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def forward(
    params: Params,
    batch: Batch,
    *,
    config: FunnelTransformerConfig,
    funnel: FunnelConfig,
    dtype: Any,
    target: Target,
    axis: str | None = None,
) -> jax.Array:
    """Runs the encoder on a packed batch and, if the funnel has a recovery, the decoder after it.

    Args:
        params: weights, see `nest`.
        batch: N packed rows, made by `packing.pack` with the plan of the same `config` and `funnel`.
        config, funnel: the architecture and its funnel.
        dtype: of the activations, float32 or bfloat16.
        target: where it runs, and with which kernels.
        axis: None; this architecture is not divided among devices.

    Returns:
        [N / funnel.output_stride, hidden_size] rows in the dtype of the activations. Rows without a token are finite,
        but have no meaning.

    Raises:
        ConfigError: the funnel does not fit the model.
        BackendUnavailable: the backend does not support an op.
    """
    check_recovery(funnel)
    x = params["embedding"][batch.ids].astype(dtype)  # [N, D]
    x = post_norm(x, None, params["embedding_norm"], eps=config.norm_eps, target=target)
    full = x  # the output of the last full-length layer
    for step in layer_steps(config, funnel):
        unpooled = x
        if step.pool > 1:
            real = pooled_rows(batch.levels[step.query_stride // step.pool].real, config, funnel)
            no_norm = jnp.zeros(x.shape[1], jnp.float32)
            x, _ = pool_norm(x, real, no_norm, stride=step.pool, pool=funnel.pool, eps=1.0, target=target)
        keys = x if step.key_stride == step.query_stride else unpooled
        x = layer(step, params["layers"][config.applied[step.layer]], x, keys, batch, config, target)
        if step.query_stride == 1:
            full = x
    if funnel.recovery is None:
        return x
    rows = jnp.where(batch.levels[funnel.total_stride].real[:, None], x, 0)  # a token that was left out gets 0
    tiled = jnp.repeat(rows, funnel.total_stride, axis=0)
    x = (tiled.astype(jnp.float32) + full).astype(dtype)
    first = LayerStep(0, "full", 1, 1, 1, False)
    for weights in params["decoder"]:
        x = layer(first, weights, x, x, batch, config, target)
    return x


def layer(
    step: LayerStep,
    weights: Params,
    queries: jax.Array,
    keys: jax.Array,
    batch: Batch,
    config: FunnelTransformerConfig,
    target: Target,
) -> jax.Array:
    """One layer, with a norm after each of its two sub-layers.

    Args:
        queries: [N / query stride, D], the (pooled) rows, to which the sub-layers are added.
        keys: [N / key stride, D], the same array, or the unpooled rows.
    """
    dtype, heads = queries.dtype, config.num_heads
    q, k = linear(queries, weights["q"], target=target), linear(keys, weights["k"], target=target)
    v = linear(keys, weights["v"], bias=weights["value_bias"], target=target)
    lo, hi = batch.intervals[step.query_stride, step.key_stride, "full"]
    assert batch.types is not None, "plans of this architecture pack token types"
    # Keys are `key_stride` tokens apart, and two rows of a sequence at most as far as it has rows.
    centre, spacing = config.max_positions, step.key_stride
    reach = min(centre // spacing, keys.shape[0])
    offsets = weights["offsets"][centre - reach * spacing : centre + reach * spacing + 1 : spacing]
    attended = relative_attention(
        q.astype(dtype),
        k.astype(dtype),
        v.astype(dtype),
        lo,
        hi,
        batch.types[:: step.query_stride],
        batch.types[:: step.key_stride],
        weights["relative_biases"].astype(dtype),
        offsets.astype(dtype),
        weights["relative_types"].astype(dtype),
        heads=heads,
        scale=config.head_dim**-0.5,
        stride=step.query_stride // step.key_stride,
        separate_first=config.separate_cls,
        target=target,
    )
    update = linear(attended, weights["attention_output"], bias=weights["attention_output_bias"], target=target)
    x = post_norm(queries, update, weights["attention_norm"], eps=config.norm_eps, target=target)
    hidden = linear(x, weights["up"], bias=weights["up_bias"], activation="gelu_tanh", target=target).astype(dtype)
    update = linear(hidden, weights["down"], bias=weights["down_bias"], target=target)
    return post_norm(x, update, weights["mlp_norm"], eps=config.norm_eps, target=target)


def pooled_rows(real: jax.Array, config: FunnelTransformerConfig, funnel: FunnelConfig) -> jax.Array:
    """The rows that pooling reads, [N] bool: all that have a token, or all but the last one of a sequence.

    A sequence of one or two rows keeps its last one. With `keep_first`, a row of padding is before every sequence, so
    the rows around one tell whether it is the last of at least three.
    """
    if not (config.truncate and funnel.keep_first):
        return real
    before, after = jnp.pad(real, (2, 0))[: len(real)], jnp.pad(real, (0, 1))[1:]
    is_third = before & jnp.pad(real, (1, 0))[: len(real)]
    return real & ~(is_third & ~after)


def check_recovery(funnel: FunnelConfig) -> None:
    """Raises `ConfigError` unless the rows after a funnel stay short, or are added to those before it."""
    if funnel.recovery not in (None, "sum_last"):
        raise ConfigError(
            f"recovery={funnel.recovery!r} is not that of a Funnel-Transformer, whose decoder was trained for "
            "'sum_last'; leave it out for the short sequence"
        )
