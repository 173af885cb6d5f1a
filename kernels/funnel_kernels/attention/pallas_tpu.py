"""`attention` for TPUs: flash attention (arXiv:2205.14135) over key intervals, in Pallas.

The grid is a list of visits: pairs of a query block and a key block that some of its rows see, made from the intervals
before the kernel starts. What no row sees is neither fetched nor computed, and costs no step.

A visit takes all query heads that share the key/value head. It walks over *units*, a head's part of the query rows, two
at a time, so that the matrix unit makes the next unit's scores while the vector units turn the last one's into weights.

Everything is transposed: scores are [keys, queries], so that a query's peak and sum are reductions over sublanes, which
cost little beside the elementwise work, and its bounds are a row that is broadcast for free; results are [d, queries]
until they are written.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funnel_kernels import pallas_calls
from funnel_kernels.shapes import Bounds, Heads
from funnel_kernels.target import Target, Unsupported

LOG2_E = math.log2(math.e)
MASK = -(2.0**100)  # a score that no real one reaches; finite, so that differences of two are
WIDEST = 256  # head dim
LANES = 128
Index = Any  # of a block or a unit: an int or a traced scalar
MOST_VISITS = 2**16  # their list lies in scalar memory, 4 bytes each


class Sizes(NamedTuple):
    """Query rows and keys a block, and the most query rows of a unit."""

    block_q: int
    block_k: int
    unit: int


# The fewest bundles in static schedules of 8 query heads of 256 on one key/value head (`funnel_benchmarks.static_tpu`).
SIZES = {
    "v4": Sizes(256, 512, 256),
    "v5e": Sizes(512, 512, 256),
    "v5p": Sizes(512, 512, 256),
    "v6e": Sizes(512, 512, 512),
    "v7x": Sizes(512, 512, 512),
}
COLUMNS = 8 * 256  # of queries and results in a visit there


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
    sizes: Sizes | None = None,
) -> Heads:
    """See `funnel_kernels.attention`; `sizes` are by the rule below unless given."""
    head_dim = q.shape[1] // heads
    if head_dim > WIDEST:
        raise Unsupported(f"heads are {head_dim} wide; its vector memory is laid out for at most {WIDEST}")
    if head_dim % LANES:  # a head must fill whole registers; only T5Gemma's smallest models have narrower ones
        widen = functools.partial(pad_heads, head_dim=head_dim, to=-(-head_dim // LANES) * LANES)
        options: dict[str, Any] = {
            "heads": heads,
            "kv_heads": kv_heads,
            "scale": scale,
            "softcap": softcap,
            "target": target,
            "sizes": sizes,
        }
        wide = attention(widen(q), widen(k), widen(v), lo, hi, **options)
        return wide.reshape(q.shape[0], heads, -1)[..., :head_dim].reshape(q.shape)
    sizes = sizes or rule(pallas_calls.generation(target), q.dtype, heads // kv_heads * head_dim)
    return launch(q, k, v, lo, hi, heads, kv_heads, scale, softcap, sizes, target)


def pad_heads(x: Heads, head_dim: int, to: int) -> Heads:
    """[N, heads * head_dim] -> [N, heads * to], with zeros after each head."""
    split = x.reshape(x.shape[0], -1, head_dim)
    return jnp.pad(split, ((0, 0), (0, 0), (0, to - head_dim))).reshape(x.shape[0], -1)


def rule(generation: pallas_calls.Generation, dtype: Any, columns: int) -> Sizes:
    """The sizes of a generation, with as many query rows as have room where a visit has more or fewer columns."""
    block_q, block_k, unit = SIZES[generation.name]
    if dtype == jnp.float32:  # twice the bytes, and six products for one
        block_q, block_k, unit = block_q // 4, block_k // 2, LANES
    block_q = min(2 * block_q, max(LANES, block_q * COLUMNS // columns // LANES * LANES))
    return Sizes(block_q, block_k, unit)


def launch(
    q: Heads,
    k: Heads,
    v: Heads,
    lo: Bounds,
    hi: Bounds,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float | None,
    sizes: Sizes,
    target: Target,
) -> Heads:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, width = q.shape
    d, group = width // heads, heads // kv_heads
    # Where one block holds everything, it holds whole registers: only the smallest batches are padded.
    block_q, block_k = min(sizes.block_q, round_up(rows)), min(sizes.block_k, round_up(k.shape[0]))
    q, lo, hi = (pad_rows(array, block_q) for array in (q, lo, hi))
    k, v = pad_rows(k, block_k), pad_rows(v, block_k)
    parts = -(-block_q // sizes.unit)  # of a head's query rows
    if group * parts % 2:  # units come in pairs
        parts *= 2
    unit = block_q // parts
    units = group * parts

    blocks = -(-q.shape[0] // block_q), -(-k.shape[0] // block_k)
    if blocks[0] * blocks[1] > MOST_VISITS:
        raise Unsupported(
            f"{rows} queries and {k.shape[0]} keys may need {blocks[0] * blocks[1]} visits of {block_q} x {block_k}; "
            f"scalar memory has room for {MOST_VISITS}, so make batches smaller (max_batch_tokens)"
        )
    generation = pallas_calls.generation(target)
    limit = generation.vmem * 3 // 4
    needed = 2 * (2 * block_q * group + 2 * block_k) * d * q.dtype.itemsize  # blocks, each twice
    needed += 4 * (block_q * group * (d + 16) + 2 * block_k * unit) + d * block_k * q.dtype.itemsize  # scratch
    if needed > limit:
        raise Unsupported(
            f"{group} query heads of {d} on one key/value head need {needed:,} bytes of vector memory; the kernel may "
            f"use {limit:,} on {generation.name}"
        )
    # Cores that share a device take turns over heads, or else each takes a share of the visits.
    cores = generation.cores if kv_heads % generation.cores and blocks[0] > 1 else 1
    begin, visits = plan(lo, hi, blocks, block_q, block_k, cores)

    # Where blocks are in their arrays: `begin` and `visits` are in scalar memory.
    def queries(head: Index, core: Index, step: Index, begin: Any, visits: Any) -> tuple[Index, Index]:
        return decode(visits[at(core, step, begin)]).query_block, head

    def keys(head: Index, core: Index, step: Index, begin: Any, visits: Any) -> tuple[Index, Index]:
        return decode(visits[at(core, step, begin)]).key_block, head

    def bounds(head: Index, core: Index, step: Index, begin: Any, visits: Any) -> tuple[Index, Index]:
        return 0, decode(visits[at(core, step, begin)]).query_block

    out = pallas_calls.call(
        functools.partial(kernel, group=group, parts=parts, d=d, keys=k.shape[0], scale=scale, softcap=softcap),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(kv_heads, cores, jnp.max(jnp.diff(begin))),
            in_specs=[
                pl.BlockSpec((block_q, group * d), queries),
                pl.BlockSpec((block_k, d), keys),
                pl.BlockSpec((block_k, d), keys),
                pl.BlockSpec((2, block_q), bounds),
            ],
            out_specs=pl.BlockSpec((block_q, group * d), queries),
            scratch_shapes=[
                pltpu.VMEM((units, d, unit), jnp.float32),  # sums of weighted values
                pltpu.VMEM((units, 1, unit), jnp.float32),  # the largest score so far
                pltpu.VMEM((units, 1, unit), jnp.float32),  # sums of weights
                pltpu.VMEM((block_k, unit), jnp.float32),  # scores of units 0, 2, 4, ...
                pltpu.VMEM((block_k, unit), jnp.float32),  # scores of units 1, 3, 5, ...
                pltpu.VMEM((d, block_k), v.dtype),  # values, transposed
            ],
        ),
        target=target,
        semantics=("parallel", "parallel", "arbitrary"),
        vmem=limit,
        cost_estimate=pl.CostEstimate(
            flops=4 * rows * k.shape[0] * width,  # at most: the intervals are known only at run time
            transcendentals=rows * k.shape[0] * heads,
            bytes_accessed=2 * (q.nbytes + k.nbytes),
        ),
        name="attention",
    )(begin, visits, q, k, v, jnp.stack([lo, hi]))
    return out[:rows]


def round_up(rows: int) -> int:
    return -(-rows // LANES) * LANES


def pad_rows(array: jax.Array, least: int) -> jax.Array:
    return jnp.pad(array, ((0, max(0, least - array.shape[0])), *((0, 0),) * (array.ndim - 1)))


class Visit(NamedTuple):
    """A step of the grid.

    Attributes:
        query_block, key_block: which blocks; fewer than 2^14 each.
        first, last: whether this is the query block's first and last visit.
        whole: every row that sees anything sees all of these keys.
        empty: no row sees anything; the only visit of its query block.
    """

    query_block: jax.Array
    key_block: jax.Array
    first: jax.Array
    last: jax.Array
    whole: jax.Array
    empty: jax.Array


def encode(visit: Visit) -> jax.Array:
    """A visit in one int32, since scalar memory is small."""
    code = visit.query_block << 18 | visit.key_block << 4
    for bit, flag in enumerate(visit[2:]):
        code |= flag.astype(jnp.int32) << bit
    return code


def decode(code: jax.Array) -> Visit:
    flags = (((code >> bit) & 1) == 1 for bit in range(4))
    return Visit(code >> 18, (code >> 4) & (2**14 - 1), *flags)


def at(core: Index, step: Index, begin: Any) -> jax.Array:
    """Where a core's visit stands in the list; a core that is done stays at its last one."""
    return jnp.minimum(begin[core] + step, begin[core + 1] - 1)


