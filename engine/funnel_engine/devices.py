"""Where an engine's batches run: what it needs of one device, or of several (`sharding.py`)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from funnel_engine.checkpoints.safetensors_file import release
from funnel_engine.config import FunnelConfig, ModelConfig
from funnel_engine.jax_settings import default_device, device_name
from funnel_engine.model import Params
from funnel_engine.packing import Ints, Plan, pack, split
from funnel_engine.weights import nest, prepare_weight
from funnel_kernels import PackedWeight, Target, Weight

Tree = Any  # a pytree of arrays


class Devices(Protocol):
    """The devices of an engine.

    Attributes:
        target: where its programs run, and by whose kernels.
        device: the one that programs are made for, or the first of several.
        data: how many batches run at once.
        axis: the mesh axis over which `model.forward` sums; None if every device has the whole model.
        config: what one device computes of the model.
    """

    target: Target
    device: jax.Device
    data: int
    axis: str | None
    config: ModelConfig

    def groups(self, plan: Plan, lengths: Ints, buckets: Sequence[int]) -> list[list[Ints]]:
        """Splits sequences of these lengths into batches, and these into groups of up to `data` that run at once."""

    def put(self, weights: Params, funnel: FunnelConfig, dtype: str) -> dict[str, Any]:
        """Casts, prepares and transfers a flat table of weights; gives the tree that `model.forward` reads."""

    def stack(self, batches: Sequence[Tree]) -> Tree:
        """The arrays of a group of batches, all of one bucket, as programs take them."""

    def unstack(self, results: jax.Array) -> Iterator[np.ndarray]:
        """A program's result for each batch of a group."""

    def shapes(self, batch: Tree) -> Tree:
        """The shapes of what `stack` makes of batches of these shapes."""

    def shard(self, function: Callable[..., jax.Array], params: Tree) -> Callable[..., jax.Array]:
        """Makes of `function(params, *arrays of one batch)` the same of a group.

        Args:
            params: arrays or shapes that know their sharding.
        """

    def queued(self, program: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """The program, safe to call from any thread."""


def local_target(backend: str = "auto", threads: int = 0) -> Target:
    """The target of programs that run on JAX's default device.

    Raises:
        BackendUnavailable: no such backend, or JAX does not start.
        ConfigError: the default device is not of the platform that JAX runs on.
    """
    return Target.of(default_device(), backend=backend, threads=threads)


class OneDevice:
    """An engine without a mesh: one device, JAX's default where the engine is made, runs one batch after another."""

    data = 1
    axis: str | None = None

    def __init__(self, config: ModelConfig, *, backend: str = "auto", threads: int = 0):
        self.config, self.device = config, default_device()
        self.target = Target.of(self.device, backend=backend, threads=threads)

    def groups(self, plan: Plan, lengths: Ints, buckets: Sequence[int]) -> list[list[Ints]]:
        return [[batch] for batch in split(plan, lengths, buckets[-1])]

    def put(self, weights: Params, funnel: FunnelConfig, dtype: str) -> dict[str, Any]:
        """Each weight is replaced as soon as it is on the device, so that host memory holds one of them twice."""
        put = partial(to_device, dtype=dtype, target=self.target, device=self.device)
        return map_weights(put, nest(weights, self.config, funnel))

    def stack(self, batches: Sequence[Tree]) -> Tree:
        return batches[0]

    def unstack(self, results: jax.Array) -> Iterator[np.ndarray]:
        yield np.asarray(results)

    def shapes(self, batch: Tree) -> Tree:
        return batch

    def shard(self, function: Callable[..., jax.Array], params: Tree) -> Callable[..., jax.Array]:
        return function

    def queued(self, program: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return program

    def __str__(self) -> str:
        return device_name(self.device)


def map_weights(function: Callable[[str, Any], Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Replaces every weight of a tree by a function of its name and itself."""
    mapped: dict[str, Any] = jax.tree.map_with_path(
        lambda path, weight: function(path[-1].key, weight), tree, is_leaf=lambda node: isinstance(node, PackedWeight)
    )
    return mapped


def to_device(name: str, weight: Any, dtype: str, target: Target, device: jax.Device | None = None) -> Weight:
    """Casts, prepares and transfers one weight. On a CPU, one that needs none of it stays where its file is mapped.

    Args:
        device: None takes JAX's default.
    """
    prepared = prepare_weight(name, weight, dtype, target)
    if prepared is not weight and isinstance(weight, np.ndarray):
        release(weight)
    arrays = jax.tree.leaves(prepared)
    is_there = all(isinstance(array, jax.Array) and array.devices() == {device} for array in arrays)
    return prepared if is_there else jax.device_put(prepared, device)


def batch_shapes(plan: Plan, rows: int) -> Tree:
    """The shapes of a packed batch of `rows` rows."""
    any_batch = pack(plan, np.zeros(1, np.int32), np.array([0, 1], np.int32), rows)  # only shapes matter
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), any_batch)
