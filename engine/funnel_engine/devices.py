"""Where the batches of an engine run: the interface to its devices, and one device (several: `sharding.py`)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from funnel_engine.checkpoints.safetensors_file import release
from funnel_engine.config import Funnel
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.jax_settings import default_device, device_name
from funnel_engine.model import Params
from funnel_engine.packing import Ints, Plan, pack, split
from funnel_engine.weights import EIGHT_BITS, nest, prepare_weight
from funnel_kernels import PackedWeight, QuantizedWeight, Target, Weight, native_calls
from funnel_kernels.linear.packed import packs

Tree = Any  # a pytree of arrays


class Devices(Protocol):
    """The devices of an engine.

    Attributes:
        target: where the programs run, and with which kernels.
        device: the device that programs are compiled for, or the first of several.
        data: the number of batches that run at once.
        packs: whether the weights of products are packed for the kernels for CPUs.
        axis: the mesh axis over which `model.forward` sums; None if every device has the whole model.
        config: the part of the model that one device computes.
    """

    target: Target
    device: jax.Device
    data: int
    packs: bool
    axis: str | None
    config: EncoderConfig

    def group_batches(self, plan: Plan, lengths: Ints, buckets: Sequence[int]) -> list[list[Ints]]:
        """Splits sequences of these lengths into batches, and the batches into groups of up to `data` that run at once.

        Returns:
            For each group and each of its batches, the indices of the sequences.
        """

    def put(self, weights: Params, funnel: Funnel, dtype: str, activations: str) -> dict[str, Any]:
        """Casts, prepares and transfers a flat table of weights. Returns the tree that `model.forward` reads.

        Args:
            dtype, activations: as in `weights.prepare_weight`.
        """

    def stack(self, batches: Sequence[Tree]) -> Tree:
        """The input arrays of a program for a group of batches, all of one bucket."""

    def unstack(self, results: jax.Array) -> Iterator[np.ndarray]:
        """The result of a program for each batch of a group."""

    def stacked_shapes(self, batch: Tree) -> Tree:
        """The shapes of the arrays that `stack` returns for batches of these shapes."""

    def shard(self, function: Callable[..., jax.Array], params: Tree) -> Callable[..., jax.Array]:
        """Turns `function(params, *arrays of one batch)` into a function of the arrays of a group.

        Args:
            params: arrays, or shapes, with their shardings.
        """

    def thread_safe(self, program: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """The program in a form that any thread may call."""


def local_target(backend: str = "auto", threads: int = 0) -> Target:
    """The target for JAX's default device.

    Raises:
        BackendUnavailable: the backend does not exist, or JAX does not start.
        ConfigError: the default device is on another platform than the one that JAX runs on.
    """
    return Target.of(default_device(), backend=backend, threads=threads)


def choose_dtypes(stored: str, asked: str | None, devices: Devices) -> tuple[str, str]:
    """The dtype of an engine's matrices and that of its activations.

    float32 is computed with stored weights of bfloat16 as they are, where the kernels for CPUs widen them: the same
    numbers take half the memory.

    Args:
        stored: the dtype of the checkpoint's matrices.
        asked: the user's; None leaves it to the checkpoint and the device.
    """
    if asked == "float32" and stored == "bfloat16" and devices.packs:
        return stored, asked
    dtype = asked or stored
    is_left_to_device = dtype in EIGHT_BITS or (asked is None and devices.packs)
    return dtype, default_activations(dtype, devices.target) if is_left_to_device else dtype


def default_activations(dtype: str, target: Target) -> str:
    """The dtype of activations for weights of a dtype, where the user gives none.

    With float32 weights it is float32, else bfloat16 where the device multiplies it, else float32. GPUs and TPUs that
    kernels are written for multiply bfloat16; of CPUs those with AVX-512-BF16 or AMX. Where XLA computes the products,
    it is bfloat16 for weights of bfloat16, because XLA would widen all of them in every call.
    """
    multiplies = target.platform != "cpu" or native_calls.multiplies_bfloat16()
    if dtype == "float32" or not (multiplies or (dtype == "bfloat16" and not packs(target))):
        return "float32"
    return "bfloat16"


class OneDevice:
    """One device, which runs one batch after another: JAX's default device at the time when the engine is made."""

    data = 1
    axis: str | None = None

    def __init__(self, config: EncoderConfig, *, backend: str = "auto", threads: int = 0):
        self.config, self.device = config, default_device()
        self.target = Target.of(self.device, backend=backend, threads=threads)
        self.packs = packs(self.target)

    def group_batches(self, plan: Plan, lengths: Ints, buckets: Sequence[int]) -> list[list[Ints]]:
        return [[batch] for batch in split(plan, lengths, buckets[-1])]

    def put(self, weights: Params, funnel: Funnel, dtype: str, activations: str) -> dict[str, Any]:
        """Each weight is replaced as soon as it is on the device, so host memory contains at most one weight twice."""
        put = partial(to_device, dtype=dtype, activations=activations, target=self.target, device=self.device)
        return map_weights(put, nest(weights, self.config, funnel))

    def stack(self, batches: Sequence[Tree]) -> Tree:
        return batches[0]

    def unstack(self, results: jax.Array) -> Iterator[np.ndarray]:
        yield np.asarray(results)

    def stacked_shapes(self, batch: Tree) -> Tree:
        return batch

    def shard(self, function: Callable[..., jax.Array], params: Tree) -> Callable[..., jax.Array]:
        return function

    def thread_safe(self, program: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return program

    def __str__(self) -> str:
        return device_name(self.device)


def map_weights(function: Callable[[str, Any], Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Applies a function to the name and the value of every weight of a tree."""
    mapped: dict[str, Any] = jax.tree.map_with_path(
        lambda path, weight: function(path[-1].key, weight),
        tree,
        is_leaf=lambda node: isinstance(node, PackedWeight | QuantizedWeight),
    )
    return mapped


def to_device(
    name: str, weight: Any, dtype: str, activations: str, target: Target, device: jax.Device | None = None
) -> Weight:
    """Casts, prepares and transfers one weight. On a CPU, a weight that needs none of these stays in its mapped file.

    Args:
        dtype, activations: as in `weights.prepare_weight`.
        device: the destination; None is JAX's default device.
    """
    prepared = prepare_weight(name, weight, dtype, activations, target)
    if prepared is not weight:
        for array in jax.tree.leaves(weight):
            if isinstance(array, np.ndarray):
                release(array)
    arrays = jax.tree.leaves(prepared)
    is_on_device = all(isinstance(array, jax.Array) and array.devices() == {device} for array in arrays)
    return prepared if is_on_device else jax.device_put(prepared, device)


def batch_shapes(plan: Plan, rows: int) -> Tree:
    """The shapes of a packed batch of `rows` rows."""
    any_batch = pack(plan, np.zeros(1, np.int32), np.array([0, 1], np.int32), rows)  # only shapes matter
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), any_batch)
