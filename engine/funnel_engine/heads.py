"""The heads on top of the encoder: sentence vectors, sequence classification, token classification.

All of them read the rows of `model.forward`. Sequence `b` has the rows `first[b] .. first[b] + count[b] - 1`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from funnel_engine.checks import check_flag, check_option, check_positive
from funnel_engine.config import set_field
from funnel_engine.inputs import Ragged
from funnel_engine.packing import Ints, Plan, Spans
from funnel_kernels import Target, attention
from funnel_kernels.errors import ConfigError

POOLINGS = ("mean", "first", "last", "max", "attention")
TASKS = ("classify", "tag", "answer")
CLASSIFIER_INPUTS = ("last_token", "pooled")
POOLER_HEADS = 4
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
}


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """A linear layer [in] -> [out] on a vector, and the activation after it."""

    out_features: int
    in_features: int
    bias: bool = False
    activation: str = "identity"

    def __post_init__(self) -> None:
        for name in ("out_features", "in_features"):
            set_field(self, name, check_positive(f"{name} of a dense layer", getattr(self, name)))
        set_field(self, "bias", check_flag("bias of a dense layer", self.bias))
        check_option("activation of a dense layer", self.activation, tuple(ACTIVATIONS))


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The head of a checkpoint: everything on top of its encoder.

    Attributes:
        pooling: how `embed` pools the rows of a sequence: "mean", "first", "last", "max" or "attention".
        pooler: whether the checkpoint has the weights of the attention pooler.
        dense: the linear layers after pooling (EmbeddingGemma has two).
        similarity: the similarity function for its vectors, e.g. "cosine"; None if the checkpoint does not say.
        task: the task of the classifier: "classify" (one label per sequence), "tag" (one per token), "answer" (a logit
            per token that an answer starts, and one that it ends, there), or None.
        labels: names of the classes, in the order of the logits.
        classifier_bias: whether the classifier adds a bias.
        classifier_input: what a classifier of sequences reads: the row of the "last_token", as in transformers, or the
            "pooled" vector, after the dense layers, as in arXiv:2504.02877.
        classifier_dense: a dense layer on each row, whose output a classifier of tokens reads, as the discriminator of
            ELECTRA's pre-training does (arXiv:2003.10555); None if it reads the row itself.
    """

    pooling: str = "mean"
    pooler: bool = False
    dense: tuple[DenseConfig, ...] = ()
    similarity: str | None = None
    task: str | None = None
    labels: tuple[str, ...] = ()
    classifier_bias: bool = False
    classifier_input: str = "last_token"
    classifier_dense: DenseConfig | None = None

    def __post_init__(self) -> None:
        check_option("pooling", self.pooling, POOLINGS)
        check_option("classifier_input", self.classifier_input, CLASSIFIER_INPUTS)
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
        if self.task == "answer" and len(self.labels) != 2:
            raise ConfigError(f"task 'answer' has two labels, for start and end of an answer, not {len(self.labels)}")
        if self.classifier_input == "pooled" and self.task != "classify":
            raise ConfigError(
                f"classifier_input='pooled' is for the task 'classify', but the task is {self.task or 'none'}; "
                "leave it out"
            )
        if self.classifier_dense is not None and self.task != "tag":
            raise ConfigError(
                f"classifier_dense is for the task 'tag', but the task is {self.task or 'none'}; leave it out"
            )


