"""Every op at the sizes that a model has, as calls of one compiled program each, with the work that they do.

Row-wise ops have more rows than any cache holds; products and attention have those of a batch of sequences.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_benchmarks.inputs import random_inputs
from funnel_benchmarks.kernels.layouts import Layout, packed
from funnel_benchmarks.measure import Call
from funnel_benchmarks.models import Model
from funnel_engine import Engine, ModelConfig
from funnel_engine.devices import local_target
from funnel_engine.flops import forward_flops
from funnel_engine.funnel_transformer_config import require_model_config
from funnel_engine.models import forward_of
from funnel_engine.packing import Ints, pack
from funnel_engine.weights import DTYPES
from funnel_engine.xla_options import compiler_options
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
from funnel_kernels.errors import FunnelError
from funnel_kernels.recover_norm import MODES

STRIDE = 2
CUDNN = "cudnn"  # beside the names of backends: attention by cuDNN
LARGEST_DIFFERENCE = 2e-2  # between cuDNN's attention and ours in bfloat16, relative


class Case(NamedTuple):
    """An op on arrays of some size.

    Attributes:
        name: the op, and what distinguishes the case.
        make: a backend's name -> the call, whose program is compiled when it is first made.
        flops: of matrix products.
        bytes: that are read and written at least.
        backends: that it is for; empty: for all of a suite.
    """

    name: str
    make: Callable[[str], Call]
    flops: int
    bytes: int
    backends: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Sizes:
    """What cases are made for.

    Attributes:
        lengths: tokens of each sequence of the batch, [B].
        row_bytes: of the largest array of a row-wise op.
    """

    model: Model
    lengths: Ints
    row_bytes: int = 2**28

    @property
    def config(self) -> ModelConfig:
        """The architecture of a model that is no Funnel-Transformer."""
        return require_model_config(self.model.config, "this case of `bench kernels`")

    @property
    def rows(self) -> int:
        return int(self.lengths.sum())

    @property
    def row_wise_rows(self) -> int:
        """As many as make the array `row_bytes` large, and a multiple of every stride."""
        return max(64, self.row_bytes // (self.model.config.hidden_size * self.itemsize) // 64 * 64)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.model.dtype].itemsize

    def normal(self, *shape: int, seed: int = 0) -> jax.Array:
        """Random numbers; after a million they repeat, because a host takes seconds for many millions."""
        count = min(math.prod(shape), 2**20)
        numbers = np.random.default_rng(seed).standard_normal(count, np.float32).astype(DTYPES[self.model.dtype])
        return jnp.asarray(np.resize(numbers, shape))

    def weight(self, out: int, width: int, target: Target, parts: int = 1) -> Any:
        return prepare(np.asarray(self.normal(out, width, seed=1)), parts=parts, target=target)

    def engine(self, backend: str) -> Engine:
        """Without a funnel; the batch fills its largest bucket."""
        return self.model.engine(NO_FUNNEL, backend, self.rows)


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
        *(attention_case(sizes, packed(sizes.lengths, stride=stride), f"stride {stride}") for stride in (1, STRIDE)),
        add_norm_case(sizes),
        pool_case(sizes, STRIDE),
        *(recover_case(sizes, STRIDE, mode) for mode in MODES),
        forward_case(sizes),
    ]


def op_case(
    name: str,
    op: Callable[..., Any],
    arrays: Callable[[Target], tuple[Any, ...]],
    flops: int,
    moved: int,
    **options: Any,
) -> Case:
    """A case of an op on arrays that are made for a target; `options` are the op's."""

    def make(backend: str) -> Call:
        target = local_target(backend)
        return partial(jax.jit(partial(op, target=target, **options)), *arrays(target))

    return Case(name, make, flops, moved)


