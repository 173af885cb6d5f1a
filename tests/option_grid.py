"""The cases that every implementation of an op, the reference included, must get right.

A new backend joins by being in `funnel_kernels.BACKENDS`. What it does not support is declared in `REFUSALS` and must
then be refused with a reason; everything else must be served and be right. A simulated TPU takes a second or more for a
case, most of it compilation: it gets a part of the grid, in which every value of every option occurs (`SIMULATED`).

Nothing here uses the engine: the intervals of packed sequences are spelled out row by row.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from funnel_kernels import BACKENDS as BACKEND_TABLE
from funnel_kernels import PackedWeight, QuantizedWeight, Target, prepare, quantize
from funnel_kernels.linear import ACTIVATIONS
from funnel_kernels.recover_norm import MODES, SITES

BACKENDS = tuple(backend for backend in BACKEND_TABLE if backend != "mosaic")  # see `HOPPER_CASES`
DTYPES = ("float32", "bfloat16")
GROUP = 128  # input features that share a scale of the activations, where weights are int8
EPS = 0.1  # much, so that a norm which leaves it out shows
# (op, backend) -> whether the backend refuses a case. A pair that is not listed serves every case.
REFUSALS: dict[tuple[str, str], Callable[[Any], bool]] = {
    **{(op, "tpu"): lambda case: case.width % 128 != 0 for op in ("pool_norm", "recover_norm")},
    **{("attention", backend): lambda case: case.head_dim > 256 for backend in ("triton", "tpu")},
}


def target(backend: str = "auto", threads: int = 0) -> Target:
    """Of a backend, on this CPU. Where it needs a device that is not here its kernels are interpreted; memory of a
    simulated TPU starts as NaN, reads beyond an array raise, and races are noted (`interpreted_pallas` in conftest.py).
    """
    if backend == "triton":
        return Target(backend, "gpu", "NVIDIA H100 80GB HBM3", "9.0", interpret=True)
    if backend == "tpu":
        return Target(backend, "tpu", "TPU v5 lite", interpret=pltpu.InterpretParams(detect_races=True))
    return Target(backend, threads=threads)


def refuses(op: str, backend: str, case: Any) -> bool:
    return REFUSALS.get((op, backend), lambda case: False)(case)


def packed_weight(weight: np.ndarray, parts: int = 1) -> PackedWeight:
    """As `prepare` packs it for backend "cpu"."""
    prepared = prepare(weight, parts=parts, target=target("cpu"))
    assert isinstance(prepared, PackedWeight)
    return prepared


def over_the_grid(op: str, backends: Iterable[str] = BACKENDS) -> pytest.MarkDecorator:
    """Parametrises a test of an op by `backend` and `case`: each backend gets the cases of its part of the grid.

    Of some backends' cases some run by default, in which every value of every option occurs, see `cases_of`.
    """
    return pytest.mark.parametrize(
        ("backend", "case"),
        [
            pytest.param(backend, case, id=f"{backend}-{name}", marks=() if is_default else pytest.mark.grid)
            for backend in backends
            for name, case, is_default in cases_of(op, backend)
        ],
    )


def cases_of(op: str, backend: str) -> Iterator[tuple[str, Any, bool]]:
    """The name of each case of a backend, the case, and whether it runs by default.

    The C++ kernels run all of them. Interpreters are slow, and XLA compiles each case for longer than it runs: other
    backends run few, see `few_of`.
    """
    cases = (SIMULATED if backend == "tpu" else CASES)[op]
    if backend == "cpu":  # XLA multiplies float8, see test_linear.py
        cases = {name: case for name, case in cases.items() if getattr(case, "weights", None) != "float8_e4m3fn"}
    few = few_of({name: case for name, case in cases.items() if not refuses(op, backend, case)})
    for name, case in cases.items():
        yield name, case, backend == "cpu" or name in few


def few_of(cases: Mapping[str, Any]) -> list[str]:
    """The names of few cases in which every value of every option occurs: the next one is always the case that has the
    most values which are missing."""
    values = {
        name: {(field, str(value)) for field, value in dataclasses.asdict(case).items()} for name, case in cases.items()
    }
    missing, few = set().union(*values.values()), []
    while missing:
        few.append(max(values, key=lambda name: len(values[name] & missing)))
        missing -= values[few[-1]]
    return few


def each_value_once(indirect: Sequence[str] = (), /, **options: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by options that do not depend on each other: by default as many combinations run as the
    longest option has values, and every value of every option occurs in them. `indirect` names fixtures among them."""
    values = [list(each) for each in options.values()]
    default = {tuple(number % len(each) for each in values) for number in range(max(map(len, values)))}
    return pytest.mark.parametrize(
        tuple(options),
        [
            pytest.param(
                *(each[index] for each, index in zip(values, indices, strict=True)),
                marks=() if indices in default else pytest.mark.grid,
            )
            for indices in itertools.product(*(range(len(each)) for each in values))
        ],
        indirect=indirect,
    )


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def largest_array(program: str) -> int:
    """Elements of the largest array that a compiled program names."""
    return max(int(np.prod([int(size) for size in dims.split(",")])) for dims in re.findall(r"\w\[([\d,]+)\]", program))


