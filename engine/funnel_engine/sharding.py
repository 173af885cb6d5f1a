"""One engine over several devices: what each of them holds, and which batch it runs.

A mesh has up to two axes. The devices along "model" share the layers as in Megatron-LM (arXiv:1909.08053): each holds
some heads and a part of the MLP's width, and adds its share to the residual stream in two sums a layer. Those along
"data" hold the same weights and run batches of their own.

    weight                     device t of T along "model" holds
    qkv, q, kv                 the rows of its heads; a key/value head is on every device whose query heads read it
    gate_up                    the same rows of gate and of up
    attention_output, down     the columns that multiply those rows' outputs
    embedding                  the columns [t * D / T, (t + 1) * D / T), gathered after the lookup
    norms, heads               everything

The embedding is split by columns, not by vocabulary: the gathered rows cost half the traffic of a sum over parts of
the vocabulary, their bits are those of one device, and T need not divide the vocabulary.

A program runs inside one `jax.shard_map`, so that kernels see one device's shapes: they are opaque to XLA's
partitioner, which is left nothing to decide.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from funnel_engine.config import FunnelConfig, ModelConfig
from funnel_engine.devices import Tree, batch_shapes, map_weights
from funnel_engine.heads import HeadConfig
from funnel_engine.jax_settings import device_name
from funnel_engine.model import Params, forward
from funnel_engine.packing import Ints, Plan, make_plan, split
from funnel_engine.weights import DTYPES, check_dtype, expected_shapes, nest
from funnel_kernels import PackedWeight, Target
from funnel_kernels.errors import ConfigError

AXES = ("data", "model")

# Programs that exchange data must be queued in the same order on all of their devices, or each waits for another. So
# no two threads may queue at once, be it for two engines.
QUEUE = threading.Lock()


class DeviceMesh:
    """The devices of a mesh, for one model.

    It has what `devices.Devices` asks for, and besides:

    Attributes:
        mesh: the mesh with both axes, ("data", "model"); one that was not given has size 1.
        model: how many devices share the layers.
        whole: the model, of which `config` is one device's share.
        cuts: how its weights are divided, by name; those that are not here are on every device.
    """

    def __init__(self, mesh: Mesh, config: ModelConfig, *, backend: str = "auto", threads: int = 0):
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
        self.config = share(config, self.model)
        self.whole = config
        self.cuts = cuts(config, self.model) if self.axis else {}

    def groups(self, plan: Plan, lengths: Ints, buckets: Sequence[int]) -> list[list[Ints]]:
        """Splits sequences into batches, and these into groups of up to `data` that run side by side.

        There are as few groups as the largest bucket allows. Batches are then as small as that number of groups
        allows, so that a call that one device could hold is spread over all of them.
        """
        most = -(-len(split(plan, lengths, buckets[-1])) // self.data) * self.data
        needed = plan.rows_needed(lengths)
        least = max(int(needed.max()), int(needed.sum(dtype=np.int64)) // most)
        tried = (split(plan, lengths, bucket) for bucket in buckets if bucket >= least)
        batches = next(batches for batches in tried if len(batches) <= most)
        return [batches[start : start + self.data] for start in range(0, len(batches), self.data)]

    def put(self, weights: Params, funnel: FunnelConfig, dtype: str) -> dict[str, Any]:
        """Gives every device its part of the weights, straight from where they are: host memory holds one part."""
        if foreign := [device for device in self.mesh.devices.flat if device.process_index != jax.process_index()]:
            raise ConfigError(
                f"the mesh has devices of other processes, e.g. {foreign[0]}; an engine runs in one process, so make "
                "the mesh of jax.local_devices()"
            )

        if packed := [name for name, weight in weights.items() if isinstance(weight, PackedWeight)]:
            raise ConfigError(f"{packed[0]} is packed for one device and cannot be divided; give the weight itself")

        def put(name: str, weight: Any) -> jax.Array:
            cut, shards = self.cuts.get(name), []
            for index, devices in enumerate(self.mesh.devices.T):
                part = (cut.part(weight, index) if cut else weight).astype(DTYPES[dtype], copy=False)
                shards += [jax.device_put(part, device) for device in devices]
            sharded = self._weight_shape(name, weight)
            return jax.make_array_from_single_device_arrays(sharded.shape, sharded.sharding, shards)

        return map_weights(put, nest(weights, self.whole, funnel))

    def weight_shapes(self, funnel: FunnelConfig, dtype: str) -> dict[str, Any]:
        """What `put` makes of an encoder's weights, as shapes only."""
        element = np.zeros((), DTYPES[dtype])  # one, whatever the shape
        shapes = expected_shapes(self.whole, HeadConfig())
        tree = nest({name: np.broadcast_to(element, shape) for name, shape in shapes.items()}, self.whole, funnel)
        return map_weights(self._weight_shape, tree)

    def stack(self, batches: Sequence[Tree]) -> Tree:
        """Up to `data` batches of one bucket -> their arrays on a leading axis [data].

        A device that is left over gets zeros, which is a batch without tokens: no row is real, no interval holds a key.
        """
        missing = self.data - len(batches)
        return jax.tree.map(lambda *arrays: np.stack([*arrays, *[np.zeros_like(arrays[0])] * missing]), *batches)

    def unstack(self, results: jax.Array) -> Iterator[np.ndarray]:
        """The result of each device along "data", as it was of one batch."""
        yield from np.asarray(results)

    def shapes(self, batch: Tree) -> Tree:
        """The shapes of what `stack` makes of batches of these shapes."""
        sharding = NamedSharding(self.mesh, PartitionSpec("data"))
        return jax.tree.map(
            lambda array: jax.ShapeDtypeStruct((self.data, *array.shape), array.dtype, sharding=sharding), batch
        )

    def shard(self, function: Callable[..., jax.Array], params: Tree) -> Callable[..., jax.Array]:
        """Makes of `function(params, *arrays of one batch)` the same of stacked batches, each on its own devices.

        Args:
            params: arrays or shapes that know their sharding.
        """

        def one_batch(params: Tree, arrays: Tree) -> jax.Array:
            return function(params, *jax.tree.map(lambda array: array[0], arrays))[None]

        weights = jax.tree.map(lambda weight: weight.sharding.spec, params)
        batches = PartitionSpec("data")
        # Kernels do not say over which axes their results are equal, so this cannot be checked.
        mapped = jax.shard_map(
            one_batch, mesh=self.mesh, in_specs=(weights, batches), out_specs=batches, check_vma=False
        )

        def side_by_side(params: Tree, *arrays: Tree) -> jax.Array:
            return mapped(params, arrays)

        return side_by_side

    def queued(self, program: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """The program, queued on all devices before any other is, see `QUEUE`."""

        def run(*arrays: Tree) -> jax.Array:
            with QUEUE:
                return program(*arrays)

        return run

    def _weight_shape(self, name: str, weight: Any) -> jax.ShapeDtypeStruct:
        cut = self.cuts.get(name)
        shape, spec = (cut.shape(weight.shape), cut.spec) if cut else (weight.shape, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, weight.dtype, sharding=NamedSharding(self.mesh, spec))

    def __str__(self) -> str:
        return f"data {self.data} x model {self.model}: {', '.join(map(device_name, self.mesh.devices.flat))}"


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a weight is divided among `devices`: it is blocks along one axis, each of which has equal parts.

    Device t holds part `t * parts // devices` of every block, side by side. All devices' parts one after another are
    the weight as a sharded array: its own rows or columns in another order, some more than once if there are fewer
    parts than devices.
    """

    devices: int
    axis: int
    blocks: tuple[tuple[int, int], ...]  # (rows or columns, parts)

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(*[None] * self.axis, "model")

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The sharded array's."""
        size = self.devices * sum(width // parts for width, parts in self.blocks)
        return tuple(size if axis == self.axis else length for axis, length in enumerate(shape))

    def part(self, weight: Any, device: int) -> Any:
        """What one device holds: a view of the weight, or a copy of what is needed of its blocks."""
        taken, start = [], 0
        for width, parts in self.blocks:
            first = start + device * parts // self.devices * (width // parts)
            within = slice(first, first + width // parts)
            taken.append(weight[within] if self.axis == 0 else weight[:, within])
            start += width
        return np.concatenate(taken, self.axis) if len(taken) > 1 else taken[0]


def cuts(config: ModelConfig, devices: int) -> dict[str, Cut]:
    """How weights are divided, by their names in `weights.nest`."""
    q = (config.num_heads * config.head_dim, devices)
    kv = (config.num_kv_heads * config.head_dim, min(config.num_kv_heads, devices))
    mlp = (config.intermediate_size, devices)
    rows, columns = partial(Cut, devices, 0), partial(Cut, devices, 1)
    return {
        "qkv": rows((q, kv, kv)),
        "q": rows((q,)),
        "kv": rows((kv, kv)),
        "attention_output": columns((q,)),
        "gate_up": rows((mlp, mlp)),
        "down": columns((mlp,)),
        "embedding": columns(((config.hidden_size, devices),)),
    }


def share(config: ModelConfig, devices: int) -> ModelConfig:
    """What one of `devices` along "model" computes of a model.

    Raises:
        ConfigError: they do not divide it.
    """
    for name in ("num_heads", "intermediate_size", "hidden_size"):
        if getattr(config, name) % devices:
            raise ConfigError(
                f"the mesh has {devices} devices along 'model', which does not divide {name}={getattr(config, name)}; "
                "use a number that does, and the other devices along 'data'"
            )
    kv_heads = config.num_kv_heads
    if kv_heads % devices and devices % kv_heads:
        raise ConfigError(
            f"the mesh has {devices} devices along 'model', which neither divides num_kv_heads={kv_heads} nor is a "
            "multiple of it; use a number that is either, and the other devices along 'data'"
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
    """The forward pass over a mesh and the shapes of its arguments, to be compiled for devices that are not here.

        program, params, batch = abstract_forward(mesh, preset("gemma-2b"), FunnelConfig.after(2), rows=4096)
        compiled = program.lower(params, batch).compile()

    Args:
        mesh: see `DeviceMesh`; its devices may be those of `jax.experimental.topologies`.
        rows: of each device's batch, a bucket.

    Raises:
        ConfigError: the mesh or the funnel does not fit the model, or there is no such dtype.
    """
    dtype = check_dtype(dtype)
    devices = DeviceMesh(mesh, config, backend=backend)
    encoder = partial(forward, config=devices.config, funnel=funnel, target=devices.target, axis=devices.axis)
    params = devices.weight_shapes(funnel, dtype)
    batch = devices.shapes(batch_shapes(make_plan(config, funnel), rows))
    return jax.jit(devices.shard(encoder, params)), params, batch
