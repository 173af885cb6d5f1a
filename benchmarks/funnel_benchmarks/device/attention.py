"""How fast attention is: against cuDNN on the same data, and each variant against our own dense rate.

A rate counts useful operations: `4 * head_dim` for each query-key pair that a query head sees.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funnel_benchmarks.device import layouts, plots
from funnel_benchmarks.device.bench import Bench
from funnel_benchmarks.device.layouts import Layout
from funnel_benchmarks.device.part import CELL, MILLISECONDS, Part, against_goal
from funnel_benchmarks.lengths import draw
from funnel_benchmarks.measure import alone, in_turns, spread
from funnel_benchmarks.results import Measurement, Row, error_text
from funnel_benchmarks.statistics import quartiles
from funnel_benchmarks.suite import Column, Plot, field
from funnel_engine.packing import Ints
from funnel_kernels import Target, attention
from funnel_kernels.errors import FunnelError

DENSE_GOAL, VARIANT_GOAL = 0.9, 0.85  # of the peer's rate
LARGEST_DIFFERENCE = 2e-2  # between two implementations in bfloat16, relative


class Work(NamedTuple):
    """Attention over random data, compiled when it is first run."""

    run: Callable[[], jax.Array]
    flops: int
    arrays: tuple[jax.Array, ...]  # q [Nq, heads * d], k, v [Nk, kv_heads * d]


def cells(bench: Bench) -> Iterator[Measurement]:
    sizes = bench.sizes
    shared, longest, mean = sizes.attention_heads[0], sizes.attention_lengths[-1], sizes.attention_lengths[0]
    for heads, kv_heads in sizes.attention_heads:
        for length in sizes.attention_lengths:
            yield f"{heads}/{kv_heads} heads, {length} tokens", partial(against_cudnn, bench, heads, kv_heads, length)

    def variant(name: str, layout: Layout, dense_length: int) -> Measurement:
        return name, partial(against_dense, bench, *shared, layout, dense_length)

    for length in sizes.strided_lengths:
        layout = layouts.packed(layouts.equal(sizes.tokens, length), stride=2)
        yield variant(f"queries on stride 2, {length} tokens", layout, length)
    for window in sizes.windows:
        radii = window // 2, window // 2
        layout = layouts.packed(layouts.equal(sizes.tokens, longest), window=radii)
        yield variant(f"window of {window}, {longest} tokens", layout, longest)
    for percent in sizes.padding_percent:
        yield variant(f"{percent} % padding, {mean} tokens", layouts.padded(sizes.tokens, mean, percent), mean)
    for name, lengths in ragged_lengths(bench).items():
        yield variant(f"ragged, {name}", layouts.packed(lengths), mean)
    yield f"XLA, {sizes.xla_length} tokens", partial(against_xla, bench, *shared, sizes.xla_length)


def ragged_lengths(bench: Bench) -> dict[str, Ints]:
    """Longest first, as the engine packs them."""
    tokens, longest = bench.sizes.tokens, bench.sizes.ragged_longest
    even = np.random.default_rng(bench.seed).integers(1, longest + 1, tokens).astype(np.int32)
    drawn = {f"even from 1 to {longest}": even, "passage": draw("passage", tokens, bench.seed)}
    return {name: -np.sort(-layouts.up_to(tokens, lengths)) for name, lengths in drawn.items()}


def prepare(bench: Bench, heads: int, kv_heads: int, layout: Layout, target: Target) -> Work:
    d = bench.sizes.head_dim
    rows = (layout.queries, heads), (layout.keys, kv_heads), (layout.keys, kv_heads)
    q, k, v = (bench.normal(stream, (count, width * d)) for stream, (count, width) in enumerate(rows))
    lo, hi = jax.device_put((layout.lo, layout.hi))
    options: Any = {"heads": heads, "kv_heads": kv_heads, "scale": d**-0.5, "target": target}
    compiled = jax.jit(partial(attention, **options))
    return Work(lambda: compiled(q, k, v, lo, hi), 4 * d * heads * layout.pairs, (q, k, v))


def dense(bench: Bench, heads: int, kv_heads: int, length: int, target: Target) -> Work:
    return prepare(bench, heads, kv_heads, layouts.packed(layouts.equal(bench.sizes.tokens, length)), target)


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, *, heads: int, kv_heads: int, length: int
) -> jax.Array:  # [N, heads * d], as all of ours
    """cuDNN's attention of the same packed rows, as sequences of one length; the reshapes move nothing."""
    d = q.shape[1] // heads
    per_head = [x.reshape(-1, length, count, d) for x, count in ((q, heads), (k, kv_heads), (v, kv_heads))]
    return jax.nn.dot_product_attention(*per_head, scale=d**-0.5, implementation="cudnn").reshape(q.shape)


