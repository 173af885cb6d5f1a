"""`attention` for NVIDIA Hopper GPUs (sm_90a): flash attention over key intervals, in Pallas Mosaic GPU.

A program has three warpgroups of 128 threads. Two of them compute a block of query rows each. The third one copies the
keys and values that both read into shared memory (TMA), some blocks ahead. The two that compute take turns: while one
multiplies on the tensor cores, the other one computes its softmax (FlashAttention-3, arXiv:2407.08608).

The program visits the key blocks between the smallest `lo` and the largest `hi` of its rows, and masks only those that
some row sees in part. If no row sees a key (padding at the end of a batch), it visits none.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from funnel_kernels.shapes import Bounds, Heads
from funnel_kernels.target import Target, Unsupported

LOG2_E = math.log2(math.e)
BLOCK_Q = 64  # query rows of a warpgroup, what one wgmma instruction multiplies
COMPUTING = 2  # warpgroups
# Registers of a thread. 128 threads of each warpgroup share 65,536.
REGISTERS_TO_COMPUTE, REGISTERS_TO_LOAD = 232, 40
# A warpgroup's layouts: of a tile of scores or results, and of one value for each of its rows.
TILE = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)


class Sizes(NamedTuple):
    """Keys of a block, and blocks that are in shared memory at once."""

    block_k: int
    stages: int


SIZES = {64: Sizes(128, 4), 128: Sizes(128, 2), 256: Sizes(64, 2)}  # by head dim; none spills registers


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
    """See `funnel_kernels.attention`."""
    head_dim = q.shape[1] // heads
    if q.dtype != jnp.bfloat16:
        raise Unsupported(f"the arrays are {q.dtype}; the kernel multiplies bfloat16 alone")
    if head_dim not in SIZES:
        raise Unsupported(f"heads are {head_dim} wide; the kernel supports {', '.join(map(str, SIZES))}")
    if scale <= 0:
        raise Unsupported(f"scale={scale} is not positive; the kernel finds the highest score before it is scaled")
    sizes = SIZES[head_dim]
    # The query heads of a row read the same key/value head if there is only one. They are rows of one block then.
    group = heads if kv_heads == 1 else 1
    queries = q.reshape(-1, heads // group, head_dim)
    keys, values = (x.reshape(-1, kv_heads, head_dim) for x in (k, v))
    blocks = pl.cdiv(len(queries), COMPUTING * BLOCK_Q)
    padding = (0, blocks * COMPUTING * BLOCK_Q - len(queries))
    lo, hi = (jnp.pad(jnp.repeat(bound, group), padding) for bound in (lo, hi))  # rows that see nothing
    computed = plgpu.kernel(
        partial(
            program,
            sizes=sizes,
            heads_per_key=heads // group // kv_heads,
            scale=scale,
            softcap=softcap,
            simulated=bool(target.interpret),
        ),
        out_type=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        scratch_types=(scratch(head_dim, sizes),),
        grid=(heads // group, blocks),
        grid_names=("head", "block"),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=target.interpret or None,
    )
    out: jax.Array = computed(queries, keys, values, lo, hi, key_blocks(lo, hi, len(keys), blocks, sizes.block_k))
    return out.reshape(q.shape)


def key_blocks(lo: Bounds, hi: Bounds, keys: int, blocks: int, block_k: int) -> jax.Array:  # [4, blocks] int32
    """For each program: the first key block that it visits, the end of them, and the same two of those without a mask.

    They depend on `lo` and `hi` alone, so XLA computes them once for all layers.
    """
    lo, hi = lo.reshape(blocks, -1), hi.reshape(blocks, -1)
    sees_keys = lo < hi
    end = pl.cdiv(jnp.where(sees_keys, hi, 0).max(1), block_k)
    begin = jnp.minimum(jnp.where(sees_keys, lo, keys).min(1) // block_k, end)
    whole_begin = pl.cdiv(jnp.where(sees_keys, lo, 0).max(1), block_k)
    whole_end = jnp.where(sees_keys, hi, keys).min(1) // block_k
    return jnp.stack([begin, end, whole_begin, whole_end]).astype(jnp.int32)


class Scratch(NamedTuple):
    """A program's shared memory, and its barriers."""

    queries: Any  # [COMPUTING, BLOCK_Q, d]; the results in the end
    keys: Any  # [stages, block_k, d]
    values: Any  # [stages, block_k, d]
    queries_loaded: Any  # one for each warpgroup
    keys_loaded: Any  # one for each stage, as are the next three
    values_loaded: Any
    keys_used: Any  # both warpgroups arrive
    values_used: Any
    turn: Any


