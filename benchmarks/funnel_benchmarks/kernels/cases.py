"""Every op at the sizes that a model has, as calls of one compiled program each, with the work that they do.

Row-wise ops have more rows than any cache holds; products and attention have those of a batch of sequences.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funnel_benchmarks.inputs import random_inputs
from funnel_benchmarks.measure import Call
from funnel_engine import Engine, FunnelConfig, HeadConfig, ModelConfig
from funnel_engine.flops import forward_flops
from funnel_engine.packing import Ints
from funnel_engine.weights import DTYPES, random_weights
from funnel_kernels import (
    Target,
    add_norm,
    attention,
    gated_linear,
    linear,
    linear_add_norm,
    pool_norm,
    prepare,
    project_heads,
    recover_norm,
)
from funnel_kernels.recover_norm import MODES

STRIDE = 2
ROW_BYTES = 2**28  # of the largest array of a row-wise op


class Case(NamedTuple):
    """An op on arrays of some size.

    Attributes:
        name: the op, and what distinguishes the case.
        make: a target -> the call, whose program is compiled when it is first made.
        flops: of matrix products.
        bytes: that are read and written at least.
    """

    name: str
    make: Callable[[Target], Call]
    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Sizes:
    """What the cases are made for.

    Attributes:
        lengths: tokens of each sequence of the batch, [B].
    """

    config: ModelConfig
    lengths: Ints
    dtype: str

    @property
    def rows(self) -> int:
        return int(self.lengths.sum())

    @property
    def row_wise_rows(self) -> int:
        """As many as make the array `ROW_BYTES` large, and a multiple of every stride."""
        return max(64, ROW_BYTES // (self.config.hidden_size * self.itemsize) // 64 * 64)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def normal(self, *shape: int, seed: int = 0) -> jax.Array:
        values = np.random.default_rng(seed).standard_normal(shape, np.float32)
        return jnp.asarray(values.astype(DTYPES[self.dtype]))


def cases(sizes: Sizes) -> list[Case]:
    """All ops: products with what is fused to them, attention, what works on whole rows, and the whole forward pass."""
    config = sizes.config
    width, mlp, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    return [
        heads_case(sizes),
        linear_add_norm_case(sizes, "attention's output", heads),
        gated_case(sizes),
        linear_add_norm_case(sizes, "MLP's output", mlp),
        linear_case(sizes, width, mlp),
        attention_case(sizes, 1),
        attention_case(sizes, STRIDE),
        add_norm_case(sizes),
        pool_case(sizes),
        *(recover_case(sizes, mode) for mode in MODES),
        forward_case(sizes),
    ]


def heads_case(sizes: Sizes) -> Case:
    config, rows = sizes.config, sizes.rows
    groups, d = (config.num_heads, config.num_kv_heads), config.head_dim
    width, out = config.hidden_size, d * (sum(groups) + groups[1])

    def make(target: Target) -> Call:
        x, norms = sizes.normal(rows, width), tuple(sizes.normal(d, seed=2 + group) for group in range(2))
        angles = jnp.arange(rows * d // 2, dtype=jnp.float32).reshape(rows, d // 2)
        weight = prepare(np.asarray(sizes.normal(out, width, seed=1)), target=target)
        options: Any = {"heads": groups, "plain_heads": groups[1], "eps": config.norm_eps, "target": target}
        run = jax.jit(partial(project_heads, **options))
        return partial(run, x, weight, jnp.cos(angles), jnp.sin(angles), norms if config.qk_norm else None)

    moved = sizes.itemsize * (rows * width + out * width + rows * out)
    return Case(f"project_heads, {rows} x {width} x {out}", make, 2 * rows * width * out, moved)


def linear_case(sizes: Sizes, width: int, out: int) -> Case:
    """The product alone, whose result is float32."""
    rows, itemsize = sizes.rows, sizes.itemsize

    def make(target: Target) -> Call:
        weight = prepare(np.asarray(sizes.normal(out, width, seed=1)), target=target)
        return partial(jax.jit(partial(linear, target=target)), sizes.normal(rows, width), weight)

    moved = itemsize * (rows * width + out * width) + 4 * rows * out
    return Case(f"linear, {rows} x {width} x {out}", make, 2 * rows * width * out, moved)


def linear_add_norm_case(sizes: Sizes, name: str, width: int) -> Case:
    """The end of a sub-layer: its product, the residual sum, and the norms of the family."""
    config, rows, out = sizes.config, sizes.rows, sizes.config.hidden_size

    def make(target: Target) -> Call:
        x, residual = sizes.normal(rows, width), sizes.normal(rows, out, seed=2)
        weight = prepare(np.asarray(sizes.normal(out, width, seed=1)), target=target)
        norm, post_norm = sizes.normal(out, seed=3), sizes.normal(out, seed=4) if config.post_norms else None
        run = jax.jit(partial(linear_add_norm, eps=config.norm_eps, target=target))
        return partial(run, x, weight, residual, norm, update_weight=post_norm)

    moved = sizes.itemsize * (rows * width + out * width + 3 * rows * out)
    return Case(f"linear_add_norm, {name}, {rows} x {width} x {out}", make, 2 * rows * width * out, moved)


def gated_case(sizes: Sizes) -> Case:
    rows, width, out = sizes.rows, sizes.config.hidden_size, sizes.config.intermediate_size

    def make(target: Target) -> Call:
        x = sizes.normal(rows, width)
        weight = prepare(np.asarray(sizes.normal(2 * out, width, seed=1)), parts=2, target=target)
        return partial(jax.jit(partial(gated_linear, target=target)), x, weight)

    moved = sizes.itemsize * (rows * width + 2 * out * width + rows * out)
    return Case(f"gated_linear, {rows} x {width} x (2 x {out})", make, 4 * rows * width * out, moved)


def attention_case(sizes: Sizes, stride: int) -> Case:
    """Every token's row sees its whole sequence; with a stride only every second row asks."""
    config, lengths, d = sizes.config, sizes.lengths, sizes.config.head_dim
    ends = np.cumsum(lengths, dtype=np.int32)
    lo, hi = (np.repeat(edges, lengths)[::stride] for edges in (ends - lengths, ends))
    heads, kv_heads, queries = config.num_heads, config.num_kv_heads, len(lo)

    def make(target: Target) -> Call:
        shapes = (queries, heads * d), *2 * [(sizes.rows, kv_heads * d)]
        q, k, v = (sizes.normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
        options: Any = {"heads": heads, "kv_heads": kv_heads, "scale": d**-0.5, "target": target}
        return partial(jax.jit(partial(attention, **options)), q, k, v, jnp.asarray(lo), jnp.asarray(hi))

    name = f"attention, {queries} queries on stride {stride}, {heads} heads of {d} on {kv_heads}"
    pairs = int((hi - lo).sum(dtype=np.int64))
    return Case(name, make, 4 * d * heads * pairs, 2 * d * sizes.itemsize * (queries * heads + sizes.rows * kv_heads))


def add_norm_case(sizes: Sizes) -> Case:
    rows, width = sizes.row_wise_rows, sizes.config.hidden_size

    def make(target: Target) -> Call:
        x, update, weight = sizes.normal(rows, width), sizes.normal(rows, width, seed=1), sizes.normal(width, seed=2)
        run = jax.jit(partial(add_norm, eps=sizes.config.norm_eps, target=target))
        return partial(run, x, update, weight)

    return Case(f"add_norm, {rows} x {width}", make, 0, 4 * rows * width * sizes.itemsize)


def pool_case(sizes: Sizes) -> Case:
    rows, width = sizes.row_wise_rows, sizes.config.hidden_size

    def make(target: Target) -> Call:
        x, weight = sizes.normal(rows, width), sizes.normal(width, seed=1)
        run = jax.jit(partial(pool_norm, stride=STRIDE, pool="max", eps=sizes.config.norm_eps, target=target))
        return partial(run, x, jnp.ones(rows, bool), weight)

    moved = sizes.itemsize * width * (rows + 2 * rows // STRIDE)
    return Case(f"pool_norm, max, stride {STRIDE}, {rows} x {width}", make, 0, moved)


def recover_case(sizes: Sizes, mode: str) -> Case:
    rows, width = sizes.row_wise_rows, sizes.config.hidden_size

    def make(target: Target) -> Call:
        short, weight = sizes.normal(rows // STRIDE, width), sizes.normal(width, seed=1)
        full = None if mode == "tile" else sizes.normal(rows, width, seed=2)
        options: Any = {"stride": STRIDE, "mode": mode, "eps": sizes.config.norm_eps, "target": target}
        return partial(jax.jit(partial(recover_norm, **options)), short, full, weight)

    moved = sizes.itemsize * width * (rows // STRIDE + rows * (1 if mode == "tile" else 2))
    return Case(f"recover_norm, {mode}, stride {STRIDE}, {rows} x {width}", make, 0, moved)


def forward_case(sizes: Sizes) -> Case:
    """`Engine.embed` of the batch: all layers, from ids on the host to vectors on the host."""
    config, head, rows = sizes.config, HeadConfig(), sizes.rows
    inputs = random_inputs(config.vocab_size, sizes.lengths)

    def make(target: Target) -> Call:
        weights = random_weights(config, head, sizes.dtype, seed=0)
        engine = Engine(config, head, weights, backend=target.backend, max_batch_tokens=rows)
        return partial(engine.embed, inputs)

    flops = forward_flops(config, FunnelConfig(), sizes.lengths)
    return Case(f"embed, {config.num_layers} layers, {len(sizes.lengths)} sequences, {rows} tokens", make, flops, 0)
