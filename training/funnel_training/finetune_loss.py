"""The losses of fine-tuning."""

import jax
import jax.numpy as jnp
import optax

from funnel_training.distill_loss import NONE, unit

TEMPERATURE = 0.05  # of the cosines


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over rows, [..., classes] and [...]; rows with a label below 0 do not count."""
    counts = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.where(counts, losses, 0.0).sum() / jnp.maximum(counts.sum(), 1)


def cosent(first: jax.Array, second: jax.Array, scores: jax.Array, counts: jax.Array) -> jax.Array:
    """CoSENT: a pair with a higher score must have a higher cosine; only the order of the scores matters.

    The log of 1 + the sum of exp((cosine of a - cosine of b) / 0.05) over all pairs a, b with score of a < score of b
    (the cosine objective of arXiv:2309.12871; CoSENTLoss of sentence-transformers).

    Args:
        first, second: vectors of the two sentences of each pair, [M, D].
        scores: [M].
        counts: whether there is a pair, [M] bool.
    """
    cosines = (unit(first) * unit(second)).sum(1) / TEMPERATURE
    ordered = (scores[:, None] < scores[None, :]) & counts[:, None] & counts[None, :]
    differences = jnp.where(ordered, cosines[:, None] - cosines[None, :], NONE)
    return jax.nn.logsumexp(jnp.append(differences.reshape(-1), 0.0))


def info_nce(queries: jax.Array, documents: jax.Array, negatives: jax.Array, counts: jax.Array) -> jax.Array:
    """InfoNCE (arXiv:1807.03748): each query's own document among the documents of the other queries of the step.

    The mean cross-entropy of the softmax over the cosines / 0.05 (in-batch negatives, arXiv:2004.04906).

    Args:
        queries, documents: vectors of each query and of a document that answers it, [M, D].
        negatives: whether document j does not answer query i, [M, M] bool.
        counts: whether there is a pair, [M] bool.
    """
    cosines = jnp.matmul(unit(queries), unit(documents).T, precision=jax.lax.Precision.HIGHEST) / TEMPERATURE
    own = jnp.eye(len(counts), dtype=bool)
    found = jax.nn.log_softmax(jnp.where(own | (negatives & counts[None, :]), cosines, NONE))
    return -jnp.where(counts, found.diagonal(), 0.0).sum() / jnp.maximum(counts.sum(), 1)