def scratch(head_dim: int, sizes: Sizes) -> Scratch:
    block_k, stages = sizes

    def shared(*shape: int) -> Any:
        # The layout that TMA writes and wgmma reads without bank conflicts.
        layout = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=layout)

    loaded, used = plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages)
    return Scratch(
        shared(COMPUTING, BLOCK_Q, head_dim),
        shared(stages, block_k, head_dim),
        shared(stages, block_k, head_dim),
        plgpu.Barrier(num_barriers=COMPUTING),
        loaded,
        loaded,
        used,
        used,
        plgpu.Barrier(num_arrivals=COMPUTING),
    )


def program(
    q_ref: Any,  # [rows, query heads, d]
    k_ref: Any,  # [keys, key/value heads, d]
    v_ref: Any,
    lo_ref: Any,  # [padded rows]
    hi_ref: Any,
    blocks_ref: Any,  # [4, blocks]
    out_ref: Any,  # like q_ref
    memory: Scratch,
    *,
    sizes: Sizes,
    heads_per_key: int,
    scale: float,
    softcap: float | None,
    simulated: bool,
) -> None:
    """What a program does for one head and one block of rows."""
    head, block, warpgroup = (lax.axis_index(name) for name in ("head", "block", "warpgroup"))
    begin, end, whole_begin, whole_end = (blocks_ref[index, block] for index in range(4))
    block_k, stages = sizes

    def stage_of(index: jax.Array) -> jax.Array:
        return lax.rem(index - begin, jnp.int32(stages))

    @pl.when(warpgroup < COMPUTING)
    def compute() -> None:
        plgpu.set_max_registers(REGISTERS_TO_COMPUTE, action="increase")
        rows = pl.ds((block * COMPUTING + warpgroup) * BLOCK_Q, BLOCK_Q)
        queries = memory.queries.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[rows, head], queries, memory.queries_loaded.at[warpgroup])
        lo, hi = (plgpu.load(ref.at[rows], (), layout=PER_ROW, optimized=False) for ref in (lo_ref, hi_ref))

        def take_turns() -> None:
            plgpu.barrier_arrive(memory.turn)
            plgpu.barrier_wait(memory.turn)

        def await_keys(index: jax.Array) -> None:
            pl.when(index < end)(lambda: plgpu.barrier_wait(memory.keys_loaded.at[stage_of(index)]))

        def attend(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            """Adds a key block to an online softmax: sums, and the peak score they are relative to."""
            out, total, peak = sums
            stage = stage_of(index)
            scores = product(queries, memory.keys.at[stage], take_turns)
            plgpu.barrier_arrive(memory.keys_used.at[stage])
            to_base_2 = LOG2_E * scale
            if softcap:  # tanh from the base-2 exponential, which is a hardware instruction
                scores = softcap - 2 * softcap / (jnp.exp2(scores * (2 * to_base_2 / softcap)) + 1)
                to_base_2 = LOG2_E

            def masked() -> jax.Array:
                key = index * block_k + plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=TILE)
                return jnp.where((key >= across(lo, block_k)) & (key < across(hi, block_k)), scores, -jnp.inf)

            scores = lax.cond((index < whole_begin) | (index >= whole_end), masked, lambda: scores)
            higher = jnp.maximum(peak, scores.max(axis=1) * to_base_2)
            base = jnp.where(higher == -jnp.inf, 0.0, higher)  # no key seen yet
            shrink = jnp.exp2(peak - base)
            weights = jnp.exp2(scores * to_base_2 - across(base, block_k))
            out, total = out * across(shrink, out.shape[1]), total * shrink
            rounded = weights.astype(jnp.bfloat16)
            plgpu.barrier_arrive(memory.turn)
            plgpu.barrier_wait(memory.values_loaded.at[stage])
            plgpu.barrier_wait(memory.turn)
            total += weights.sum(axis=1)
            out = add_product(out, rounded, memory.values.at[stage], lambda: await_keys(index + 1), simulated)
            plgpu.barrier_arrive(memory.values_used.at[stage])
            return out, total, higher

        out = plgpu.layout_cast(jnp.zeros(queries.shape, jnp.float32), TILE)
        total = plgpu.layout_cast(jnp.zeros(BLOCK_Q, jnp.float32), PER_ROW)
        peak = plgpu.layout_cast(jnp.full(BLOCK_Q, -jnp.inf, jnp.float32), PER_ROW)
        plgpu.barrier_wait(memory.queries_loaded.at[warpgroup])
        await_keys(begin)
        pl.when(warpgroup == 1)(take_turns)  # it is one turn behind
        out, total, peak = lax.fori_loop(begin, end, attend, (out, total, peak))
        pl.when(warpgroup == 0)(take_turns)
        # A row that sees no key may have sums from blocks that other rows see whole.
        out *= across(jnp.where(lo < hi, 1 / total, 0.0), out.shape[1])
        queries[...] = out.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries, out_ref.at[rows, head])  # rows beyond the end are not written
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTING)
    def load() -> None:
        plgpu.set_max_registers(REGISTERS_TO_LOAD, action="decrease")
        kv_head = lax.div(head, jnp.int32(heads_per_key))
        copies = (
            (k_ref, memory.keys, memory.keys_loaded, memory.keys_used),
            (v_ref, memory.values, memory.values_loaded, memory.values_used),
        )

        @pl.loop(begin, end)
        def _(index: jax.Array) -> None:
            stage = stage_of(index)
            for source, blocks, loaded, used in copies:
                pl.when(index >= begin + stages)(partial(plgpu.barrier_wait, used.at[stage]))
                rows = pl.ds(index * block_k, block_k)  # those beyond the end are zeros
                plgpu.copy_gmem_to_smem(source.at[rows, kv_head], blocks.at[stage], loaded.at[stage])

        if simulated:  # the simulator asks that every arrival is waited for

            @pl.loop(jnp.maximum(begin, end - stages), end)
            def _(index: jax.Array) -> None:
                for *_, used in copies:
                    plgpu.barrier_wait(used.at[stage_of(index)])


