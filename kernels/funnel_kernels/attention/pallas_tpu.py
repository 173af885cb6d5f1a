"""`attention` for TPUs: flash attention (arXiv:2205.14135) over key intervals, in Pallas.

The grid is a list of *visits*. A visit is a query block together with a key block that some of its rows see. The list
is made from the intervals before the kernel starts. Key blocks that no row sees are not fetched and cost no step.

A visit computes all query heads of one key/value head. It splits the query rows of each head into *units* and processes
two units at a time: the matrix unit computes the scores of the next unit while the vector units compute the weights of
the current one.

Everything is transposed. Scores are [keys, queries], so the peak and the sum of a query are reductions over sublanes,
which are cheap compared with the elementwise work, and its bounds are a row that is broadcast for free. Results are
[d, queries] until they are written.
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
MASK = -(2.0**100)  # far below any score, but finite, so that differences of scores are finite
WIDEST = 256  # head dim
LANES = 128
Index = Any  # index of a block or a unit: an int or a traced scalar
MOST_VISITS = 2**16  # the list is in scalar memory, 4 bytes per visit
MOST_QUERY_BLOCKS, MOST_KEY_BLOCKS = 2**13, 2**14  # `encode` has 13 and 14 bits for their indices


class Sizes(NamedTuple):
    """Query rows and keys per block, and the largest number of query rows per unit."""

    block_q: int
    block_k: int
    unit: int


# The sizes with the fewest instruction bundles in the static schedule of 8 query heads of width 256 on one key/value
# head (`funnel_benchmarks.static_tpu`).
SIZES = {
    "v4": Sizes(256, 512, 256),
    "v5e": Sizes(512, 512, 256),
    "v5p": Sizes(512, 512, 256),
    "v6e": Sizes(512, 512, 512),
    "v7x": Sizes(512, 512, 512),
}
COLUMNS = 8 * 256  # columns of queries per visit in that schedule


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
    """See `funnel_kernels.attention`; `sizes` default to `rule`."""
    head_dim = q.shape[1] // heads
    if head_dim > WIDEST:
        raise Unsupported(f"heads are {head_dim} wide; the kernel supports at most {WIDEST}")
    padded_dim = round_up(head_dim)  # a head must fill whole registers; only the smallest T5Gemmas have narrower ones
    if padded_dim > head_dim:
        q, k, v = (pad_heads(x, head_dim, padded_dim) for x in (q, k, v))
    sizes = sizes or rule(pallas_calls.generation(target), q.dtype, heads // kv_heads * padded_dim)
    out = launch(
        q, k, v, lo, hi, heads=heads, kv_heads=kv_heads, scale=scale, softcap=softcap, sizes=sizes, target=target
    )
    return out if padded_dim == head_dim else out.reshape(-1, heads, padded_dim)[..., :head_dim].reshape(len(lo), -1)


def pad_heads(x: Heads, head_dim: int, to: int) -> Heads:
    """[N, heads * head_dim] -> [N, heads * to], with zeros after each head."""
    split = x.reshape(x.shape[0], -1, head_dim)
    return jnp.pad(split, ((0, 0), (0, 0), (0, to - head_dim))).reshape(x.shape[0], -1)


def rule(generation: pallas_calls.Generation, dtype: Any, columns: int) -> Sizes:
    """The sizes for a generation. The query rows are scaled if a visit has more or fewer than `COLUMNS` columns."""
    block_q, block_k, unit = SIZES[generation.name]
    if dtype == jnp.float32:  # twice the bytes, and six products instead of one
        block_q, block_k, unit = block_q // 4, block_k // 2, LANES
    block_q = min(2 * block_q, max(LANES, block_q * COLUMNS // columns // LANES * LANES))
    return Sizes(block_q, block_k, unit)


def launch(
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
    sizes: Sizes,
    target: Target,
) -> Heads:
    """The call of the kernel. The width of a head must be a multiple of `LANES`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, width = q.shape
    d, group = width // heads, heads // kv_heads
    # A single block is rounded up to whole registers, so only the smallest batches are padded.
    block_q, block_k = min(sizes.block_q, round_up(rows)), min(sizes.block_k, round_up(k.shape[0]))
    q, lo, hi = (pad_rows(array, block_q) for array in (q, lo, hi))
    k, v = pad_rows(k, block_k), pad_rows(v, block_k)
    parts = -(-block_q // sizes.unit)  # units per head
    if group * parts % 2:  # units come in pairs
        parts *= 2
    unit = block_q // parts
    units = group * parts

    blocks = -(-q.shape[0] // block_q), -(-k.shape[0] // block_k)
    if math.prod(blocks) > MOST_VISITS or blocks[0] > MOST_QUERY_BLOCKS or blocks[1] > MOST_KEY_BLOCKS:
        raise Unsupported(
            f"{rows} queries and {k.shape[0]} keys need up to {blocks[0]} x {blocks[1]} visits; the kernel supports "
            f"{MOST_VISITS} visits, of {MOST_QUERY_BLOCKS} query blocks and {MOST_KEY_BLOCKS} key blocks; make batches "
            "smaller (max_batch_tokens)"
        )
    generation = pallas_calls.generation(target)
    limit = generation.vmem * 3 // 4
    needed = 2 * (2 * block_q * group + 2 * block_k) * d * q.dtype.itemsize  # blocks, double-buffered
    needed += 4 * (block_q * group * (d + 16) + 2 * block_k * unit) + d * block_k * q.dtype.itemsize  # scratch
    if needed > limit:
        raise Unsupported(
            f"{group} query heads of width {d} on one key/value head need {needed:,} bytes of vector memory; the limit "
            f"on {generation.name} is {limit:,}"
        )
    # The cores of a device divide the key/value heads if their number allows it, and else the visits.
    cores = generation.cores if kv_heads % generation.cores and blocks[0] > 1 else 1
    begin, visits = plan_visits(lo, hi, blocks, block_q, block_k, cores)

    # The indices of blocks in their arrays; `begin` and `visits` are in scalar memory.
    def queries(head: Index, core: Index, step: Index, begin: Any, visits: Any) -> tuple[Index, Index]:
        return decode(visits[visit_index(core, step, begin)]).query_block, head

    def keys(head: Index, core: Index, step: Index, begin: Any, visits: Any) -> tuple[Index, Index]:
        return decode(visits[visit_index(core, step, begin)]).key_block, head

    def bounds(head: Index, core: Index, step: Index, begin: Any, visits: Any) -> tuple[Index, Index]:
        return 0, decode(visits[visit_index(core, step, begin)]).query_block

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
            flops=4 * rows * k.shape[0] * width,  # upper bound: the intervals are known only at run time
            transcendentals=rows * k.shape[0] * heads,
            bytes_accessed=2 * (q.nbytes + k.nbytes),
        ),
        name="attention",
    )(begin, visits, q, k, v, jnp.stack([lo, hi]))
    return out[:rows]


