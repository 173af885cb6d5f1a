"""`relative_attention` block by block: the tiles and the online softmax of `attention`, with scores of three terms.

The distances of a block of queries and a block of keys are a window of the table of offsets. One product gives the
position term of each query with every row of the window, and a shift of row `i` by `stride * i` puts each number
where its key is (Dai et al. 2019, arXiv:1901.02860, appendix B). So the largest arrays are a block of scores, and one
`1 + stride` times as wide.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from funnel_kernels.attention.xla import MASKED, Options, Tiles, attend, pad_rows, product
from funnel_kernels.norm import widened
from funnel_kernels.relative_attention import reference
from funnel_kernels.relative_attention.reference import BOTH
from funnel_kernels.shapes import Bounds, Heads
from funnel_kernels.target import Target


class RelativeOptions(NamedTuple):
    heads: int
    scale: float
    stride: int
    separate_first: bool


def relative_attention(*arrays: jax.Array, target: Target, **options: Any) -> Heads:
    return differentiable(arrays, RelativeOptions(**options))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def differentiable(arrays: tuple[jax.Array, ...], options: RelativeOptions) -> Heads:
    q, k, v, lo, hi, *relative = arrays
    return attend(RelativeTiles(q, k, lo, hi, options, Relative(*relative)), q, k, v)[0]


def save(arrays: tuple[jax.Array, ...], options: RelativeOptions) -> tuple[Heads, tuple[jax.Array, ...]]:
    return differentiable(arrays, options), arrays


def backward(options: RelativeOptions, arrays: tuple[jax.Array, ...], gradient: Heads) -> tuple[Any]:
    """The gradients of the dense reference. Only a derivative has arrays of all pairs of rows."""
    _, pull = jax.vjp(partial(reference.relative_attention, **options._asdict()), *arrays)
    return (pull(gradient),)


differentiable.defvjp(save, backward)


class Relative(NamedTuple):
    """The arrays of `relative_attention` that `attention` does not have."""

    query_types: jax.Array
    key_types: jax.Array
    biases: Heads
    offsets: Heads
    same: Heads


class RelativeTiles(Tiles):
    """The tiles of a call.

    Attributes:
        window: number of rows of the table that a tile and a block of keys read.
        table: the offsets from the largest distance to the smallest, with a window of zeros before and after them.
    """

    def __init__(self, q: Heads, k: Heads, lo: Bounds, hi: Bounds, options: RelativeOptions, relative: Relative):
        super().__init__(q, k, lo, hi, Options(options.heads, options.heads, options.scale, None))
        self.query_types = pad_rows(relative.query_types, self.shape[0])
        self.key_types = pad_rows(relative.key_types, self.keys)
        self.biases, self.same = relative.biases, relative.same
        self.stride, self.separate_first = options.stride, options.separate_first
        self.reach = relative.offsets.shape[0] // 2
        self.window = self.stride * (self.shape[0] - 1) + self.keys
        self.table = jnp.pad(relative.offsets[::-1], [(self.window, self.window), (0, 0)])

    def scores(self, q: jax.Array, k: jax.Array, block: jax.Array, index: jax.Array) -> jax.Array:
        rows, head = self.shape[0], index % self.options.heads * self.head_dim
        first_row, first_key = index // self.options.heads * rows, block * self.keys
        biases, same = (
            lax.dynamic_slice_in_dim(array, head, self.head_dim, axis=1) for array in (self.biases, self.same)
        )
        for_content, for_position, for_type = ((widened(q) + widened(bias)).astype(q.dtype) for bias in biases)

        start = self.window + self.reach - self.stride * (first_row + rows - 1) + first_key
        window = lax.dynamic_slice(self.table, (start, head), (self.window, self.head_dim))
        position = shifted(product(for_position, window, contract=(1, 1)), self.stride, self.keys)

        query_types = lax.dynamic_slice(self.query_types, (first_row,), (rows,))[:, None]
        key_types = lax.dynamic_slice(self.key_types, (first_key,), (self.keys,))
        by_type = product(for_type, same, contract=(1, 1))
        is_same = (query_types == key_types) | (query_types == BOTH) | (key_types == BOTH)
        relative = position + jnp.where(is_same, by_type[:, 1:], by_type[:, :1])

        lo, hi = (bound[:, 0] for bound in self.bounds(index))  # [rows, 1]
        keys = first_key + jnp.arange(self.keys)
        if self.separate_first:
            own_keys = self.stride * (first_row + jnp.arange(rows)[:, None])
            relative = jnp.where((keys == lo) | (own_keys <= lo), 0.0, relative)
        scores = self.options.scale * (product(for_content, k, contract=(1, 1)) + relative)
        return jnp.where((lo <= keys) & (keys < hi), scores, MASKED)


def shifted(scores: jax.Array, stride: int, keys: int) -> jax.Array:
    """`out[i, j] = scores[i, stride * (rows - 1 - i) + j]`, [rows, keys].

    One more `stride` of columns makes this a plain reshape: each row of the result then begins `stride` numbers
    earlier than the row of the scores.
    """
    rows, columns = scores.shape
    flat = jnp.pad(scores, [(0, 0), (0, stride)]).ravel()
    first = stride * (rows - 1)
    return flat[first : first + rows * columns].reshape(rows, columns)[:, :keys]
