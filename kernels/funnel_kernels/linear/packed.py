"""Weights in the packed layout that the products of backend "cpu" read."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from funnel_kernels import native_calls
from funnel_kernels.target import Target, Unsupported

Weight = Any  # jax.Array [out_features, in_features] | PackedWeight


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


def prepare(weight: Any, *, parts: int = 1, target: Target) -> Weight:
    """A weight [out_features, in_features] in the layout that the products read on a target.

    This is a `PackedWeight`, a copy, if the kernels for CPUs serve the products; otherwise it is the weight itself. A
    weight that is already packed is returned unchanged. The dtype stays: products of float32 rows read weights of
    float32 or bfloat16.

    Args:
        parts: 2 for `gated_linear`, else 1.
    """
    if isinstance(weight, PackedWeight) or not packs(target):
        return weight
    if isinstance(weight, jax.ShapeDtypeStruct):  # for tracing: the kernels only look at the shape of the weight
        return PackedWeight(jax.ShapeDtypeStruct((1,), weight.dtype), weight.shape, parts)
    import funnel_native

    return PackedWeight(jax.device_put(funnel_native.pack(np.asarray(weight), parts)), weight.shape, parts)


def packs(target: Target) -> bool:
    """Whether `prepare` packs weights for a target."""
    if "cpu" not in target.candidates:
        return False
    try:
        native_calls.check(target)
    except Unsupported:
        return False
    return True