def against_cudnn(bench: Bench, heads: int, kv_heads: int, length: int) -> Row:
    ours = dense(bench, heads, kv_heads, length, bench.target)
    facts = {"kind": "dense", "heads": heads, "kv_heads": kv_heads, "length": length}
    program = jax.jit(partial(cudnn, heads=heads, kv_heads=kv_heads, length=length))
    try:
        theirs = jax.block_until_ready(program(*ours.arrays))
    except Exception as error:  # no cuDNN here, or it refuses: XLA raises anything
        samples = alone(bench.sampler(ours.run), bench.sizes.repeats)
        return facts | figures(ours, samples) | {"peer": "cuDNN", "peer_error": error_text(error)}
    check_same(ours.run(), theirs)
    return facts | compared(bench, ours, "cuDNN", lambda: program(*ours.arrays), ours.flops, DENSE_GOAL)


def against_dense(bench: Bench, heads: int, kv_heads: int, layout: Layout, length: int) -> Row:
    ours = prepare(bench, heads, kv_heads, layout, bench.target)
    peer = dense(bench, heads, kv_heads, length, bench.target)
    facts = {"kind": "variant", "heads": heads, "kv_heads": kv_heads, "length": length}
    return facts | compared(bench, ours, f"own dense, {length} tokens", peer.run, peer.flops, VARIANT_GOAL)


def against_xla(bench: Bench, heads: int, kv_heads: int, length: int) -> Row:
    ours = dense(bench, heads, kv_heads, length, bench.target)
    peer = dense(bench, heads, kv_heads, length, dataclasses.replace(bench.target, backend="xla"))
    check_same(ours.run(), peer.run())
    facts = {"kind": "xla", "heads": heads, "kv_heads": kv_heads, "length": length}
    return facts | compared(bench, ours, "own xla backend", peer.run, peer.flops, None)


def compared(
    bench: Bench, ours: Work, peer: str, run_peer: Callable[[], Any], peer_flops: int, goal: float | None
) -> Row:
    """Both rates, measured in turns, and ours as a share of the peer's."""
    peer_samples, samples = in_turns(bench.sampler(run_peer), bench.sampler(ours.run), bench.sizes.repeats)
    row = figures(ours, samples)
    peer_rate = peer_flops / quartiles(peer_samples).median / 1e12
    row |= {"peer": peer, "peer_seconds": spread(peer_samples), "peer_tflops_per_second": peer_rate}
    return row | {"share": row["tflops_per_second"] / peer_rate, "goal": goal}


def figures(work: Work, samples: list[float]) -> Row:
    return {
        "flops": work.flops,
        "seconds": spread(samples),
        "tflops_per_second": work.flops / quartiles(samples).median / 1e12,
    }


def check_same(ours: jax.Array, theirs: jax.Array) -> None:
    """Raises `FunnelError` unless two implementations computed the same function: else a comparison says nothing."""
    difference = float(relative_difference(ours, theirs))
    if not difference <= LARGEST_DIFFERENCE:
        raise FunnelError(f"the peer computed something else: relative difference {difference:.3g}")


@jax.jit
def relative_difference(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


class Attention(Part):
    name = "device attention"
    title = "Attention"
    note = "Useful operations: 4 x head dim for each query-key pair that a query head sees."
    columns = (
        CELL,
        MILLISECONDS,
        Column("TFLOP/s", field("tflops_per_second", ",.1f")),
        Column("against", lambda row: row["peer"]),
        Column("its TFLOP/s", lambda row: row.get("peer_error") or field("peer_tflops_per_second", ",.1f")(row)),
        Column("share", against_goal("share")),
    )
    measurements = staticmethod(cells)

    @classmethod
    def plots(cls, content: Row) -> list[Plot]:
        if not any(row["kind"] == "dense" for row in content["rows"]):
            return []
        caption = "Rates of attention over the length of a sequence"
        return [Plot(partial(plots.attention, content), f"{caption}; the table has the same figures.", caption)]