def plan(
    lo: Bounds, hi: Bounds, blocks: tuple[int, int], block_q: int, block_k: int, cores: int
) -> tuple[jax.Array, jax.Array]:
    """Which visits there are, query block by query block.

    Args:
        blocks: numbers of query blocks and of key blocks.

    Returns:
        begin: [cores + 1] int32, where each core's visits begin and end; a query block is never split.
        visits: [query blocks * key blocks] int32 codes; those behind the last core's end mean nothing.
    """
    some = lo < hi

    def reduce(
        bounds: Bounds, otherwise: int, function: Callable[..., jax.Array]
    ) -> jax.Array:  # over the rows of each query block that see anything
        padding = blocks[0] * block_q - len(bounds)
        filled = jnp.pad(jnp.where(some, bounds, otherwise), (0, padding), constant_values=otherwise)
        return function(filled.reshape(-1, block_q), axis=1)

    keys = blocks[1] * block_k
    first = reduce(lo, keys, jnp.min) // block_k
    count = jnp.maximum(-(-reduce(hi, 0, jnp.max) // block_k) - first, 0)
    whole, rest = -(-reduce(lo, 0, jnp.max) // block_k), reduce(hi, keys, jnp.min) // block_k
    first = jnp.where(count > 0, first, 0)
    visits = jnp.maximum(count, 1)
    ends = jnp.cumsum(visits)

    # Which query block each visit is of; sums over a table of pairs, because a TPU is slow at gathering scalars.
    step = jnp.arange(blocks[0] * blocks[1], dtype=jnp.int32)[:, None]
    own = (ends - visits <= step) & (step < ends)  # [visits, query blocks]

    def of_visit(values: jax.Array) -> jax.Array:  # [query blocks] -> [visits]
        return jnp.sum(jnp.where(own, values, 0), axis=1, dtype=jnp.int32)

    nth = step[:, 0] - of_visit(ends - visits)
    key_block = of_visit(first) + nth
    codes = encode(
        Visit(
            of_visit(jnp.arange(blocks[0], dtype=jnp.int32)),
            key_block,
            first=nth == 0,
            last=nth == of_visit(visits) - 1,
            whole=(of_visit(whole) <= key_block) & (key_block < of_visit(rest)),
            empty=of_visit(count) == 0,
        )
    )
    # Each core but the last gets about as many visits, and every core at least one query block.
    cuts = [
        jnp.clip(jnp.sum(ends <= ends[-1] * core // cores), core, blocks[0] - cores + core) for core in range(1, cores)
    ]
    return jnp.stack([jnp.int32(0), *(ends[cut - 1] for cut in cuts), ends[-1]]).astype(jnp.int32), codes


def kernel(
    begin: Any,  # [cores + 1]
    visits: Any,  # [query blocks * key blocks], see `plan`
    q_ref: Any,  # [block_q, group * d]
    k_ref: Any,  # [block_k, d]
    v_ref: Any,  # [block_k, d]
    bounds_ref: Any,  # [2, block_q]
    out_ref: Any,  # [block_q, group * d]
    sums: Any,  # [units, d, unit] of weighted values
    peaks: Any,  # [units, 1, unit]: the largest score so far
    totals: Any,  # [units, 1, unit] of weights
    even: Any,  # [block_k, unit]: scores of units 0, 2, 4, ...
    odd: Any,  # [block_k, unit]: scores of units 1, 3, 5, ...
    values: Any,  # [d, block_k], transposed
    *,
    group: int,
    parts: int,
    d: int,
    keys: int,
    scale: float,
    softcap: float | None,
) -> None:
    """One step of the grid: a visit, or nothing for a core that is done."""
    from jax.experimental import pallas as pl

    block_k, unit = even.shape
    units = group * parts
    precision = jax.lax.Precision.HIGHEST if values.dtype == jnp.float32 else None
    product = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    core, step = pl.program_id(1), pl.program_id(2)
    visit = decode(visits[at(core, step, begin)])
    on = begin[core] + step < begin[core + 1]

    def block_of(index: Index) -> tuple[Any, Any]:
        """Rows and columns of a unit in the blocks of queries and results."""
        head, part = jax.lax.div(index, parts), jax.lax.rem(index, parts)
        return pl.ds(pl.multiple_of(part * unit, unit), unit), pl.ds(pl.multiple_of(head * d, LANES), d)

    def scores(index: Index) -> jax.Array:  # [block_k, unit]
        return product(k_ref[...], q_ref[block_of(index)], (((1,), (1,)), ((), ())))

    def weights(
        scores_ref: Any, index: Index, masked: bool, peak: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:  # [block_k, unit], [1, unit]
        """Base-2 exponentials of the scores relative to the new peak, and that peak."""
        s = scores_ref[...]
        s = jnp.tanh(s * (scale / softcap)) * (softcap * LOG2_E) if softcap else s * (scale * LOG2_E)
        if masked:
            key = visit.key_block * block_k + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
            lo, hi = bounds_ref[0:1, block_of(index)[0]], bounds_ref[1:2, block_of(index)[0]]
            s = jnp.where((lo <= key) & (key < hi), s, MASK)
        highest = jnp.max(s, axis=0, keepdims=True)
        peak = highest if peak is None else jnp.maximum(peak, highest)
        return jnp.exp2(s - peak), peak

    def weighted_values(p: jax.Array) -> jax.Array:  # [d, unit]
        return product(values[...], p.astype(values.dtype), (((1,), (0,)), ((), ())))

    def write(index: Index, out: jax.Array, total: jax.Array) -> None:
        rows, columns = block_of(index)
        some = bounds_ref[0:1, rows] < bounds_ref[1:2, rows]
        out_ref[rows, columns] = jnp.where(some, out / total, 0.0).T.astype(out_ref.dtype)

    def take_all(scores_ref: Any, index: Index, masked: bool) -> None:
        """The whole softmax of a unit whose keys are all in this block."""
        p, _ = weights(scores_ref, index, masked, None)
        write(index, weighted_values(p), jnp.sum(p, axis=0, keepdims=True))

    def take_some(scores_ref: Any, index: Index, masked: bool) -> None:
        """Adds this block's keys to the online softmax of a unit."""
        old = peaks[index]
        p, new = weights(scores_ref, index, masked, old)
        shrink = jnp.exp2(old - new)
        peaks[index] = new
        totals[index] = totals[index] * shrink + jnp.sum(p, axis=0, keepdims=True)
        before = jnp.where(visit.first, 0.0, sums[index] * shrink)  # what is there at first may be NaN
        sums[index] = before + weighted_values(p)

    def every_unit(take: Callable[..., None], masked: bool) -> None:
        v = v_ref[...]
        if keys % block_k:  # what lies behind the last key may be anything, NaN too
            row = visit.key_block * block_k + jax.lax.broadcasted_iota(jnp.int32, (block_k, 1), 0)
            v = jnp.where(row < keys, v, 0)
        values[...] = v.T

        def pair(index: Index, following: Index | None) -> None:
            odd[...] = scores(index + 1)
            take(even, index, masked)
            if following is not None:
                even[...] = scores(following)
            take(odd, index + 1, masked)

        even[...] = scores(jnp.int32(0))
        if units == 2:
            pair(jnp.int32(0), None)
        else:
            pl.loop(0, units // 2)(lambda n: pair(2 * n, jnp.minimum(2 * n + 2, units - 1)))

    alone = visit.first & visit.last

    @pl.when(on & visit.first & ~alone)
    def start() -> None:
        peaks[...] = jnp.full_like(peaks, MASK)
        totals[...] = jnp.zeros_like(totals)

    for masked, right in ((False, visit.whole), (True, ~visit.whole)):
        for take, right_too in ((take_all, alone), (take_some, ~alone)):
            pl.when(on & ~visit.empty & right & right_too)(functools.partial(every_unit, take, masked))

    @pl.when(on & visit.last & ~alone)
    def finish() -> None:
        pl.loop(0, units, unroll=2)(lambda index: write(index, sums[index], totals[index]))

    @pl.when(on & visit.empty)
    def nothing() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)