def across(per_row: jax.Array, columns: int) -> jax.Array:
    """[BLOCK_Q] to [BLOCK_Q, columns]."""
    return lax.broadcast_in_dim(per_row, (len(per_row), columns), [0])


def product(queries: Any, keys: Any, meanwhile: Callable[[], None]) -> jax.Array:
    """`queries @ keys.T`, [BLOCK_Q, block_k] float32; `meanwhile` runs while the tensor cores multiply."""

    def multiply(scores: Any) -> jax.Array:
        plgpu.wgmma(scores, queries, plgpu.transpose_ref(keys, (1, 0)))
        meanwhile()
        result: jax.Array = scores[...]
        return result

    return pl.run_scoped(multiply, plgpu.ACC((BLOCK_Q, keys.shape[0]), jnp.float32))


def add_product(
    out: jax.Array, weights: jax.Array, values: Any, meanwhile: Callable[[], None], simulated: bool
) -> jax.Array:
    """`out + weights @ values`, [BLOCK_Q, d] float32, as `product`."""
    if simulated:  # the simulator has no sums that begin with a value
        out += jnp.dot(weights.astype(jnp.float32), values[...].astype(jnp.float32))
        plgpu.commit_smem()
        meanwhile()
        return out

    def multiply(sums: Any) -> None:
        plgpu.wgmma(sums, weights, values)
        meanwhile()

    result: jax.Array = pl.run_state(multiply)(plgpu.ACC.init(out))
    return result
