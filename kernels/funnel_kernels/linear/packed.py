"""The forms of a weight: packed for the products of backend "cpu", and 8-bit numbers with a scale for each row."""

import dataclasses
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np

from funnel_kernels import native_calls
from funnel_kernels.errors import InputError
from funnel_kernels.target import Target, Unsupported

Weight = Any  # jax.Array [out_features, in_features] | PackedWeight | QuantizedWeight

LARGEST = {"int8": 127, "float8_e4m3fn": 448}  # the value that the largest of a row, or of a group, is scaled to
PIECE = 2**20  # elements that `quantize` widens to float32 at a time


@partial(jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["shape", "parts"])
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight [out_features, in_features] in the layout of cpu/packed_weight.h. For JAX it is a pytree of one array.

    Attributes:
        packed: a vector of the weight's elements in that order.
        shape: the shape of the weight.
        parts: the number of matrices of equal size that are packed one after another; 2 for gate and up.
    """

    packed: Any
    shape: tuple[int, int]
    parts: int = 1

    @property
    def dtype(self) -> Any:
        return self.packed.dtype

    def __getitem__(self, rows: slice) -> "PackedWeight":
        """A slice of the output features, without unpacking.

        Raises:
            ValueError: a bound is neither a multiple of the kernels' `UNIT` nor the end, or there are several parts.
        """
        import funnel_native

        unit = funnel_native.handlers().UNIT
        first, last, _ = rows.indices(self.shape[0])
        if self.parts > 1 or first % unit or (last % unit and last != self.shape[0]):
            raise ValueError(
                f"rows {first} to {last} of a packed weight {self.shape} cannot be sliced; slice it before `prepare`"
            )
        row_elements = self.packed.shape[0] // (-(-self.shape[0] // unit) * unit)
        end = -(-last // unit) * unit
        return PackedWeight(self.packed[first * row_elements : end * row_elements], (last - first, self.shape[1]))


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out_features, in_features] as 8-bit numbers: row i is `values[i] * scale[i]`.

    For JAX it is a pytree of two arrays. The embedding table has this form too.

    Attributes:
        values: int8 or float8_e4m3fn [out_features, in_features].
        scale: float32 [out_features].
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.values.shape
        return shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def __getitem__(self, rows: Any) -> "QuantizedWeight":
        """Some rows: the same as of `values` and of `scale`."""
        return QuantizedWeight(self.values[rows], self.scale[rows])

    def astype(self, dtype: Any) -> Any:
        """The matrix as one array of floats."""
        return (self.values.astype(np.float32) * self.scale[:, None]).astype(dtype)


def quantize(weight: Any, dtype: str = "int8") -> QuantizedWeight:
    """A matrix [out_features, in_features] as NumPy arrays of 8-bit numbers, with a scale for each row.

    The scale is the largest absolute value of the row over that of the dtype: 127 for int8, 448 for float8_e4m3fn
    (arXiv:2209.05433), which has 4 bits of exponent and 3 of mantissa, and no infinity. Values are rounded to nearest,
    ties to even. A row of zeros has scale 0.

    Raises:
        InputError: a value is NaN or infinite, or the dtype is another one.
    """
    if dtype not in LARGEST:
        raise InputError(f"dtype={dtype!r} is not one that weights are quantized to; choose {' or '.join(LARGEST)}")
    weight, largest = np.asarray(weight), LARGEST[dtype]
    form = np.dtype(ml_dtypes.float8_e4m3fn if dtype == "float8_e4m3fn" else dtype)
    values, scale = np.empty(weight.shape, form), np.empty(len(weight), np.float32)
    step = max(1, PIECE // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = weight[rows].astype(np.float32)
        scale[rows] = np.abs(part).max(axis=1) / largest
        if not np.isfinite(scale[rows]).all():
            row = start + int(np.argmin(np.isfinite(scale[rows])))
            raise InputError(
                f"row {row} of the weight contains NaN or infinity, which {dtype} cannot represent; use bfloat16 or "
                "float32"
            )
        divisor = np.where(scale[rows] > 0, scale[rows], 1)[:, None]
        quotient = np.rint(part / divisor) if dtype == "int8" else part / divisor
        values[rows] = np.clip(quotient, -largest, largest)  # a subnormal scale has few bits
    return QuantizedWeight(values, scale)


def prepare(weight: Any, *, parts: int = 1, target: Target) -> Weight:
    """A weight [out_features, in_features] in the layout that the products read on a target.

    This is a `PackedWeight`, a copy, if the kernels for CPUs serve the products; otherwise it is the weight itself. A
    weight that is already packed is returned unchanged, as is one of float8_e4m3fn, which XLA multiplies. The dtype
    does not change: products of float32 rows read weights of float32, bfloat16 and int8.

    Args:
        parts: 2 for `gated_linear`, else 1.
    """
    if isinstance(weight, PackedWeight) or weight.dtype == "float8_e4m3fn" or not packs(target):
        return weight
    values, scale = (weight.values, weight.scale) if isinstance(weight, QuantizedWeight) else (weight, None)
    if isinstance(values, jax.ShapeDtypeStruct):  # for tracing: the kernels only look at the shape of the weight
        return PackedWeight(jax.ShapeDtypeStruct((1,), values.dtype), values.shape, parts)
    import funnel_native

    packed = funnel_native.pack(np.asarray(values), parts, None if scale is None else np.asarray(scale))
    return PackedWeight(jax.device_put(packed), values.shape, parts)


def packs(target: Target) -> bool:
    """Whether `prepare` packs weights for a target."""
    if "cpu" not in target.candidates:
        return False
    try:
        native_calls.check(target)
    except Unsupported:
        return False
    return True