def heads_case(sizes: Sizes) -> Case:
    config, rows = sizes.config, sizes.rows
    groups, d = (config.num_heads, config.num_kv_heads), config.head_dim
    width, out = config.hidden_size, d * (sum(groups) + groups[1])

    def arrays(target: Target) -> tuple[Any, ...]:
        norms = tuple(sizes.normal(d, seed=2 + group) if config.qk_norm else None for group in range(2))
        angles = jnp.arange(rows * d // 2, dtype=jnp.float32).reshape(rows, d // 2)
        weight = sizes.weight(out, width, target)
        return sizes.normal(rows, width), weight, jnp.cos(angles), jnp.sin(angles), (*norms, None)

    moved = sizes.itemsize * (rows * width + out * width + rows * out)
    options: Any = {"heads": groups, "plain_heads": groups[1], "eps": config.norm_eps}
    name = f"project_heads, {rows} x {width} x {out}"
    return op_case(name, project_heads, arrays, 2 * rows * width * out, moved, **options)


def linear_case(sizes: Sizes, width: int, out: int) -> Case:
    """The product alone, whose result is float32."""
    rows, itemsize = sizes.rows, sizes.itemsize

    def arrays(target: Target) -> tuple[Any, ...]:
        return sizes.normal(rows, width), sizes.weight(out, width, target)

    moved = itemsize * (rows * width + out * width) + 4 * rows * out
    return op_case(f"linear, {rows} x {width} x {out}", linear, arrays, 2 * rows * width * out, moved)


def linear_add_norm_case(sizes: Sizes, name: str, width: int) -> Case:
    """The end of a sub-layer: its product, the residual sum, and the norms of the family."""
    config, rows, out = sizes.config, sizes.rows, sizes.config.hidden_size

    def arrays(target: Target) -> tuple[Any, ...]:
        post_norm = sizes.normal(out, seed=4) if config.post_norms else None
        residual, norm = sizes.normal(rows, out, seed=2), sizes.normal(out, seed=3)
        return sizes.normal(rows, width), sizes.weight(out, width, target), residual, norm, post_norm

    def op(x: Any, weight: Any, residual: Any, norm: Any, post_norm: Any, **options: Any) -> Any:
        return linear_add_norm(x, weight, residual, norm, update_weight=post_norm, **options)

    moved = sizes.itemsize * (rows * width + out * width + 3 * rows * out)
    name = f"linear_add_norm, {name}, {rows} x {width} x {out}"
    return op_case(name, op, arrays, 2 * rows * width * out, moved, eps=config.norm_eps)


def gated_case(sizes: Sizes) -> Case:
    rows, width, out = sizes.rows, sizes.config.hidden_size, sizes.config.intermediate_size

    def arrays(target: Target) -> tuple[Any, ...]:
        return sizes.normal(rows, width), sizes.weight(2 * out, width, target, parts=2)

    moved = sizes.itemsize * (rows * width + 2 * out * width + rows * out)
    name = f"gated_linear, {rows} x {width} x (2 x {out})"
    return op_case(name, gated_linear, arrays, 4 * rows * width * out, moved, activation=sizes.config.activation)


def attention_case(sizes: Sizes, layout: Layout, what: str) -> Case:
    """Attention of the model's heads; `what` distinguishes the layout."""
    heads, kv_heads, d = sizes.config.num_heads, sizes.config.num_kv_heads, sizes.config.head_dim

    def arrays(target: Target) -> tuple[Any, ...]:
        return *heads_of(sizes, layout), jnp.asarray(layout.lo), jnp.asarray(layout.hi)

    name = f"attention, {layout.queries} queries on {what}, {heads} heads of {d} on {kv_heads}"
    moved = 2 * d * sizes.itemsize * (layout.queries * heads + layout.keys * kv_heads)
    options = {"heads": heads, "kv_heads": kv_heads, "scale": d**-0.5}
    return op_case(name, attention, arrays, 4 * d * heads * layout.pairs, moved, **options)


def heads_of(sizes: Sizes, layout: Layout) -> tuple[jax.Array, ...]:
    """Random q, k and v."""
    d, kv = sizes.config.head_dim, (layout.keys, sizes.config.num_kv_heads)
    shapes = (layout.queries, sizes.config.num_heads), kv, kv
    return tuple(sizes.normal(rows, heads * d, seed=seed) for seed, (rows, heads) in enumerate(shapes))


def cudnn_case(sizes: Sizes, case: Case) -> Case:
    """cuDNN's attention on the data of one of our cases, whose sequences all have one length.

    The call's first result is compared with XLA's: a rate of something else says nothing.
    """
    length, d = int(sizes.lengths[0]), sizes.config.head_dim

    def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:  # [N, heads * d] all; reshapes move nothing
        options: Any = {"scale": d**-0.5, "implementation": CUDNN}
        per_head = (x.reshape(-1, length, x.shape[1] // d, d) for x in (q, k, v))
        return jax.nn.dot_product_attention(*per_head, **options).reshape(q.shape)

    def make(backend: str) -> Call:
        arrays = heads_of(sizes, packed(sizes.lengths))
        call = partial(jax.jit(cudnn), *arrays)
        difference = float(relative_difference(call(), case.make("auto")()))
        if not difference <= LARGEST_DIFFERENCE:
            raise FunnelError(f"cuDNN computed something else: relative difference {difference:.3g}")
        return call

    return case._replace(make=make, backends=(CUDNN,))


@jax.jit
def relative_difference(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


def add_norm_case(sizes: Sizes) -> Case:
    rows, width = sizes.row_wise_rows, sizes.config.hidden_size

    def arrays(target: Target) -> tuple[Any, ...]:
        return sizes.normal(rows, width), sizes.normal(rows, width, seed=1), sizes.normal(width, seed=2)

    moved = 4 * rows * width * sizes.itemsize
    return op_case(f"add_norm, {rows} x {width}", add_norm, arrays, 0, moved, eps=sizes.config.norm_eps)


def pool_case(sizes: Sizes, stride: int, pool: str = "max") -> Case:
    rows, width = sizes.row_wise_rows, sizes.model.config.hidden_size

    def arrays(target: Target) -> tuple[Any, ...]:
        return sizes.normal(rows, width), jnp.ones(rows, bool), sizes.normal(width, seed=1)

    moved = sizes.itemsize * width * (rows + 2 * rows // stride)
    name = f"pool_norm, {pool}, stride {stride}, {rows} x {width}"
    return op_case(name, pool_norm, arrays, 0, moved, stride=stride, pool=pool, eps=sizes.model.config.norm_eps)


def recover_case(sizes: Sizes, stride: int, mode: str) -> Case:
    rows, width = sizes.row_wise_rows, sizes.config.hidden_size

    def arrays(target: Target) -> tuple[Any, ...]:
        full = None if mode == "tile" else sizes.normal(rows, width, seed=2)
        return sizes.normal(rows // stride, width), full, sizes.normal(width, seed=1)

    moved = sizes.itemsize * width * (rows // stride + rows * (1 if mode == "tile" else 2))
    name = f"recover_norm, {mode}, stride {stride}, {rows} x {width}"
    return op_case(name, recover_norm, arrays, 0, moved, stride=stride, mode=mode, eps=sizes.config.norm_eps)


def forward_case(sizes: Sizes, what: str = "") -> Case:
    """`Engine.embed` of the batch: all layers, from ids on the host to vectors on the host."""
    config = sizes.model.config
    inputs = random_inputs(config.vocab_size, sizes.lengths)

    def make(backend: str) -> Call:
        return partial(sizes.engine(backend).embed, inputs)

    name = f"embed{what}, {config.num_layers} layers, {len(sizes.lengths)} sequences, {sizes.rows} tokens"
    return Case(name, make, forward_flops(config, NO_FUNNEL, sizes.lengths), 0)


def padded_case(sizes: Sizes, lengths: Ints) -> Case:
    """The forward pass from ids on the device, of fewer sequences than fill the bucket; padding is no useful work."""
    config, percent = sizes.config, round(100 - 100 * int(lengths.sum()) / sizes.rows)
    name = f"forward pass, {config.num_layers} layers, {percent} % of {sizes.rows} rows are padding"
    flops = forward_flops(config, NO_FUNNEL, lengths)
    return Case(name, lambda backend: forward_pass(sizes.engine(backend), lengths, sizes.rows), flops, 0)


def forward_pass(engine: Engine, lengths: Ints, rows: int, options: dict[str, Any] | None = None) -> Call:
    """The encoder alone, on sequences of these lengths in a bucket of `rows` rows.

    Args:
        options: of XLA's compiler; None: those that the engine takes.
    """
    (programs,) = engine.programs
    batch = jax.device_put(pack(programs.plan, *random_inputs(engine.config.vocab_size, lengths), rows))
    how: dict[str, Any] = {"dtype": engine.activations, "target": engine.devices.target}
    encoder = partial(forward_of(engine.config), config=engine.config, funnel=programs.funnel, **how)
    options = compiler_options(jax.default_backend()) if options is None else options
    return partial(jax.jit(encoder, compiler_options=options), engine.params, batch)