def head_shapes(hidden_size: int, head: HeadConfig) -> dict[str, tuple[int, ...]]:
    """The weights of a head, by name.

    Raises:
        ConfigError: the dense layers do not fit together.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if head.pooler:
        shapes["pooler.query"] = (hidden_size,)
    size = hidden_size
    for index, dense in enumerate(head.dense):
        shapes |= dense_shapes(f"dense.{index}", dense, size)
        size = dense.out_features
    if head.task:
        read = size if head.classifier_input == "pooled" else hidden_size
        if head.classifier_dense is not None:
            shapes |= dense_shapes("classifier.dense", head.classifier_dense, read)
            read = head.classifier_dense.out_features
        shapes["classifier.weight"] = (len(head.labels), read)
        if head.classifier_bias:
            shapes["classifier.bias"] = (len(head.labels),)
    return shapes


def dense_shapes(name: str, dense: DenseConfig, size: int) -> dict[str, tuple[int, ...]]:
    """The weights of a dense layer on vectors of `size` features.

    Raises:
        ConfigError: it is for another number of features.
    """
    if dense.in_features != size:
        raise ConfigError(f"{name} has in_features={dense.in_features}, but its input has {size} features")
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (dense.out_features, size)}
    return shapes | ({f"{name}.bias": (dense.out_features,)} if dense.bias else {})


class Head(Protocol):
    """A function of the encoder's rows, which a method of the engine runs.

    Attributes:
        name: the name of that method.
        inputs_per_sequence: how many integers the program reads for each sequence; 0 if it runs on every row.
    """

    name: ClassVar[str]
    inputs_per_sequence: ClassVar[int]

    def sequence_inputs(self, batch: Ragged, spans: Spans) -> tuple[Ints, ...]:  # [B] each
        """The integers that the program reads for each sequence of a batch, whose rows are `spans`."""

    def __call__(
        self,
        params: Mapping[str, Any],
        rows: jax.Array,  # [R, D]
        *inputs: jax.Array,  # [B] int32 each; 0 for sequences that are padding
        target: Target,
    ) -> jax.Array:
        """The results of a batch, float32."""


@dataclasses.dataclass(frozen=True)
class SentenceVectors:
    """One vector per sequence, not normalised: pools its rows, then applies the dense layers, all in float32."""

    config: HeadConfig
    name: ClassVar[str] = "embed"
    inputs_per_sequence: ClassVar[int] = 2

    def sequence_inputs(self, batch: Ragged, spans: Spans) -> tuple[Ints, ...]:
        return spans  # the first row and the number of rows

    def __call__(self, params: Mapping[str, Any], rows: jax.Array, *inputs: jax.Array, target: Target) -> jax.Array:
        first, count = inputs
        if self.config.pooling == "attention":
            pooled = attention_pool(rows, params["pooler.query"], first, count, target)
        else:
            pooled = pool_rows(rows.astype(jnp.float32), first, count, self.config.pooling)
        for index, dense in enumerate(self.config.dense):
            pooled = apply_dense(dense, params, f"dense.{index}", pooled)
        return pooled  # [B, D']


@dataclasses.dataclass(frozen=True)
class TokenLogits:
    """Raw class logits of every row."""

    config: HeadConfig
    name: ClassVar[str] = "tag"
    inputs_per_sequence: ClassVar[int] = 0

    def sequence_inputs(self, batch: Ragged, spans: Spans) -> tuple[Ints, ...]:
        return ()

    def __call__(self, params: Mapping[str, Any], rows: jax.Array, *inputs: jax.Array, target: Target) -> jax.Array:
        return class_logits(self.config, params, rows)  # [R, labels]


@dataclasses.dataclass(frozen=True)
class AnswerLogits(TokenLogits):
    """Raw logits of every row that an answer starts, or ends, there."""

    name: ClassVar[str] = "answer"


@dataclasses.dataclass(frozen=True)
class SequenceLogits:
    """Raw class logits of one row per sequence: the row of its last token that is not padding, as in transformers."""

    config: HeadConfig
    plan: Plan
    pad_token_id: int | None
    name: ClassVar[str] = "classify"
    inputs_per_sequence: ClassVar[int] = 1

    def sequence_inputs(self, batch: Ragged, spans: Spans) -> tuple[Ints, ...]:
        stride = self.plan.output_stride
        token = last_tokens(batch, self.pad_token_id)
        return (spans.first + (token + self.plan.lead(batch.lengths) % stride) // stride,)

    def __call__(self, params: Mapping[str, Any], rows: jax.Array, *inputs: jax.Array, target: Target) -> jax.Array:
        (row,) = inputs
        return class_logits(self.config, params, rows[row])  # [B, labels]


@dataclasses.dataclass(frozen=True)
class PooledLogits(SentenceVectors):
    """Raw class logits of the vector of each sequence."""

    name: ClassVar[str] = "classify"

    def __call__(self, params: Mapping[str, Any], rows: jax.Array, *inputs: jax.Array, target: Target) -> jax.Array:
        return class_logits(self.config, params, super().__call__(params, rows, *inputs, target=target))  # [B, labels]


def classifier(config: HeadConfig, plan: Plan, pad_token_id: int | None) -> Head:
    """The head of the task of a checkpoint, which must have one."""
    if config.task != "classify":
        return TokenLogits(config) if config.task == "tag" else AnswerLogits(config)
    return PooledLogits(config) if config.classifier_input == "pooled" else SequenceLogits(config, plan, pad_token_id)


def class_logits(config: HeadConfig, params: Mapping[str, Any], rows: jax.Array) -> jax.Array:
    """The classifier's raw logits of rows, [R, D] -> [R, labels]."""
    rows = rows.astype(jnp.float32)
    if config.classifier_dense is not None:
        rows = apply_dense(config.classifier_dense, params, "classifier.dense", rows)
    logits = linear(rows, params["classifier.weight"])
    return logits + params["classifier.bias"] if config.classifier_bias else logits