# ---------------------------------------------------------------------------------------------------- attention

# Largest error as a part of `sum of weight * |v|`, which bounds the output. bfloat16 may round the weights and the
# result, each by at most 2^-8 of itself.
ATTENTION_TOLERANCE = {"float32": 2**-16, "bfloat16": 2**-6.9}


@dataclasses.dataclass(frozen=True)
class Packed:
    """Sequences packed end to end on multiples of `align` tokens, with the queries and the keys on their own strides.

    A row sees the rows of its own sequence whose first token is at most `left` tokens before and `right` tokens
    after its own; None is without limit. `tail` tokens of padding follow.
    """

    lengths: tuple[int, ...]
    query_stride: int = 1
    key_stride: int = 1
    left: int | None = None
    right: int | None = None
    align: int = 1
    tail: int = 0

    def first_tokens(self, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """Of every row the sequence that it belongs to and its first token; sequence -1 is padding."""
        rows = []
        for sequence, length in enumerate(self.lengths):
            tokens = -(-length // self.align) * self.align
            rows += [(sequence, token) if token < length else (-1, 0) for token in range(0, tokens, stride)]
        rows += [(-1, 0)] * (self.tail // stride)
        return np.array([sequence for sequence, _ in rows]), np.array([token for _, token in rows])

    def intervals(self) -> tuple[np.ndarray, np.ndarray, int]:
        """lo, hi and the number of key rows."""
        query_sequences, query_tokens = self.first_tokens(self.query_stride)
        key_sequences, key_tokens = self.first_tokens(self.key_stride)
        lo, hi = np.zeros((2, len(query_tokens)), np.int32)
        for i in np.flatnonzero(query_sequences >= 0):
            seen = key_sequences == query_sequences[i]
            if self.left is not None:
                seen &= key_tokens >= query_tokens[i] - self.left
            if self.right is not None:
                seen &= key_tokens <= query_tokens[i] + self.right
            rows = np.flatnonzero(seen)
            if rows.size:
                lo[i], hi[i] = rows[0], rows[-1] + 1
        return lo, hi, len(key_tokens)


@dataclasses.dataclass(frozen=True)
class Edges:
    """Every pair of bounds at the edges of key blocks of 64, 128 and 256 rows; half of the intervals are empty."""

    keys: int = 512

    def intervals(self) -> tuple[np.ndarray, np.ndarray, int]:
        edges = [0, 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512]
        lo, hi = np.meshgrid(edges, edges, indexing="ij")
        return lo.ravel().astype(np.int32), hi.ravel().astype(np.int32), self.keys


@dataclasses.dataclass(frozen=True)
class Scattered:
    """Intervals without any order, as no packed batch has them: about a third are empty."""

    queries: int
    keys: int

    def intervals(self) -> tuple[np.ndarray, np.ndarray, int]:
        generator = np.random.default_rng(self.queries)
        lo = generator.integers(0, self.keys + 1, self.queries)
        hi = np.minimum(lo + generator.integers(-self.keys // 4, self.keys // 2 + 1, self.queries), self.keys)
        return lo.astype(np.int32), np.maximum(hi, 0).astype(np.int32), self.keys


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    layout: Packed | Edges | Scattered
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 8
    softcap: float | None = None
    dtype: str = "float32"

    def arrays(self) -> tuple[np.ndarray, ...]:
        """q, k, v, lo and hi. The scores spread over several units, so that softmax and softcap matter."""
        lo, hi, keys = self.layout.intervals()
        q = 2 * normal(1, len(lo), self.heads * self.head_dim)
        k, v = normal(2, keys, self.kv_heads * self.head_dim), normal(3, keys, self.kv_heads * self.head_dim)
        return (*(array.astype(jnp.dtype(self.dtype)) for array in (q, k, v)), lo, hi)

    def options(self) -> dict[str, Any]:
        scale = 1.3 * self.head_dim**-0.5
        return {"heads": self.heads, "kv_heads": self.kv_heads, "scale": scale, "softcap": self.softcap}


RAGGED = (1, 7, 130, 64, 2, 53)
LAYOUTS = {
    "one row": Packed((1,)),
    "7 rows": Packed((7,)),
    "257 rows": Packed((257,)),
    "513 rows": Packed((513,)),
    "ragged": Packed(RAGGED, tail=31),
    "ragged, causal": Packed(RAGGED, right=0, tail=31),
    "window": Packed((300, 5, 211), left=16, right=16),
    "window of one token": Packed((9, 40), left=0, right=0),
    "causal window": Packed((300, 5, 211), left=63, right=0),
    "lopsided window": Packed((150, 20), left=3, right=40),
    "pooled": Packed(RAGGED, 2, 2, align=4, tail=16),
    "queries on stride 2": Packed(RAGGED, 2, 1, align=2, tail=30),
    "queries on stride 2, causal": Packed(RAGGED, 2, 1, right=0, align=2),
    "queries on stride 3, window": Packed((300, 8), 3, 1, left=7, right=7, align=3),
    "queries on stride 4, keys on 2": Packed((257, 33), 4, 2, left=9, right=0, align=4, tail=8),
    "only padding": Packed((), tail=40),
    "block edges": Edges(),
    "scattered": Scattered(300, 700),
    "more keys than queries": Scattered(5, 513),
    "more queries than keys": Scattered(513, 6),
}
HEADS = {
    "one head": {"heads": 1, "kv_heads": 1},
    "multi-head": {"heads": 4, "kv_heads": 4},
    "grouped": {"heads": 6, "kv_heads": 2},
    "multi-query": {"heads": 8, "kv_heads": 1},
    "32 queries a key": {"heads": 32, "kv_heads": 1},
    "head dim 2": {"head_dim": 2},
    "head dim 10": {"head_dim": 10},
    "head dim 64": {"head_dim": 64},
    "head dim 80": {"head_dim": 80},
    "head dim 128": {"heads": 4, "kv_heads": 2, "head_dim": 128},
    "head dim 256": {"heads": 4, "kv_heads": 1, "head_dim": 256},
    "head dim 512": {"heads": 4, "kv_heads": 1, "head_dim": 512},
}
SERVED_HEADS = [name for name, heads in HEADS.items() if heads.get("head_dim", 0) <= 256]  # by a simulated TPU
SMALL = Packed((40, 3, 90), left=50, right=20, tail=11)
ATTENTION_CASES = {
    **{f"{name}, {dtype}": AttentionCase(layout, dtype=dtype) for name, layout in LAYOUTS.items() for dtype in DTYPES},
    **{f"{name}, float32": AttentionCase(SMALL, **heads) for name, heads in HEADS.items()},
    **{
        f"{name}, softcap, bfloat16": AttentionCase(SMALL, **heads, softcap=2.5, dtype="bfloat16")
        for name, heads in HEADS.items()
    },
    "softcap, float32": AttentionCase(SMALL, softcap=2.5),
}
# Mosaic serves wide heads of bfloat16 alone, and its simulator needs JAX 0.11: these are its part of the grid, each
# layout with one of the heads, for the tests in test_mosaic_attention.py.
HOPPER_HEADS = [
    HEADS["head dim 64"],
    HEADS["multi-query"] | {"head_dim": 64},
    HEADS["head dim 128"],
    HEADS["grouped"] | {"head_dim": 64},
    HEADS["multi-head"] | {"head_dim": 64},
    HEADS["head dim 256"],
    HEADS["one head"] | {"head_dim": 128},
]
HOPPER_CASES = {
    f"{name}{', softcap' if index % 3 == 2 else ''}": AttentionCase(
        layout, **heads, softcap=2.5 if index % 3 == 2 else None, dtype="bfloat16"
    )
    for index, ((name, layout), heads) in enumerate(zip(LAYOUTS.items(), itertools.cycle(HOPPER_HEADS)))
}


# ------------------------------------------------------------------------------------------- relative_attention


@dataclasses.dataclass(frozen=True)
class RelativeCase:
    """Intervals of whole sequences, as Funnel-Transformer has them; `layout` has no windows."""

    layout: Packed
    heads: int = 2
    head_dim: int = 8
    separate_first: bool = True
    dtype: str = "float32"

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays of `relative_attention`, in its order; the terms of a score are of the same size."""
        lo, hi, keys = self.layout.intervals()
        width, reach = self.heads * self.head_dim, max(1, *(hi - lo)) * self.stride
        shapes = ((len(lo), width), (keys, width), (keys, width), (3, width), (2 * reach + 1, width), (2, width))
        q, k, v, biases, offsets, same = (
            normal(30 + index, *shape).astype(jnp.dtype(self.dtype)) for index, shape in enumerate(shapes)
        )
        types = [np.random.default_rng(n).integers(0, 3, n).astype(np.int32) for n in (len(lo), keys)]
        return q, k, v, lo, hi, *types, biases, offsets, same

    @property
    def stride(self) -> int:
        return self.layout.query_stride // self.layout.key_stride

    def options(self) -> dict[str, Any]:
        scale = 1.3 * self.head_dim**-0.5
        return {"heads": self.heads, "scale": scale, "stride": self.stride, "separate_first": self.separate_first}


RELATIVE_LAYOUTS = {
    name: layout for name, layout in LAYOUTS.items() if isinstance(layout, Packed) and layout.left == layout.right
}
del RELATIVE_LAYOUTS["window"], RELATIVE_LAYOUTS["window of one token"], RELATIVE_LAYOUTS["queries on stride 3, window"]
RELATIVE_CASES = {
    **{
        f"{name}, {dtype}": RelativeCase(each, dtype=dtype)
        for name, each in RELATIVE_LAYOUTS.items()
        for dtype in DTYPES
    },
    **{
        f"{heads} heads of {head_dim}, {dtype}": RelativeCase(
            Packed((40, 3, 90), tail=11), heads, head_dim, first, dtype
        )
        for heads, head_dim, first, dtype in (
            (1, 10, False, "float32"),
            (3, 64, False, "bfloat16"),
            (12, 64, True, "float32"),
            (4, 128, True, "bfloat16"),
        )
    },
    "queries on stride 2, first token like others": RelativeCase(
        Packed((70, 9, 2), 2, 1, align=2), separate_first=False
    ),
    "queries on stride 4, keys on 2": RelativeCase(Packed((257, 33), 4, 2, align=4, tail=8)),
}


# ---------------------------------------------------------------------------------------------------- pool_norm


@dataclasses.dataclass(frozen=True)
class PoolCase:
    stride: int
    pool: str
    dtype: str = "float32"
    windows: int = 37
    width: int = 128

    def arrays(self) -> tuple[np.ndarray, ...]:
        """x (mostly negative, so that padding taken for 0 would win a max), real and weight. Half of the rows are
        padding, which holds large numbers; the first window is all real and the second all padding."""
        rows = self.windows * self.stride
        real = np.random.default_rng(4).random(rows) < 0.5
        real[: self.stride], real[self.stride : 2 * self.stride] = True, False
        x = np.where(real[:, None], normal(5, rows, self.width) - 2.0, 1e4)
        dtype = jnp.dtype(self.dtype)
        return x.astype(dtype), real, (0.3 * normal(6, self.width)).astype(dtype)

    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "pool": self.pool, "eps": EPS}


POOL_CASES = {
    **{
        f"{pool}, stride {stride}, {dtype}": PoolCase(stride, pool, dtype)
        for pool in ("max", "mean", "first")
        for stride in (1, 2, 3, 4, 5)
        for dtype in DTYPES
    },
    **{
        f"{pool}, {windows} windows of width {width}": PoolCase(2, pool, "float32", windows, width)
        for pool in ("max", "mean", "first")
        for windows, width in ((2, 1), (257, 7), (37, 48), (64, 640), (129, 1152))
    },
}


# ------------------------------------------------------------------------------------------------- recover_norm


@dataclasses.dataclass(frozen=True)
class RecoverCase:
    stride: int
    mode: str
    site: str = "before_norm"
    dtype: str = "float32"
    full_dtype: str = "float32"
    windows: int = 37
    width: int = 128

    def arrays(self) -> tuple[np.ndarray | None, ...]:
        """short, full (None for "tile") and weight; the operands differ in size, so that each counts."""
        short = 3 * normal(7, self.windows, self.width)
        full = None if self.mode == "tile" else normal(8, self.windows * self.stride, self.width) + 0.5
        dtype, full_dtype = jnp.dtype(self.dtype), jnp.dtype(self.full_dtype)
        weight = (0.3 * normal(9, self.width)).astype(dtype)
        return short.astype(dtype), None if full is None else full.astype(full_dtype), weight

    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "mode": self.mode, "site": self.site, "eps": EPS}


RECOVER_CASES = {
    **{
        f"{mode}, {site}, stride {stride}, {dtype}, full {full_dtype}": RecoverCase(
            stride, mode, site, dtype, full_dtype
        )
        for mode in MODES
        for site in SITES
        for stride in (1, 2, 3, 4, 8)
        for dtype, full_dtype in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
        if mode != "tile" or full_dtype == dtype
    },
    **{
        f"{mode}, {windows} windows of width {width}": RecoverCase(2, mode, windows=windows, width=width)
        for mode in MODES
        for windows, width in ((1, 1), (257, 7), (37, 48), (64, 640), (129, 1152))
    },
}


# ------------------------------------------------------------------------------------------------------ add_norm


SCALE = np.array([0.375], np.float32)  # of a sum


@dataclasses.dataclass(frozen=True)
class AddNormCase:
    """`update` says what is added: nothing, an update, or the norm of one; then the sum may be scaled."""

    update: str
    dtype: str = "float32"
    update_dtype: str = "float32"
    rows: int = 37
    width: int = 128
    scaled: bool = False

    def arrays(self) -> tuple[np.ndarray | None, ...]:
        """x, update, weight, update_weight and scale; x and the update differ in size, so that each counts."""
        dtype, update_dtype = jnp.dtype(self.dtype), jnp.dtype(self.update_dtype)
        x, update = 3 * normal(13, self.rows, self.width), normal(14, self.rows, self.width) + 0.5
        weight, update_weight = 0.3 * normal(15, 2, self.width)
        return (
            x.astype(dtype),
            None if self.update == "none" else update.astype(update_dtype),
            weight.astype(dtype),
            update_weight.astype(dtype) if self.update == "normed" else None,
            SCALE if self.scaled else None,
        )


ADD_NORM_CASES = {
    **{
        f"{update}, {dtype}, update {update_dtype}": AddNormCase(update, dtype, update_dtype)
        for update in ("none", "plain", "normed")
        for dtype, update_dtype in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
        if update != "none" or update_dtype == dtype
    },
    **{
        f"{update}, {rows} rows of width {width}, {dtype}": AddNormCase(update, dtype, rows=rows, width=width)
        for update in ("none", "plain", "normed")
        for dtype in DTYPES
        for rows, width in ((1, 1), (257, 7), (37, 48), (65, 1152))
    },
    **{
        f"{update}, scaled, {dtype}": AddNormCase(update, dtype, rows=65, width=72, scaled=True)
        for update in ("plain", "normed")
        for dtype in DTYPES
    },
}


# ----------------------------------------------------------------------------------------------------- post_norm


@dataclasses.dataclass(frozen=True)
class PostNormCase:
    updated: bool
    dtype: str = "float32"
    update_dtype: str = "float32"
    rows: int = 37
    width: int = 48

    def arrays(self) -> tuple[np.ndarray | None, ...]:
        """x, update (None without) and weight; x and the update differ in size, and no mean is 0."""
        x, update = 3 * normal(17, self.rows, self.width), normal(18, self.rows, self.width) + 0.5
        weight = 0.3 * normal(19, 2, self.width)
        dtype = jnp.dtype(self.dtype)
        return (
            x.astype(dtype),
            update.astype(jnp.dtype(self.update_dtype)) if self.updated else None,
            weight.astype(dtype),
        )


POST_NORM_CASES = {
    f"{'update' if updated else 'none'}, {rows} rows of width {width}, {dtype}, update {update_dtype}": PostNormCase(
        updated, dtype, update_dtype, rows, width
    )
    for updated in (True, False)
    for dtype, update_dtype in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
    for rows, width in ((1, 2), (257, 7), (37, 48), (65, 768))
    if updated or update_dtype == dtype
}


# -------------------------------------------------------------------------------------------------------- linear


def operands(case: Any, x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray | QuantizedWeight]:
    """Both in the dtypes of a case of a product."""
    x = x.astype(jnp.dtype(case.dtype))
    if weight_dtype(case) in ROUNDED:
        return without_ties(x, weight_dtype(case)), quantize(weight, weight_dtype(case))
    return x, weight.astype(jnp.dtype(weight_dtype(case)))


def bias(case: Any, out_features: int) -> list[np.ndarray]:
    """That of a case of a product, if it has one, in the dtype of x."""
    return [normal(13, out_features).astype(jnp.dtype(case.dtype))] if case.biased else []


def biased_product(
    x: np.ndarray, weight: np.ndarray | QuantizedWeight, backend: str, bias: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """`exact_product` plus the bias, if there is one."""
    product, size = exact_product(x, weight, backend)
    return (product, size) if not bias else (product + np.asarray(bias[0], np.float64), size + np.abs(bias[0]))


def weight_dtype(case: Any) -> str:
    """That of the weight of a case of a product."""
    return case.weights or case.dtype


def without_ties(x: np.ndarray, dtype: str) -> np.ndarray:
    """x without the numbers that are nearly halfway between two of 8 bits: float32 and float64 could round them to
    different ones."""
    step, _ = ROUNDED[dtype](x)
    ratio = np.asarray(x, np.float64) / step
    is_tie = np.abs(ratio - np.floor(ratio) - 0.5) < 0.01
    return np.where(is_tie, (np.trunc(ratio) * step).astype(x.dtype), x)


def float8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of x [N, in] the distance of neighbouring numbers of float8_e4m3fn, times the row's scale, at each number, and
    the multiple of it that the number is rounded to, in float64. They have 3 bits of mantissa, and exponents from -6.
    """
    x = np.asarray(x, np.float64)
    largest = np.abs(x).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest, 1) / 448
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x) / scale, 1e-30)) + 1e-12), -6)
    step = scale * 2.0 ** (exponent - 3)
    return step, np.round(x / step)


