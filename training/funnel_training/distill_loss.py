"""How far a student's vectors are from a teacher's."""

import jax
import jax.numpy as jnp

TEMPERATURE = 0.05  # of the similarities
NONE = -1e9  # the similarity to a text that does not count


def distillation_loss(
    student: jax.Array,  # [B, D]
    teacher: jax.Array,  # [B, D]
    counts: jax.Array,  # [B] bool: whether the row is a text
    sizes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:  # float32 scalars
    """The mean over texts of `1 - cosine`, plus the divergence of the similarities to the other texts of the batch.

    The second term is the Kullback-Leibler divergence of the softmax over a text's similarities, the teacher's from the
    student's, at temperature 0.05: neighbours must keep their order. Both are averaged over the first `sizes`
    dimensions of the vectors (Matryoshka, arXiv:2205.13147).

    Returns:
        The loss, and the mean cosine of whole vectors.
    """
    number = jnp.maximum(counts.sum(), 1)
    losses = [one_size(student[:, :size], teacher[:, :size], counts).sum() / number for size in sizes]
    cosines = jnp.where(counts, (unit(student) * unit(teacher)).sum(1), 0.0)
    return sum(losses, jnp.zeros(())) / len(sizes), cosines.sum() / number


def one_size(student: jax.Array, teacher: jax.Array, counts: jax.Array) -> jax.Array:  # [B]
    student, teacher = unit(student), unit(teacher)
    others = counts[None, :] & ~jnp.eye(len(counts), dtype=bool)

    def similarities(x: jax.Array) -> jax.Array:
        scores = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST) / TEMPERATURE
        return jax.nn.log_softmax(jnp.where(others, scores, NONE))

    expected, found = similarities(teacher), similarities(student)
    divergence = jnp.where(others, jnp.exp(expected) * (expected - found), 0.0).sum(1)
    return jnp.where(counts, 1.0 - (student * teacher).sum(1) + divergence, 0.0)


def unit(x: jax.Array) -> jax.Array:
    """Rows of length 1; a row of zeros stays, and has a derivative."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(1, keepdims=True), 1e-24))
