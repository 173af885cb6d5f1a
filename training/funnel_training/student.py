"""The model in training: which weights move, and the outputs of its head on packed texts."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from funnel_engine import FunnelConfig
from funnel_engine.checks import check_integer
from funnel_engine.funnel_transformer_config import EncoderConfig, FunnelTransformerConfig
from funnel_engine.heads import Head, HeadConfig
from funnel_engine.inputs import Ragged
from funnel_engine.models import forward_of
from funnel_engine.packing import ROW_ALIGNMENT, Batch, Ints, Plan, make_plan, pack, round_up, spans
from funnel_engine.weights import PRODUCTS, dtype_for, expected_shapes, nest
from funnel_kernels import Target
from funnel_kernels.errors import ConfigError

Weights = dict[str, Any]  # arrays by the names of `weights.expected_shapes`; of LoRA, pairs of factors
LORA_SCALE = 2.0  # alpha / rank, as in most recipes


class Packs(NamedTuple):
    """Packed texts; every array has a leading axis of P packs of one shape.

    Attributes:
        batch: the input of the encoder.
        inputs: what the head reads for each text, [P, B] each; 0 where a pack has fewer than B texts.
        texts: the numbers of the texts, [P, B]; -1 where there is none.
    """

    batch: Batch
    inputs: tuple[Any, ...]
    texts: Any


@dataclasses.dataclass(frozen=True)
class Student:
    """A model with a funnel, as a function of the weights that are trained.

    Attributes:
        head: what runs on the rows of the encoder, in training as in serving.
        train: "after" moves the layers after the (first) funnel, the final norm and the head; "all" moves every weight;
            "lora:R" moves the head, and products of two matrices of rank R, which are added to the matrices of the
            layers after the funnel (LoRA, arXiv:2106.09685).
        rows: rows of a pack; rounded up to whole windows.
        most_texts: the largest number of texts in a pack.
        dtype: the dtype of activations, "float32" or "bfloat16". Trained weights are float32.
        mesh: the devices; each computes an equal part of the packs, along the axis "data".
        recompute: the derivative computes each layer again, so that memory contains the arrays between the layers of a
            pack, and the activations of one layer.
    """

    config: EncoderConfig
    head: Head
    funnel: FunnelConfig
    train: str
    rows: int
    most_texts: int
    dtype: str
    mesh: Mesh
    recompute: bool = False
    plan: Plan = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.config, FunnelTransformerConfig):
            raise ConfigError("a Funnel-Transformer cannot be trained here; train it with transformers and convert it")
        if self.train not in ("all", "after") and self.rank is None:
            raise ConfigError(f"train={self.train!r} is unknown; choose all, after, or lora:RANK, e.g. lora:16")
        if self.rank is not None:
            check_integer("rank of lora", self.rank, least=1, most=self.config.hidden_size)
        if self.train != "all" and self.funnel.total_stride == 1:
            raise ConfigError(
                f"train={self.train!r} moves what comes after the funnel, but there is no funnel; give one, e.g. "
                "--funnel 6:2/mean, or train all weights (--train all)"
            )
        object.__setattr__(self, "plan", make_plan(self.config, self.funnel))
        object.__setattr__(self, "rows", round_up(self.rows, ROW_ALIGNMENT * self.plan.total_stride))

    @property
    def compiler_options(self) -> dict[str, str | bool]:
        """What XLA must know to compile a derivative of `outputs`.

        For a CPU, XLA removes the barriers of `jax.checkpoint`, and then merges what is computed again with what was
        computed before, which saves no memory. Without this pass they stay.
        """
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return {"xla_disable_hlo_passes": "cse_barrier_expander"} if self.recompute and on_cpu else {}

    @property
    def rank(self) -> int | None:
        found = re.fullmatch(r"lora:([0-9]{1,6})", self.train)
        return int(found[1]) if found else None

    def trained_names(self, weights: Mapping[str, Any]) -> list[str]:
        """The weights that move."""
        movable = [name for name in weights if not name.endswith("layer_scalar")]  # transformers does not train it
        if self.train == "all":
            return movable
        first = next(layer for layer, stride in enumerate(self.funnel.strides) if stride > 1)
        layers = {f"layers.{layer}" for layer in range(first, self.config.num_layers)}
        in_layers = [name for name in movable if name.rpartition(".")[0] in layers]
        encoder = expected_shapes(self.config, HeadConfig())
        head = [name for name in movable if name not in encoder]
        if self.rank is not None:
            return [name for name in in_layers if name.rpartition(".")[2] in PRODUCTS] + head
        return [*in_layers, "final_norm", *head]

    def divide(self, weights: Mapping[str, Any], seed: int) -> tuple[Weights, Weights]:
        """The weights that are trained, in float32, and all that stay as they are or, for LoRA, are added to."""
        names = self.trained_names(weights)
        trained: Weights = {}
        for name, key in zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True):
            if self.rank is None or not name.startswith("layers."):
                trained[name] = jnp.asarray(weights[name], jnp.float32)
            else:
                rows, columns = weights[name].shape
                down = jax.random.normal(key, (self.rank, columns)) * columns**-0.5
                trained[name] = {"down": down, "up": jnp.zeros((rows, self.rank))}
        stay = [name for name in weights if not isinstance(trained.get(name), jax.Array)]
        return trained, {name: in_dtype(name, weights[name], self.dtype) for name in stay}

    def merge(self, trained: Weights, frozen: Mapping[str, Any], dtype: Any) -> Weights:
        """All weights by name, in a dtype; the products of LoRA are added in float32."""
        trained = {
            name: jnp.asarray(frozen[name], jnp.float32) + LORA_SCALE * (weight["up"] @ weight["down"])
            if isinstance(weight, dict)
            else weight
            for name, weight in trained.items()
        }
        return {name: in_dtype(name, weight, dtype) for name, weight in {**frozen, **trained}.items()}

    def outputs(self, trained: Weights, frozen: Weights, packs: Packs) -> jax.Array:
        """What the head returns: [P, B, ...] if it reads texts, [P, R, ...] if it reads every row; float32."""
        target = Target.of(self.mesh.devices.flat[0], backend="xla")
        options: dict[str, Any] = {"dtype": self.dtype, "target": target, "recompute": self.recompute}
        encode: Callable[..., jax.Array] = partial(
            forward_of(self.config), config=self.config, funnel=self.funnel, **options
        )

        def pack_outputs(weights: Weights, one: Packs) -> jax.Array:
            rows = encode(nest(weights, self.config, self.funnel), one.batch)
            return self.head(weights, rows, *one.inputs, target=target)

        def device_outputs(trained: Weights, frozen: Weights, packs: Packs) -> jax.Array:
            weights = self.merge(trained, frozen, self.dtype)
            if packs.texts.shape[0] == 1:
                return pack_outputs(weights, jax.tree.map(lambda array: array[0], packs))[None]
            # Each pack is computed again for its derivative, so that memory contains the activations of one pack.
            return jax.lax.map(partial(jax.checkpoint(pack_outputs), weights), packs)

        replicated, by_pack = PartitionSpec(), PartitionSpec("data")
        return jax.shard_map(
            device_outputs,
            mesh=self.mesh,
            in_specs=(replicated, replicated, by_pack),
            out_specs=by_pack,
            check_vma=False,  # the loops of attention begin with constants
        )(trained, frozen, packs)

    def batches(self, texts: Ragged, numbers: Ints, packs: int) -> Iterator[Packs]:
        """Batches of `packs` packs with all texts of these numbers, longest first."""
        groups = self.fill(texts, numbers[np.argsort(-texts.lengths[numbers], kind="stable")])
        for start in range(0, len(groups), packs):
            yield self.pack(texts, groups[start : start + packs], packs)

    def pack(self, texts: Ragged, groups: list[Ints], packs: int) -> Packs:
        """Packs texts by their numbers; each group must fit, see `fill`. Packs without a group are empty."""
        filled = []
        for group in [*groups, *[np.zeros(0, np.int32)] * (packs - len(groups))]:
            part = texts.take(group)
            output = spans(self.plan, part.lengths, self.plan.output_stride)
            unused = self.most_texts - len(group)
            inputs = tuple(np.pad(array, (0, unused)) for array in self.head.sequence_inputs(part, output))
            numbers = np.pad(group, (0, unused), constant_values=-1)
            filled.append(Packs(pack(self.plan, part.ids, part.offsets, self.rows), inputs, numbers))
        return jax.tree.map(lambda *arrays: np.stack(arrays), *filled)

    def fill(self, texts: Ragged, order: Ints, packs: int | None = None) -> list[Ints]:
        """Divides texts, in this order, into groups that fit a pack each; `packs` limits the number of groups."""
        needed = self.plan.rows_needed(texts.lengths)
        groups: list[list[int]] = [[]]
        used = 0
        for text in order.tolist():
            if used + needed[text] > self.rows or len(groups[-1]) == self.most_texts:
                if len(groups) == packs:
                    break
                groups.append([])
                used = 0
            groups[-1].append(text)
            used += needed[text]
        return [np.array(group, np.int32) for group in groups]


def in_dtype(name: str, weight: Any, dtype: Any) -> jax.Array:
    """A weight in a dtype; norms stay float32."""
    return jnp.asarray(weight, dtype_for(name, str(jnp.dtype(dtype)), str(jnp.dtype(dtype))))
