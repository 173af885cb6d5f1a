"""Blocked attention in portable jax.numpy: online softmax, and only the key blocks that a query block can see.

One tile is a block of query rows with all query heads of one key/value head. These heads share the loaded keys, and
every product is a plain 2-D product (XLA:CPU has no batched product of bfloat16 into float32). The work is
proportional to the interval lengths, rounded up to blocks; no array of size Nq x Nk exists.

The online softmax is that of Milakov and Gimelshein (arXiv:1805.02867), in blocks as in FlashAttention
(arXiv:2205.14135). The derivative computes the weights of every block again from the logarithm of their sum, as in
FlashAttention-2 (arXiv:2307.08691, algorithm 2).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from funnel_kernels.norm import sum_dtype
from funnel_kernels.shapes import Bounds, Heads
from funnel_kernels.target import Target

MASKED = -1e30  # far below any score, but finite, so that a row without visible keys does not become NaN
KEYS_PER_BLOCK = 256
SCORE_ROWS_PER_BLOCK = 1024  # query rows times the query heads that share a key/value head
Results = TypeVar("Results")
State = tuple[jax.Array, jax.Array, jax.Array]  # per score row: largest score, sum of weights, weighted values
Saved = tuple[Heads, Heads, Heads, Bounds, Bounds, Heads, jax.Array]  # the arguments, the result, LogSums

LEAST_QUERIES_PER_BLOCK, MOST_QUERIES_PER_BLOCK = 64, 256


class Options(NamedTuple):
    heads: int
    kv_heads: int
    scale: float
    softcap: float | None


def attention(
    q: Heads,
    k: Heads,
    v: Heads,
    lo: Bounds,
    hi: Bounds,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float | None,
    target: Target,
) -> Heads:
    return differentiable(q, k, v, lo, hi, Options(heads, kv_heads, scale, softcap))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def differentiable(q: Heads, k: Heads, v: Heads, lo: Bounds, hi: Bounds, options: Options) -> Heads:
    return forward(q, k, v, lo, hi, options)[0]


class Tiles:
    """The tiles of a call. Tile `index` is the query rows `block = index // kv_heads` of head `index % kv_heads`.

    Attributes:
        count: the number of tiles.
        shape: (query rows, query heads) of a tile; together they are its score rows.
        keys: number of key rows in a block.
        first, last: [count / kv_heads]; each block of query rows sees key blocks `first` to `last - 1`.
        lo, hi: as those of `attention`, padded to whole blocks.
    """

    def __init__(self, q: Heads, k: Heads, lo: Bounds, hi: Bounds, options: Options):
        self.options, self.head_dim = options, q.shape[1] // options.heads
        group = options.heads // options.kv_heads
        wanted = min(max(SCORE_ROWS_PER_BLOCK // group, LEAST_QUERIES_PER_BLOCK), MOST_QUERIES_PER_BLOCK)
        rows, self.keys = even_block(q.shape[0], wanted), even_block(k.shape[0], KEYS_PER_BLOCK)
        self.shape = (rows, group)
        self.lo, self.hi = pad_rows(lo, rows), pad_rows(hi, rows)
        blocks = self.lo.shape[0] // rows
        self.count = blocks * options.kv_heads
        sees_keys = self.lo < self.hi  # a row with an empty interval needs no key block
        nothing = ceil_div(k.shape[0], self.keys) * self.keys
        self.first = jnp.where(sees_keys, self.lo, nothing).reshape(blocks, rows).min(1) // self.keys
        self.last = ceil_div(jnp.where(sees_keys, self.hi, 0).reshape(blocks, rows).max(1), self.keys)
        self.dtype = sum_dtype(q.dtype)

    def loop(self, tile: Callable[[jax.Array, Results], Results], initial: Results) -> Results:
        """Applies a function to the number of every tile and the results so far. Numbers are int32, like the bounds."""
        return lax.fori_loop(0, self.count, lambda index, results: tile(index.astype(jnp.int32), results), initial)

    def at(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The row and the column of a tile in an array like q."""
        kv_heads, (rows, group) = self.options.kv_heads, self.shape
        return index // kv_heads * rows, index % kv_heads * group * self.head_dim

    def take(self, array: Heads, index: jax.Array) -> jax.Array:
        """A tile of an array like q, [score rows, head_dim]."""
        rows, group = self.shape
        return lax.dynamic_slice(array, self.at(index), (rows, group * self.head_dim)).reshape(-1, self.head_dim)

    def put(self, array: Heads, index: jax.Array, tile: jax.Array) -> Heads:
        rows, group = self.shape
        tile = tile.astype(array.dtype).reshape(rows, group * self.head_dim)
        return lax.dynamic_update_slice(array, tile, self.at(index))

    def bounds(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """lo and hi of a tile, [query rows, 1, 1]."""
        rows = self.shape[0]
        start = index // self.options.kv_heads * rows
        lo, hi = (lax.dynamic_slice(bound, (start,), (rows,))[:, None, None] for bound in (self.lo, self.hi))
        return lo, hi

    def key_block(self, block: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The row and the column of a block of keys in an array like k."""
        return block * self.keys, index % self.options.kv_heads * self.head_dim

    def scores(self, q: jax.Array, k: jax.Array, block: jax.Array, index: jax.Array) -> jax.Array:
        """The scores of a tile and a block of keys, `MASKED` where a key is not visible; [score rows, keys]."""
        scores = self.options.scale * product(q, k, contract=(1, 1))
        if self.options.softcap is not None:
            scores = self.options.softcap * jnp.tanh(scores / self.options.softcap)
        lo, hi = self.bounds(index)
        keys = block * self.keys + jnp.arange(self.keys)
        visible = (lo <= keys) & (keys < hi)  # [query rows, 1, keys]
        return jnp.where(visible, scores.reshape(*self.shape, self.keys), MASKED).reshape(scores.shape)


def forward(q: Heads, k: Heads, v: Heads, lo: Bounds, hi: Bounds, options: Options) -> tuple[Heads, jax.Array]:
    """The result, and for each score row the logarithm of the sum of the exponentials of its scores, [tiles, ...]."""
    return attend(Tiles(q, k, lo, hi, options), q, k, v)


def attend(tiles: Tiles, q: Heads, k: Heads, v: Heads) -> tuple[Heads, jax.Array]:
    """The same, with the scores that these tiles compute."""
    rows, kv_heads = q.shape[0], tiles.options.kv_heads
    q = pad_rows(q, tiles.shape[0])
    k, v = pad_rows(k, tiles.keys), pad_rows(v, tiles.keys)
    block_shape, score_rows = (tiles.keys, tiles.head_dim), tiles.shape[0] * tiles.shape[1]

    def tile(index: jax.Array, results: tuple[Heads, jax.Array]) -> tuple[Heads, jax.Array]:
        out, log_sums = results
        q_tile = tiles.take(out, index)

        def visit(block: jax.Array, state: State) -> State:
            running_max, running_sum, weighted = state
            at = tiles.key_block(block, index)
            k_tile, v_tile = lax.dynamic_slice(k, at, block_shape), lax.dynamic_slice(v, at, block_shape)
            scores = tiles.scores(q_tile, k_tile, block, index)
            new_max = jnp.maximum(running_max, scores.max(1))
            weights = jnp.exp(scores - new_max[:, None])
            shrink = jnp.exp(running_max - new_max)
            return (
                new_max,
                running_sum * shrink + weights.sum(1),
                weighted * shrink[:, None] + product(weights.astype(v.dtype), v_tile, contract=(1, 0)),
            )

        initial = (
            jnp.full(score_rows, MASKED, tiles.dtype),
            jnp.zeros(score_rows, tiles.dtype),
            jnp.zeros((score_rows, tiles.head_dim), tiles.dtype),
        )
        block = index // kv_heads
        largest, total, weighted = lax.fori_loop(tiles.first[block], tiles.last[block], visit, initial)
        total = jnp.maximum(total, 1e-30)
        lo_rows, hi_rows = tiles.bounds(index)
        sees_keys = lo_rows < hi_rows
        result = (weighted / total[:, None]).reshape(*tiles.shape, tiles.head_dim)
        out = tiles.put(out, index, jnp.where(sees_keys, result, 0.0))
        log_sum = jnp.where(sees_keys[..., 0], (largest + jnp.log(total)).reshape(tiles.shape), 0.0)
        return out, log_sums.at[index].set(log_sum)

    # The result of a tile replaces its queries, which no other tile reads. This saves a second array of that size.
    out, log_sums = tiles.loop(tile, (q, jnp.zeros((tiles.count, *tiles.shape), tiles.dtype)))
    return out[:rows], log_sums


def save(q: Heads, k: Heads, v: Heads, lo: Bounds, hi: Bounds, options: Options) -> tuple[Heads, Saved]:
    out, log_sums = forward(q, k, v, lo, hi, options)
    return out, (q, k, v, lo, hi, out, log_sums)


def backward(options: Options, saved: Saved, out_gradient: Heads) -> tuple[Heads, Heads, Heads, None, None]:
    """The gradients of q, k and v. Visits the same pairs of blocks as `forward`; memory is linear in the rows."""
    q, k, v, lo, hi, out, log_sums = saved
    tiles = Tiles(q, k, lo, hi, options)
    query_rows, key_rows = q.shape[0], k.shape[0]
    q, out, out_gradient = (pad_rows(array, tiles.shape[0]) for array in (q, out, out_gradient))
    k, v = pad_rows(k, tiles.keys), pad_rows(v, tiles.keys)
    block_shape = (tiles.keys, tiles.head_dim)

    def tile(index: jax.Array, gradients: tuple[Heads, Heads, Heads]) -> tuple[Heads, Heads, Heads]:
        q_tile, out_tile = tiles.take(q, index), tiles.take(out, index).astype(tiles.dtype)
        gradient = tiles.take(out_gradient, index)
        mean = (gradient.astype(tiles.dtype) * out_tile).sum(1)[:, None]  # of the weights' gradients
        log_sum = log_sums[index].reshape(-1, 1)

        def visit(block: jax.Array, state: tuple[jax.Array, Heads, Heads]) -> tuple[jax.Array, Heads, Heads]:
            q_sum, k_sum, v_sum = state
            at = tiles.key_block(block, index)
            k_tile, v_tile = lax.dynamic_slice(k, at, block_shape), lax.dynamic_slice(v, at, block_shape)
            scores = tiles.scores(q_tile, k_tile, block, index)
            weights = jnp.exp(scores - log_sum)  # 0 where a key is not visible
            score_gradient = weights * (product(gradient, v_tile, contract=(1, 1)) - mean)
            if options.softcap is not None:  # the derivative of the hyperbolic tangent; a masked score has gradient 0
                score_gradient *= jnp.where(scores == MASKED, 0.0, 1.0 - jnp.square(scores / options.softcap))
            score_gradient = (options.scale * score_gradient).astype(q.dtype)
            return (
                q_sum + product(score_gradient, k_tile, contract=(1, 0)),
                add_at(k_sum, at, product(score_gradient, q_tile, contract=(0, 0))),
                add_at(v_sum, at, product(weights.astype(q.dtype), gradient, contract=(0, 0))),
            )

        q_gradient, *others = gradients
        block = index // options.kv_heads
        initial = (jnp.zeros(q_tile.shape, tiles.dtype), *others)
        q_sum, k_sum, v_sum = lax.fori_loop(tiles.first[block], tiles.last[block], visit, initial)
        return tiles.put(q_gradient, index, q_sum), k_sum, v_sum

    initial = (jnp.zeros(q.shape, q.dtype), jnp.zeros(k.shape, tiles.dtype), jnp.zeros(v.shape, tiles.dtype))
    q_gradient, k_gradient, v_gradient = tiles.loop(tile, initial)
    return (
        q_gradient[:query_rows],
        k_gradient[:key_rows].astype(k.dtype),
        v_gradient[:key_rows].astype(v.dtype),
        None,
        None,
    )


differentiable.defvjp(save, backward)


def add_at(array: jax.Array, at: tuple[jax.Array, jax.Array], block: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(array, lax.dynamic_slice(array, at, block.shape) + block, at)


def product(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    """2-D matrix product with a float32 result. Float32 operands keep full precision on every platform."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=sum_dtype(a.dtype))


def ceil_div(a: Any, b: int) -> Any:
    return -(-a // b)


def even_block(rows: int, most: int) -> int:
    """The block size, at most `most`, that cuts `rows` into the fewest blocks of near-equal size (little padding)."""
    blocks = -(-rows // most)
    return -(-rows // blocks)


def pad_rows(array: jax.Array, multiple: int) -> jax.Array:
    missing = -array.shape[0] % multiple
    return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array
