"""How far a student's vectors are from a teacher's."""

import jax
import jax.numpy as jnp

TEMPERATURE = 0.02  # of the similarities: of 11,000 sentences, about 400 count for each
NONE = -1e9  # the similarity to a text that does not count


def distillation_loss(
    student: jax.Array,  # [B, D]
    teacher: jax.Array,  # [B, D]
    documents: jax.Array,  # [M, D]
    places: jax.Array,  # [B] int32: which document the text is; -1 if it is none
    counts: jax.Array,  # [B] bool: whether the row is a text
    sizes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:  # float32 scalars
    """The mean over texts of `1 - cosine`, plus the divergence of their similarities to documents.

    The documents are teacher's vectors of other texts. The second term is the Kullback-Leibler divergence of the
    softmax over a text's similarities to them, the teacher's from the student's, at temperature 0.02: a search in an
    index that the teacher has made must find the same (SEED, arXiv:2101.04731, compares with a queue in this way). Both
    terms are averaged over the first `sizes` dimensions of the vectors (Matryoshka, arXiv:2205.13147).

    Returns:
        The loss, and the mean cosine of whole vectors.
    """
    number = jnp.maximum(counts.sum(), 1)
    others = jnp.arange(len(documents)) != places[:, None]
    losses = [one_size(student[:, :size], teacher[:, :size], documents[:, :size], others) for size in sizes]
    loss = sum(losses, jnp.zeros(())) / len(sizes)
    cosines = (unit(student) * unit(teacher)).sum(1)
    return jnp.where(counts, loss, 0.0).sum() / number, jnp.where(counts, cosines, 0.0).sum() / number


def one_size(
    student: jax.Array,  # [B, D]
    teacher: jax.Array,  # [B, D]
    documents: jax.Array,  # [M, D]
    others: jax.Array,  # [B, M] bool: whether the document is another text
) -> jax.Array:  # [B]
    student, teacher, documents = unit(student), unit(teacher), unit(documents)

    def log_similarities(x: jax.Array) -> jax.Array:
        scores = jnp.matmul(x, documents.T, precision=jax.lax.Precision.HIGHEST) / TEMPERATURE
        return jax.nn.log_softmax(jnp.where(others, scores, NONE))

    expected, found = log_similarities(teacher), log_similarities(student)
    divergence = jnp.where(others, jnp.exp(expected) * (expected - found), 0.0).sum(1)
    return 1.0 - (student * teacher).sum(1) + divergence


def unit(x: jax.Array) -> jax.Array:
    """Rows of length 1; a row of zeros stays, and has a derivative."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(1, keepdims=True), 1e-24))