def round_up(size: int) -> int:
    return -(-size // LANES) * LANES


def pad_rows(array: jax.Array, least: int) -> jax.Array:
    return jnp.pad(array, ((0, max(0, least - array.shape[0])), *((0, 0),) * (array.ndim - 1)))


class Visit(NamedTuple):
    """A step of the grid.

    Attributes:
        query_block, key_block: indices of the two blocks.
        first, last: whether this is the query block's first and last visit.
        whole: every row that sees any key sees all keys of this block.
        empty: no row of the query block sees a key; this is its only visit.
    """

    query_block: jax.Array
    key_block: jax.Array
    first: jax.Array
    last: jax.Array
    whole: jax.Array
    empty: jax.Array


def encode(visit: Visit) -> jax.Array:
    """A visit as one int32, because scalar memory is small."""
    code = visit.query_block << 18 | visit.key_block << 4
    for bit, flag in enumerate(visit[2:]):
        code |= flag.astype(jnp.int32) << bit
    return code


def decode(code: jax.Array) -> Visit:
    flags = (((code >> bit) & 1) == 1 for bit in range(4))
    return Visit(code >> 18, (code >> 4) & (2**14 - 1), *flags)


def visit_index(core: Index, step: Index, begin: Any) -> jax.Array:
    """The index in the list of a core's visit at a step; a core that has finished stays at its last visit."""
    return jnp.minimum(begin[core] + step, begin[core + 1] - 1)


def plan_visits(
    lo: Bounds, hi: Bounds, blocks: tuple[int, int], block_q: int, block_k: int, cores: int
) -> tuple[jax.Array, jax.Array]:
    """The list of visits, query block by query block.

    Args:
        blocks: numbers of query blocks and of key blocks.

    Returns:
        begin: [cores + 1] int32, where the visits of each core begin and end. A query block is not split over cores.
        visits: [query blocks * key blocks] int32 codes. Entries after the end of the last core are undefined.
    """
    sees_keys = lo < hi

    def reduce(bounds: Bounds, default: int, function: Callable[..., jax.Array]) -> jax.Array:
        """Reduces each query block over its rows that see a key; `default` replaces the other rows."""
        padding = blocks[0] * block_q - len(bounds)
        filled = jnp.pad(jnp.where(sees_keys, bounds, default), (0, padding), constant_values=default)
        return function(filled.reshape(-1, block_q), axis=1)

    keys = blocks[1] * block_k
    first = reduce(lo, keys, jnp.min) // block_k
    count = jnp.maximum(-(-reduce(hi, 0, jnp.max) // block_k) - first, 0)
    whole_begin, whole_end = -(-reduce(lo, 0, jnp.max) // block_k), reduce(hi, keys, jnp.min) // block_k
    first = jnp.where(count > 0, first, 0)
    visits = jnp.maximum(count, 1)
    ends = jnp.cumsum(visits)

    # The query block of each visit, as sums over a table of pairs, because a TPU gathers scalars slowly.
    step = jnp.arange(blocks[0] * blocks[1], dtype=jnp.int32)[:, None]
    belongs = (ends - visits <= step) & (step < ends)  # [visits, query blocks]

    def of_visit(values: jax.Array) -> jax.Array:  # [query blocks] -> [visits]
        return jnp.sum(jnp.where(belongs, values, 0), axis=1, dtype=jnp.int32)

    nth = step[:, 0] - of_visit(ends - visits)
    key_block = of_visit(first) + nth
    codes = encode(
        Visit(
            of_visit(jnp.arange(blocks[0], dtype=jnp.int32)),
            key_block,
            first=nth == 0,
            last=nth == of_visit(visits) - 1,
            whole=(of_visit(whole_begin) <= key_block) & (key_block < of_visit(whole_end)),
            empty=of_visit(count) == 0,
        )
    )
    # The cores get about equal numbers of visits, and each core gets at least one query block.
    cuts = [
        jnp.clip(jnp.sum(ends <= ends[-1] * core // cores), core, blocks[0] - cores + core) for core in range(1, cores)
    ]
    return jnp.stack([jnp.int32(0), *(ends[cut - 1] for cut in cuts), ends[-1]]).astype(jnp.int32), codes


def kernel(
    begin: Any,  # [cores + 1]
    visits: Any,  # [query blocks * key blocks], see `plan_visits`
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
    """One step of the grid: a visit, or nothing if the core has finished."""
    from jax.experimental import pallas as pl

    block_k, unit = even.shape
    units = group * parts
    precision = jax.lax.Precision.HIGHEST if values.dtype == jnp.float32 else None
    product = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    core, step = pl.program_id(1), pl.program_id(2)
    visit = decode(visits[visit_index(core, step, begin)])
    is_active = begin[core] + step < begin[core + 1]

    def block_of(index: Index) -> tuple[Any, Any]:
        """The rows and columns of a unit in the blocks of queries and results."""
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
        sees_keys = bounds_ref[0:1, rows] < bounds_ref[1:2, rows]
        out_ref[rows, columns] = jnp.where(sees_keys, out / total, 0.0).T.astype(out_ref.dtype)

    def whole_softmax(scores_ref: Any, index: Index, masked: bool) -> None:
        """Computes and writes a unit whose keys are all in this block."""
        p, _ = weights(scores_ref, index, masked, None)
        write(index, weighted_values(p), jnp.sum(p, axis=0, keepdims=True))

    def update_softmax(scores_ref: Any, index: Index, masked: bool) -> None:
        """Adds this block's keys to the online softmax of a unit."""
        old = peaks[index]
        p, new = weights(scores_ref, index, masked, old)
        shrink = jnp.exp2(old - new)
        peaks[index] = new
        totals[index] = totals[index] * shrink + jnp.sum(p, axis=0, keepdims=True)
        before = jnp.where(visit.first, 0.0, sums[index] * shrink)  # before the first visit, memory may contain NaN
        sums[index] = before + weighted_values(p)

    def visit_units(softmax: Callable[..., None], masked: bool) -> None:
        v = v_ref[...]
        if keys % block_k:  # rows after the last key are undefined and may be NaN
            row = visit.key_block * block_k + jax.lax.broadcasted_iota(jnp.int32, (block_k, 1), 0)
            v = jnp.where(row < keys, v, 0)
        values[...] = v.T

        def pair(index: Index, following: Index | None) -> None:
            odd[...] = scores(index + 1)
            softmax(even, index, masked)
            if following is not None:
                even[...] = scores(following)
            softmax(odd, index + 1, masked)

        even[...] = scores(jnp.int32(0))
        if units == 2:
            pair(jnp.int32(0), None)
        else:
            pl.loop(0, units // 2)(lambda n: pair(2 * n, jnp.minimum(2 * n + 2, units - 1)))

    is_only_visit = visit.first & visit.last

    @pl.when(is_active & visit.first & ~is_only_visit)
    def start_softmax() -> None:
        peaks[...] = jnp.full_like(peaks, MASK)
        totals[...] = jnp.zeros_like(totals)

    # One of these four variants runs.
    for masked, masks_match in ((False, visit.whole), (True, ~visit.whole)):
        for softmax, visits_match in ((whole_softmax, is_only_visit), (update_softmax, ~is_only_visit)):
            condition = is_active & ~visit.empty & masks_match & visits_match
            pl.when(condition)(functools.partial(visit_units, softmax, masked))

    @pl.when(is_active & visit.last & ~is_only_visit)
    def finish_softmax() -> None:
        pl.loop(0, units, unroll=2)(lambda index: write(index, sums[index], totals[index]))

    @pl.when(is_active & visit.empty)
    def write_zeros() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)
