"""One engine on several devices: which weights and which batches each device gets.

A mesh has up to two axes. Devices along "model" divide the layers as in Megatron-LM (arXiv:1909.08053): each has some
heads and a part of the MLP's width, and its results are added to the residual stream in two sums per layer. Devices
along "data" have the same weights and run different batches.

    weight                     part on device t of T along "model"
    qkv, q, kv, and biases     the rows of its heads; a key/value head is on every device whose query heads read it
    gate_up, and its bias      the same rows of gate and of up
    attention_output, down     the columns that are multiplied with the outputs of those rows
    embedding                  the columns [t * D / T, (t + 1) * D / T), gathered after the lookup
    all others                 everything

The embedding is split by columns and not by vocabulary. The gathered rows cost half the traffic of a sum over parts of
the vocabulary, they are bit for bit those of one device, and T need not divide the vocabulary.

A program runs inside one `jax.shard_map`, so the kernels, which XLA cannot partition, get the shapes of one device.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from funnel_engine.config import Funnel, FunnelConfig, ModelConfig
from funnel_engine.devices import Tree, batch_shapes, map_weights
from funnel_engine.funnel_transformer_config import EncoderConfig, FunnelTransformerConfig
from funnel_engine.heads import HeadConfig
from funnel_engine.jax_settings import device_name
from funnel_engine.model import Params
from funnel_engine.models import forward_of
from funnel_engine.packing import Ints, Plan, make_plan, split
from funnel_engine.weights import (
    ACTIVATIONS,
    DTYPES,
    EIGHT_BITS,
    check_dtype,
    dtype_for,
    expected_shapes,
    nest,
    tensor_types,
)
from funnel_kernels import PackedWeight, QuantizedWeight, Target
from funnel_kernels.errors import ConfigError

AXES = ("data", "model")

# Programs that exchange data must be queued in the same order on all of their devices, or they wait for each other for
# ever. So only one thread at a time may queue a program, even for different engines.
QUEUE_LOCK = threading.Lock()


class DeviceMesh:
    """The devices of a mesh, for one model.

    It implements `devices.Devices` and has further attributes.

    Attributes:
        mesh: the mesh with both axes, ("data", "model"); an axis that the user's mesh does not have has size 1.
        model: the number of devices that divide the layers.
        whole: the whole model; `config` is the part of one device.
        splits: how weights are divided, by name; a weight that is not in the table is on every device.
    """

    packs = False

    def __init__(self, mesh: Mesh, config: EncoderConfig, *, backend: str = "auto", threads: int = 0):
        """Raises `ConfigError` for a mesh with other axes, or one that does not divide the model."""
        if not isinstance(mesh, Mesh):
            raise ConfigError(f"mesh={mesh!r} must be a jax.sharding.Mesh, e.g. jax.make_mesh((2, 4), {AXES})")
        if unknown := [name for name in mesh.axis_names if name not in AXES]:
            raise ConfigError(
                f"mesh axis {unknown[0]!r} is unknown; name the axes of a mesh 'data' or 'model', or both"
            )
        self.data, self.model = (mesh.shape.get(name, 1) for name in AXES)
        order = [mesh.axis_names.index(name) for name in AXES if name in mesh.axis_names]
        self.mesh = Mesh(mesh.devices.transpose(order).reshape(self.data, self.model), AXES)
        self.device = self.mesh.devices.flat[0]
        self.target = Target.of(self.device, backend=backend, threads=threads)
        self.axis = "model" if self.model > 1 else None
        self.config = self.whole = config
        self.splits: dict[str, Split] = {}
        if self.axis:
            if isinstance(config, FunnelTransformerConfig):
                raise ConfigError(
                    f"the mesh has {self.model} devices along 'model', but a Funnel-Transformer is not divided; put "
                    "all devices along 'data'"
                )
            self.config, self.splits = device_config(config, self.model), weight_splits(config, self.model)

    def group_batches(self, plan: Plan, lengths: Ints, buckets: Sequence[int]) -> list[list[Ints]]:
        """Splits sequences into batches, and the batches into groups of up to `data` that run at once.

        The number of groups is the smallest that the largest bucket allows. The batches are then as small as this
        number of groups allows, so that even a call that fits on one device is distributed over all devices.
        """
        most = -(-len(split(plan, lengths, buckets[-1])) // self.data) * self.data
        needed = plan.rows_needed(lengths)
        least = max(int(needed.max()), int(needed.sum(dtype=np.int64)) // most)
        tried = (split(plan, lengths, bucket) for bucket in buckets if bucket >= least)
        batches = next(batches for batches in tried if len(batches) <= most)
        return [batches[start : start + self.data] for start in range(0, len(batches), self.data)]

    def put(self, weights: Params, funnel: Funnel, dtype: str, activations: str) -> dict[str, Any]:
        """Copies every device's part of the weights directly to it; host memory contains one part at a time."""
        if foreign := [device for device in self.mesh.devices.flat if device.process_index != jax.process_index()]:
            raise ConfigError(
                f"the mesh has devices of other processes, e.g. {foreign[0]}; an engine runs in one process, so make "
                "the mesh of jax.local_devices()"
            )
        if dtype in EIGHT_BITS:
            raise ConfigError(f"{dtype} weights do not run on a mesh; load with dtype='bfloat16' or without a mesh")
        if packed := [name for name, weight in weights.items() if isinstance(weight, PackedWeight)]:
            raise ConfigError(f"{packed[0]} is packed for one device and cannot be divided; give the weight itself")

        def put(name: str, weight: Any) -> jax.Array:
            split, shards = self.splits.get(name), []
            form = DTYPES[dtype_for(name, dtype, activations)]
            if isinstance(weight, QuantizedWeight):
                weight = weight.astype(form)
            for index, devices in enumerate(self.mesh.devices.T):
                part = (split.part(weight, index) if split else weight).astype(form, copy=False)
                shards += [jax.device_put(part, device) for device in devices]
            sharded = self._weight_shape(name, weight)
            return jax.make_array_from_single_device_arrays(sharded.shape, sharded.sharding, shards)

        return map_weights(put, nest(weights, self.whole, funnel))

    def weight_shapes(self, funnel: FunnelConfig, dtype: str) -> dict[str, Any]:
        """The shapes of the tree that `put` returns for an encoder."""
        types = tensor_types(expected_shapes(self.whole, HeadConfig()), dtype)
        flat = {name: np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape) for name, tensor in types.items()}
        return map_weights(self._weight_shape, nest(flat, self.whole, funnel))

    def stack(self, batches: Sequence[Tree]) -> Tree:
        """Stacks the arrays of up to `data` batches of one bucket along a new first axis [data].

        Devices without a batch get zeros: a batch without tokens, where no row is real and all intervals are empty.
        """
        missing = self.data - len(batches)
        return jax.tree.map(lambda *arrays: np.stack([*arrays, *[np.zeros_like(arrays[0])] * missing]), *batches)

    def unstack(self, results: jax.Array) -> Iterator[np.ndarray]:
        """The result of each device along "data", in the form of one batch."""
        yield from np.asarray(results)

    def stacked_shapes(self, batch: Tree) -> Tree:
        """The shapes of the arrays that `stack` returns for batches of these shapes."""
        sharding = NamedSharding(self.mesh, PartitionSpec("data"))
        return jax.tree.map(
            lambda array: jax.ShapeDtypeStruct((self.data, *array.shape), array.dtype, sharding=sharding), batch
        )

    def shard(self, function: Callable[..., jax.Array], params: Tree) -> Callable[..., jax.Array]:
        """Turns `function(params, *arrays of one batch)` into a function of stacked batches, each on its own devices.

        Args:
            params: arrays, or shapes, with their shardings.
        """

        def one_batch(params: Tree, arrays: Tree) -> jax.Array:
            return function(params, *jax.tree.map(lambda array: array[0], arrays))[None]

        weights = jax.tree.map(lambda weight: weight.sharding.spec, params)
        batches = PartitionSpec("data")
        # Kernels do not declare over which axes their results are equal, so JAX cannot check it.
        mapped = jax.shard_map(
            one_batch, mesh=self.mesh, in_specs=(weights, batches), out_specs=batches, check_vma=False
        )

        def all_batches(params: Tree, *arrays: Tree) -> jax.Array:
            return mapped(params, arrays)

        return all_batches

    def thread_safe(self, program: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """The program, which is queued on all devices before another one is, see `QUEUE_LOCK`."""

        def run(*arrays: Tree) -> jax.Array:
            with QUEUE_LOCK:
                return program(*arrays)

        return run

    def _weight_shape(self, name: str, weight: Any) -> jax.ShapeDtypeStruct:
        split = self.splits.get(name)
        shape, spec = (split.shape(weight.shape), split.spec) if split else (weight.shape, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, weight.dtype, sharding=NamedSharding(self.mesh, spec))

    def __str__(self) -> str:
        return f"data {self.data} x model {self.model}: {', '.join(map(device_name, self.mesh.devices.flat))}"


@dataclasses.dataclass(frozen=True)
class Split:
    """How a weight is divided among `devices`: it has blocks along one axis, and each block has parts of equal size.

    Device t has part `t * parts // devices` of every block, side by side. The parts of all devices, one after another,
    are the sharded array. It contains the rows or columns of the weight in a different order. If there are fewer parts
    than devices, some are in it more than once.
    """

    devices: int
    axis: int
    blocks: tuple[tuple[int, int], ...]  # (rows or columns, parts)

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(*[None] * self.axis, "model")

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the sharded array."""
        size = self.devices * sum(width // parts for width, parts in self.blocks)
        return tuple(size if axis == self.axis else length for axis, length in enumerate(shape))

    def part(self, weight: Any, device: int) -> Any:
        """The part of one device: a view of the weight, or a copy of its parts of several blocks."""
        parts_of_blocks, start = [], 0
        for width, parts in self.blocks:
            first = start + device * parts // self.devices * (width // parts)
            part = slice(first, first + width // parts)
            parts_of_blocks.append(weight[part] if self.axis == 0 else weight[:, part])
            start += width
        return np.concatenate(parts_of_blocks, self.axis) if len(parts_of_blocks) > 1 else parts_of_blocks[0]


def weight_splits(config: ModelConfig, devices: int) -> dict[str, Split]:
    """How weights are divided, by their names in `weights.nest`."""
    q = (config.num_heads * config.head_dim, devices)
    kv = (config.num_kv_heads * config.head_dim, min(config.num_kv_heads, devices))
    mlp = (config.intermediate_size, devices)
    rows, columns = partial(Split, devices, 0), partial(Split, devices, 1)
    by_rows = {"qkv": rows((q, kv, kv)), "q": rows((q,)), "kv": rows((kv, kv)), "gate_up": rows((mlp, mlp))}
    return {
        **by_rows,
        **{f"{name}_bias": split for name, split in by_rows.items()},
        "attention_output": columns((q,)),
        "down": columns((mlp,)),
        "embedding": columns(((config.hidden_size, devices),)),
    }


def device_config(config: ModelConfig, devices: int) -> ModelConfig:
    """The part of a model that one of `devices` along "model" computes.

    Raises:
        ConfigError: the number of devices does not divide the model.
    """
    if devices > 1 and config.heads("full") != config.heads("sliding"):
        raise ConfigError(
            f"the mesh has {devices} devices along 'model', but the full layers of this model have other heads than "
            "its sliding layers, and such a model is not divided; put all devices along 'data'"
        )
    if devices > 1 and (config.per_layer_width or config.kv_shared_layers):
        raise ConfigError(
            f"the mesh has {devices} devices along 'model', but this model has per-layer inputs or layers that share "
            "keys, and such a model is not divided; put all devices along 'data'"
        )
    for name in ("num_heads", "intermediate_size", "hidden_size"):
        if getattr(config, name) % devices:
            raise ConfigError(
                f"the mesh has {devices} devices along 'model', which does not divide {name}={getattr(config, name)}; "
                "use a number that does, and put the other devices along 'data'"
            )
    kv_heads = config.num_kv_heads
    if kv_heads % devices and devices % kv_heads:
        raise ConfigError(
            f"the mesh has {devices} devices along 'model', which must divide num_kv_heads={kv_heads} or be a "
            "multiple of it; use another number, and put the other devices along 'data'"
        )
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // devices,
        num_kv_heads=max(1, kv_heads // devices),
        intermediate_size=config.intermediate_size // devices,
    )


def abstract_forward(
    mesh: Mesh, config: ModelConfig, funnel: FunnelConfig, *, rows: int, dtype: str = "bfloat16", backend: str = "auto"
) -> tuple[Any, dict[str, Any], Tree]:
    """The forward pass on a mesh and the shapes of its arguments, to compile it for devices that are not present.

        program, params, batch = abstract_forward(mesh, preset("gemma-2b"), FunnelConfig.after(2), rows=4096)
        compiled = program.lower(params, batch).compile()

    Args:
        mesh: see `DeviceMesh`; its devices may be those of `jax.experimental.topologies`.
        rows: the rows of each device's batch, a bucket.

    Raises:
        ConfigError: the mesh or the funnel does not fit the model, or the dtype is unknown.
    """
    dtype = check_dtype(dtype, ACTIVATIONS)
    devices = DeviceMesh(mesh, config, backend=backend)
    options: dict[str, Any] = {"dtype": dtype, "target": devices.target, "axis": devices.axis}
    encoder = partial(forward_of(devices.config), config=devices.config, funnel=funnel, **options)
    params = devices.weight_shapes(funnel, dtype)
    batch = devices.stacked_shapes(batch_shapes(make_plan(config, funnel), rows))
    return jax.jit(devices.shard(encoder, params)), params, batch