def integers(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of x [N, in] the scale of each number's group and row, and the integer that it is rounded to, in float64."""
    x = np.asarray(x, np.float64)
    scale = np.ones_like(x)
    for first in range(0, x.shape[1], GROUP):
        part = slice(first, first + GROUP)
        largest = np.abs(x[:, part]).max(axis=1, keepdims=True)
        scale[:, part] = np.where(largest > 0, largest, 1) / 127
    return scale, np.round(x / scale)


ROUNDED = {"int8": integers, "float8_e4m3fn": float8}  # how the rows of x are rounded, by the dtype of the weight


def exact_product(x: np.ndarray, weight: np.ndarray | QuantizedWeight, backend: str) -> tuple[np.ndarray, np.ndarray]:
    """x @ weight.T in float64, and the sums of the absolute values of everything that is added up.

    With an int8 weight the reference and the kernels for CPUs round x to integers too; XLA does not. With one of float8
    all of them round x to float8.
    """
    x = np.asarray(x, np.float64)
    if isinstance(weight, QuantizedWeight):
        if backend != "xla" or weight.dtype != np.int8:
            step, multiple = ROUNDED[str(weight.dtype)](x)
            x = step * multiple
        weight = np.asarray(weight.values, np.float64) * np.asarray(weight.scale, np.float64)[:, None]
    weight = np.asarray(weight, np.float64)
    return x @ weight.T, np.abs(x) @ np.abs(weight.T)


@dataclasses.dataclass(frozen=True)
class LinearCase:
    """A product, or with `gate` that of a gate with this activation and of what it gates: two weights in one.

    With a gate, `add` is what it gates, and the weight is one. `weights` is their dtype, if it is not that of x. With
    `biased` the products have a bias.
    """

    rows: int
    in_features: int
    out_features: int
    dtype: str = "float32"
    add: bool = False
    gate: str | None = None
    weights: str | None = None  # the dtype of the weight; None is that of x
    biased: bool = False

    def arrays(self) -> tuple[Any, ...]:
        """x, weight, what is added (None without), and the bias, if there is one; the products are of the size of what
        is added."""
        x = normal(10, self.rows, self.in_features)
        weight = normal(11, self.out_features * self.parts, self.in_features) / self.in_features**0.5
        add = normal(12, self.rows, self.out_features).astype(jnp.dtype(self.dtype)) if self.add else None
        return *operands(self, x, weight), add, *bias(self, len(weight))

    @property
    def parts(self) -> int:
        """The number of matrices in the weight."""
        return 2 if self.gate and not self.add else 1


LINEAR_SIZES = ((1, 1, 1), (1, 64, 128), (3, 7, 5), (16, 256, 320), (129, 96, 65), (130, 48, 600), (300, 640, 64))
OPERANDS = {  # the name of each pair of dtypes, of x and of the weight
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float32, bfloat16 weight": ("float32", "bfloat16"),
    "float32, int8 weight": ("float32", "int8"),
    "bfloat16, int8 weight": ("bfloat16", "int8"),
    "float32, float8 weight": ("float32", "float8_e4m3fn"),
    "bfloat16, float8 weight": ("bfloat16", "float8_e4m3fn"),
}
LINEAR_CASES = {
    f"{'x'.join(map(str, size))}, {name}{', add' if add else ''}": LinearCase(*size, dtype, add=add, weights=weights)
    for size in LINEAR_SIZES
    for name, (dtype, weights) in OPERANDS.items()
    for add in (False, True)
} | {
    # More rows than a core's cache holds: the kernels for CPUs work on them in groups, the last of which is smaller.
    f"1100x768x520, {name}": LinearCase(1100, 768, 520, dtype, weights=weights)
    for name, (dtype, weights) in OPERANDS.items()
}
GATED_CASES = (
    {
        f"{'x'.join(map(str, size))}, {name}, {gate}": LinearCase(*size, dtype, gate=gate, weights=weights)
        for size in LINEAR_SIZES
        for name, (dtype, weights) in OPERANDS.items()
        for gate in ACTIVATIONS
    }
    | {
        f"{'x'.join(map(str, size))}, {name}, {gate}, up": LinearCase(*size, dtype, True, gate, weights)
        for size in LINEAR_SIZES[2:6]
        for name, (dtype, weights) in OPERANDS.items()
        for gate in ACTIVATIONS
    }
    | {
        f"130x48x600, {name}, {ACTIVATIONS[add]}{', up' if add else ''}, biased": LinearCase(
            130, 48, 600, dtype, add, ACTIVATIONS[add], weights, biased=True
        )
        for name, (dtype, weights) in OPERANDS.items()
        for add in (False, True)
    }
)


@dataclasses.dataclass(frozen=True)
class LinearAddNormCase:
    """A product that is added to the residual stream, after its own norm with `normed`, and the norm of the sum, which
    is multiplied by SCALE with `scaled`."""

    rows: int
    in_features: int
    width: int
    dtype: str = "float32"
    normed: bool = False
    weights: str | None = None
    scaled: bool = False
    biased: bool = False

    def arrays(self) -> tuple[Any, ...]:
        """x, weight, what is added to, the norm's weight, update_weight, scale, and the bias, if there is one."""
        product = LinearCase(self.rows, self.in_features, self.width, self.dtype, add=True, weights=self.weights)
        x, weight, add = product.arrays()
        norm_weight, update_weight = 0.3 * normal(16, 2, self.width).astype(x.dtype)
        extras = update_weight if self.normed else None, SCALE if self.scaled else None
        return x, weight, add, norm_weight, *extras, *bias(self, self.width)


# From some hundred rows on the kernels for CPUs make whole rows at a time, if these are whole units of packed weights.
LINEAR_ADD_NORM_CASES = (
    {
        f"{rows}x{in_features}x{width}, {name}{', normed' if normed else ''}": LinearAddNormCase(
            rows, in_features, width, dtype, normed, weights
        )
        for rows, in_features, width in (
            (1, 1, 1),
            (5, 24, 40),
            (130, 96, 128),
            (500, 64, 192),
            (777, 1120, 64),
            (500, 64, 100),
            (400, 32, 1152),
        )
        for name, (dtype, weights) in OPERANDS.items()
        for normed in (False, True)
    }
    | {
        f"{rows}x{in_features}x{width}, {name}{', normed' if normed else ''}, scaled": LinearAddNormCase(
            rows, in_features, width, dtype, normed, weights, scaled=True
        )
        for rows, in_features, width in ((5, 24, 40), (500, 64, 192))
        for name, (dtype, weights) in OPERANDS.items()
        for normed in (False, True)
    }
    | {
        f"{rows}x{in_features}x{width}, {name}{', normed, scaled' if normed else ''}, biased": LinearAddNormCase(
            rows, in_features, width, dtype, normed, weights, scaled=normed, biased=True
        )
        for rows, in_features, width in ((5, 24, 40), (900, 64, 192))
        for name, (dtype, weights) in OPERANDS.items()
        for normed in (False, True)
    }
)


@dataclasses.dataclass(frozen=True)
class HeadsCase:
    """A product that is cut into heads: of queries and keys, or of one of them, with norms or without; then values."""

    rows: int
    in_features: int
    head_dim: int
    heads: tuple[int, ...]
    plain_heads: int
    dtype: str = "float32"
    normed: int = 0  # the number of results that have a norm, from the first one on
    weights: str | None = None
    biased: bool = False

    def arrays(self) -> tuple[Any, ...]:
        """x, weight, cosines, sines, norms, and the bias, if there is one; a product is about 1 in size, an angle
        anything."""
        dtype = jnp.dtype(self.dtype)
        out_features = (sum(self.heads) + self.plain_heads) * self.head_dim
        x = normal(20, self.rows, self.in_features)
        x, weight = operands(self, x, normal(21, out_features, self.in_features) / self.in_features**0.5)
        angles = (10 * normal(22, self.rows, self.head_dim // 2)).astype(np.float32)
        norms = [0.3 * normal(23 + index, self.head_dim).astype(dtype) for index in range(self.normed)]
        none = [None] * (len(self.heads) + bool(self.plain_heads) - self.normed)
        return x, weight, np.cos(angles), np.sin(angles), (*norms, *none), *bias(self, out_features)

    def options(self) -> dict[str, Any]:
        return {"heads": self.heads, "plain_heads": self.plain_heads, "eps": EPS}


# Heads of a unit of packed weights, of several, and of less: these the kernels for CPUs cannot cut out of a tile.
HEADS_SIZES = (  # rows, input features, head dim, heads, plain heads
    (5, 24, 8, (3, 1), 1),
    (1, 40, 64, (8, 2), 2),
    (130, 96, 128, (5, 1), 1),
    (300, 64, 256, (3, 1), 1),
    (17, 80, 256, (4,), 0),
    (65, 48, 192, (1,), 1),
    (70, 64, 320, (1,), 1),
    (9, 64, 512, (2, 1), 0),
)
HEADS_CASES = {
    f"{rows} rows, {'+'.join(map(str, heads))}+{plain} heads of {d}, {name}, {normed} normed": HeadsCase(
        rows, in_features, d, heads, plain, dtype, normed, weights
    )
    for rows, in_features, d, heads, plain in HEADS_SIZES
    for name, (dtype, weights) in OPERANDS.items()
    for normed in sorted({0, len(heads), len(heads) + bool(plain)})
} | {
    f"{rows} rows, {'+'.join(map(str, heads))}+1 heads of {d}, {name}, 1 normed, biased": HeadsCase(
        rows, in_features, d, heads, 1, dtype, 1, weights, biased=True
    )
    for rows, in_features, d, heads, _ in (HEADS_SIZES[0], HEADS_SIZES[2])
    for name, (dtype, weights) in OPERANDS.items()
}


# ---------------------------------------------------------------------------------------------------- the whole grid


def every(step: int, cases: Mapping[str, Any], first: int = 0) -> dict[str, Any]:
    return dict(itertools.islice(cases.items(), first, None, step))


CASES = {
    "attention": ATTENTION_CASES,
    "relative_attention": RELATIVE_CASES,
    "pool_norm": POOL_CASES,
    "recover_norm": RECOVER_CASES,
    "add_norm": ADD_NORM_CASES,
    "post_norm": POST_NORM_CASES,
    "linear": LINEAR_CASES,
    "gated_linear": GATED_CASES,
    "linear_add_norm": LINEAR_ADD_NORM_CASES,
    "project_heads": HEADS_CASES,
}
SIMULATED = {
    # Each layout with one of the heads: more than the grid has, which varies one of the two at a time.
    "attention": {
        f"{layout}, {heads}{', softcap' if index % 3 == 2 else ''}, {DTYPES[index % 2]}": AttentionCase(
            LAYOUTS[layout], **HEADS[heads], softcap=2.5 if index % 3 == 2 else None, dtype=DTYPES[index % 2]
        )
        for index, (layout, heads) in enumerate(zip(LAYOUTS, itertools.cycle(SERVED_HEADS)))
    },
    "pool_norm": every(3, POOL_CASES),
    "recover_norm": every(7, RECOVER_CASES, first=2),
}
