"""What stands on top of the encoder: sentence vectors, sequence classification, token classification.

All of them read the rows of `model.forward`. A sequence's rows are `first[b] .. first[b] + count[b] - 1`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from funnel_engine.config import check_flag, check_option, check_positive, set_field
from funnel_kernels import attention
from funnel_kernels.errors import ConfigError

POOLINGS = ("mean", "first", "last", "max", "attention")
TASKS = ("classify", "tag")
POOLER_HEADS = 4
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
}


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """A linear layer on a sentence vector, [in] -> [out], and the activation after it."""

    out_features: int
    in_features: int
    bias: bool = False
    activation: str = "identity"

    def __post_init__(self):
        for name in ("out_features", "in_features"):
            set_field(self, name, check_positive(f"{name} of a dense layer", getattr(self, name)))
        set_field(self, "bias", check_flag("bias of a dense layer", self.bias))
        check_option("activation of a dense layer", self.activation, tuple(ACTIVATIONS))


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What a checkpoint has on top of its encoder.

    Attributes:
        pooling: how `embed` makes one vector of a sequence's rows: "mean", "first", "last", "max" or "attention".
        pooler: whether the weights of the attention pooler are there.
        dense: the linear layers after the pooling (EmbeddingGemma has two).
        similarity: how its vectors are meant to be compared, e.g. "cosine"; None if the checkpoint does not say.
        task: what the classifier is for: "classify" (one label a sequence), "tag" (one a token), or None without one.
        labels: names of the classes, in the order of the logits.
        classifier_bias: whether the classifier adds a bias.
    """

    pooling: str = "mean"
    pooler: bool = False
    dense: tuple[DenseConfig, ...] = ()
    similarity: str | None = None
    task: str | None = None
    labels: tuple[str, ...] = ()
    classifier_bias: bool = False

    def __post_init__(self):
        check_option("pooling", self.pooling, POOLINGS)
        for name in ("pooler", "classifier_bias"):
            set_field(self, name, check_flag(name, getattr(self, name)))
        if self.pooling == "attention" and not self.pooler:
            raise ConfigError(
                "pooling='attention' needs the learned query 'pooler.query', which this checkpoint does not have; "
                "use mean, first, last or max"
            )
        if self.task is not None:
            check_option("task", self.task, TASKS)
            check_positive("number of labels", len(self.labels))


def head_shapes(hidden_size: int, head: HeadConfig) -> dict[str, tuple[int, ...]]:
    """The weights of a head, by name.

    Raises:
        ConfigError: the dense layers do not fit together.
    """
    size = hidden_size
    for index, dense in enumerate(head.dense):
        if dense.in_features != size:
            raise ConfigError(f"dense layer {index} takes {dense.in_features} features, but there are {size} before it")
        size = dense.out_features
    shapes: dict[str, tuple[int, ...]] = {}
    if head.pooler:
        shapes["pooler.query"] = (hidden_size,)
    for index, dense in enumerate(head.dense):
        shapes[f"dense.{index}.weight"] = (dense.out_features, dense.in_features)
        if dense.bias:
            shapes[f"dense.{index}.bias"] = (dense.out_features,)
    if head.task:
        shapes["classifier.weight"] = (len(head.labels), hidden_size)
        if head.classifier_bias:
            shapes["classifier.bias"] = (len(head.labels),)
    return shapes


def sentence_vectors(
    params: Mapping[str, Any],
    rows: jax.Array,  # [R, D]
    first: jax.Array,  # [B] int32
    count: jax.Array,  # [B] int32; 0 in rows of padding
    *,
    head: HeadConfig,
    backend: str,
) -> jax.Array:  # [B, D'] float32, not normalised
    """One vector per sequence: its rows pooled, then the dense layers (all float32)."""
    if head.pooling == "attention":
        pooled = attention_pool(rows, params["pooler.query"], first, count, backend)
    else:
        pooled = pool_rows(rows.astype(jnp.float32), first, count, head.pooling)
    for index, dense in enumerate(head.dense):
        pooled = linear(pooled, params[f"dense.{index}.weight"])
        if dense.bias:
            pooled = pooled + params[f"dense.{index}.bias"]
        pooled = ACTIVATIONS[dense.activation](pooled)
    return pooled


def pool_rows(rows: jax.Array, first: jax.Array, count: jax.Array, pooling: str) -> jax.Array:
    """Mean, elementwise maximum, first or last of each sequence's rows; [R, D] and [B] -> [B, D]."""
    if pooling == "first":
        return rows[first]
    if pooling == "last":
        return rows[jnp.maximum(first + count - 1, 0)]
    sequence = row_owner(rows.shape[0], first, count)
    if pooling == "max":
        return jax.ops.segment_max(rows, sequence, num_segments=first.shape[0])
    return jax.ops.segment_sum(rows, sequence, num_segments=first.shape[0]) / jnp.maximum(count, 1)[:, None]


def row_owner(rows: int, first: jax.Array, count: jax.Array) -> jax.Array:
    """Which sequence each row belongs to, or `B` (dropped by segment sums) if to none; [R] int32."""
    index = jnp.arange(rows)
    begin = jnp.where(count > 0, first, rows)  # padding sequences begin after the last row
    owner = jnp.searchsorted(begin, index, side="right").astype(jnp.int32) - 1
    owned = (owner >= 0) & (index < first[owner] + count[owner])
    return jnp.where(owned, owner, first.shape[0])


def attention_pool(rows: jax.Array, query: jax.Array, first: jax.Array, count: jax.Array, backend: str) -> jax.Array:
    """The attention pooler of arXiv:2504.02877: one learned query, 4 heads, no projections; [R, D] -> [B, D]."""
    queries = jnp.broadcast_to(query.astype(rows.dtype), (first.shape[0], rows.shape[1]))
    head_dim = rows.shape[1] // POOLER_HEADS
    pooled = attention(
        queries, rows, rows, first, first + count,
        heads=POOLER_HEADS, kv_heads=POOLER_HEADS, scale=head_dim**-0.5, backend=backend,
    )  # fmt: skip
    return pooled.astype(jnp.float32)


def class_logits(params: Mapping[str, Any], rows: jax.Array, *, head: HeadConfig) -> jax.Array:
    """[R, D] -> [R, labels] float32, the raw logits of a classifier."""
    logits = linear(rows.astype(jnp.float32), params["classifier.weight"])
    return logits + params["classifier.bias"] if head.classifier_bias else logits


def sequence_logits(params: Mapping[str, Any], rows: jax.Array, at: jax.Array, *, head: HeadConfig) -> jax.Array:
    """Class logits of one row per sequence; [R, D] and [B] -> [B, labels] float32."""
    return class_logits(params, rows[at], head=head)


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x @ weight.T` in float32."""
    return jax.lax.dot_general(
        x, weight.astype(jnp.float32), (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