def apply_dense(dense: DenseConfig, params: Mapping[str, Any], name: str, x: jax.Array) -> jax.Array:
    """A dense layer and its activation in float32, [R, in] -> [R, out]."""
    x = linear(x, params[f"{name}.weight"])
    return ACTIVATIONS[dense.activation](x + params[f"{name}.bias"] if dense.bias else x)


def make_heads(head: HeadConfig, plan: Plan, pad_token_id: int | None) -> list[Head]:
    """The heads that can run on the rows of a funnel."""
    heads: list[Head] = [SentenceVectors(head)]
    if head.task == "classify" or (head.task is not None and plan.output_stride == 1):
        heads.append(classifier(head, plan, pad_token_id))
    return heads


def last_tokens(batch: Ragged, pad_token_id: int | None) -> Ints:
    """For each sequence, the index of its rightmost token that is not padding; 0 if all are padding; [B]."""
    if pad_token_id is None:
        return batch.lengths - 1
    index = np.arange(len(batch.ids), dtype=np.int32) - np.repeat(batch.offsets[:-1], batch.lengths)
    return np.maximum.reduceat(np.where(batch.ids != pad_token_id, index, 0), batch.offsets[:-1])


def pool_rows(rows: jax.Array, first: jax.Array, count: jax.Array, pooling: str) -> jax.Array:
    """Mean, elementwise maximum, first or last of each sequence's rows; [R, D] and [B] -> [B, D]."""
    if pooling == "first":
        return rows[first]
    if pooling == "last":
        return rows[jnp.maximum(first + count - 1, 0)]
    sequence = sequence_of_row(rows.shape[0], first, count)
    if pooling == "max":
        largest = jax.ops.segment_max(rows, sequence, num_segments=first.shape[0])
        return jnp.where(count[:, None] > 0, largest, 0.0)  # the maximum of no rows is -infinity
    return jax.ops.segment_sum(rows, sequence, num_segments=first.shape[0]) / jnp.maximum(count, 1)[:, None]


def sequence_of_row(rows: int, first: jax.Array, count: jax.Array) -> jax.Array:
    """The sequence that each row belongs to, [R] int32; `B` if it belongs to none, which segment sums drop."""
    index = jnp.arange(rows)
    begin = jnp.where(count > 0, first, rows)  # padding sequences begin after the last row
    sequence = jnp.searchsorted(begin, index, side="right").astype(jnp.int32) - 1
    belongs = (sequence >= 0) & (index < first[sequence] + count[sequence])
    return jnp.where(belongs, sequence, first.shape[0])


def attention_pool(rows: jax.Array, query: jax.Array, first: jax.Array, count: jax.Array, target: Target) -> jax.Array:
    """The attention pooler of arXiv:2504.02877: one learned query, 4 heads, no projections; [R, D] -> [B, D]."""
    queries = jnp.broadcast_to(query.astype(rows.dtype), (first.shape[0], rows.shape[1]))
    head_dim = rows.shape[1] // POOLER_HEADS
    pooled = attention(
        queries,
        rows,
        rows,
        first,
        first + count,
        heads=POOLER_HEADS,
        kv_heads=POOLER_HEADS,
        scale=head_dim**-0.5,
        target=target,
    )
    return pooled.astype(jnp.float32)


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x @ weight.T` in float32."""
    return jax.lax.dot_general(
        x, weight.astype(jnp.float32), (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
