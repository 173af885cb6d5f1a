"""Attention of Funnel-Transformer: content, relative position and token type, on one interval of keys per query."""

import jax
import jax.numpy as jnp

from funnel_kernels.checks import check_float, check_shape
from funnel_kernels.errors import InputError
from funnel_kernels.op import Op
from funnel_kernels.target import Target

RELATIVE_ATTENTION: Op[jax.Array] = Op("relative_attention", __name__, "xla", "cpu")
BOTH = 2  # the token type of [CLS], which counts as the same as every other type


def relative_attention(
    q: jax.Array,  # [Nq, heads * d]
    k: jax.Array,  # [Nk, heads * d]
    v: jax.Array,  # [Nk, heads * d]
    lo: jax.Array,  # [Nq] int32
    hi: jax.Array,  # [Nq] int32
    query_types: jax.Array,  # [Nq] int32
    key_types: jax.Array,  # [Nk] int32
    biases: jax.Array,  # [3, heads * d]
    offsets: jax.Array,  # [2 * reach + 1, heads * d]
    same: jax.Array,  # [2, heads * d]
    *,
    heads: int,
    scale: float,
    stride: int,
    separate_first: bool,
    target: Target,
) -> jax.Array:  # [Nq, heads * d], dtype of q
    """Softmax attention over packed rows with the scores of Funnel-Transformer (Dai et al. 2020, arXiv:2006.03236).

    Query row `i` sees the key rows `lo[i] <= j < hi[i]`, as in `attention`. Its scores are the sum of three terms:

        scale * (q_i + content bias) . k_j
        scale * (q_i + position bias) . offsets[reach + stride * i - j]
        scale * (q_i + type bias) . same[1 if the token types of i and j are the same, else 0]

    The second term is that of the distance between the two rows. Rows of a sequence lie next to each other, so the
    distance follows from their places on the packed axis: `stride * i - j`, in rows of the keys. The third term takes
    two types as the same if they are equal or one of them is `BOTH`.

    With `separate_first`, the first key of an interval, and the query row over it, have neither the second nor the
    third term. This is the [CLS] token. So intervals must begin at the first row of a sequence. A row whose interval
    is empty gets 0.

    Args:
        q, k, v: float32 or bfloat16, all of one dtype, finite in every row. The heads of a row are side by side.
        lo, hi: int32, `0 <= lo` and `hi <= Nk`. An interval with `lo >= hi` is empty.
        query_types, key_types: token types of the rows.
        biases: in the dtype of q; of content, position and type.
        offsets: in the dtype of q; a row for each distance from -reach to reach, in rows of the keys. A sequence must
            have at most `reach` rows of keys.
        same: in the dtype of q; a row for different types and one for the same type.
        heads: number of heads, of the queries and of the keys.
        scale: factor of the scores.
        stride: rows of the keys per row of the queries: 1, or more if only the queries are pooled.
        separate_first: whether each sequence begins with a row that has no position and no type.
        target: where it runs, and with which kernels.

    Raises:
        InputError: the shapes or dtypes do not fit together.
        BackendUnavailable: the backend does not support this call.
    """
    check_float("q", q, ndim=2)
    width = q.shape[1]
    if heads < 1 or width % heads:
        raise InputError(f"q is {width} wide; heads={heads} must be positive and divide its width")
    if not q.shape[0] or not k.shape[0]:
        raise InputError(f"q has {q.shape[0]} rows and k has {k.shape[0]}; each must have at least one row")
    if not isinstance(stride, int) or stride < 1:
        raise InputError(f"stride={stride} must be a positive integer, the rows of the keys per row of the queries")
    shapes = {"k": (k, (k.shape[0], width)), "v": (v, (k.shape[0], width)), "biases": (biases, (3, width))}
    shapes |= {"offsets": (offsets, (offsets.shape[0], width)), "same": (same, (2, width))}
    for name, (array, shape) in shapes.items():
        check_float(name, array, ndim=2, dtype=q.dtype)
        check_shape(name, array, shape)
    if offsets.shape[0] % 2 == 0:
        raise InputError(f"offsets has {offsets.shape[0]} rows; it must have an odd number, from -reach to reach")
    bounds = {"lo": lo, "hi": hi, "query_types": query_types, "key_types": key_types}
    for name, array in bounds.items():
        check_shape(name, array, (k.shape[0] if name == "key_types" else q.shape[0],))
        if array.dtype != jnp.int32:
            raise InputError(f"{name} is {array.dtype}; it must be int32")
    return RELATIVE_ATTENTION(
        q,
        k,
        v,
        lo,
        hi,
        query_types,
        key_types,
        biases,
        offsets,
        same,
        heads=heads,
        scale=scale,
        stride=stride,
        separate_first=separate_first,
        target=target,
    )
