"""The models that can be measured: presets with random weights, and converted checkpoints."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from funnel_benchmarks.results import Row
from funnel_engine import Engine, FunnelConfig, FunnelTransformerConfig, HeadConfig, preset
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.devices import default_activations, local_target, to_device
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.presets import funnel_transformer
from funnel_engine.served_by import served_by
from funnel_engine.weights import check_dtype, count_parameters, expected_shapes, random_weight
from funnel_kernels import Target
from funnel_kernels.errors import ConfigError

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model whose weights are not loaded yet.

    Attributes:
        name: what reports call it.
        weights: where they are from: "random" or the checkpoint's name.
        dtype: of the weights; activations have `devices.default_activations`.
        funnel: that between the blocks of a Funnel-Transformer, the only one that it is measured with; None: any.
        load: puts the weights on the device, as a backend wants them; names are those of `weights.expected_shapes`.
            On a terminal it shows how far it has got.
        made: weights and engines that were made so far.
    """

    name: str
    weights: str
    config: EncoderConfig
    head: HeadConfig
    dtype: str
    load: Callable[[str], Mapping[str, Any]]
    funnel: FunnelConfig | None = None
    made: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def loaded(self, backend: str) -> Mapping[str, Any]:
        """The weights, which are loaded once for each backend."""
        if backend not in self.made:
            self.made[backend] = self.load(backend)
        weights: Mapping[str, Any] = self.made[backend]
        return weights

    def engine(self, funnel: FunnelConfig, backend: str, rows: int) -> Engine:
        """An engine whose largest bucket holds `rows` rows, made once. All engines of a backend share their weights."""
        key, weights = (funnel, backend, rows), self.loaded(backend)
        if key not in self.made:
            options: Any = {"funnel": funnel, "backend": backend, "max_batch_tokens": rows}
            self.made[key] = Engine(self.config, self.head, weights, **options)
        engine: Engine = self.made[key]
        return engine

    def facts(self) -> Row:
        """What a result file says about it."""
        config = self.config
        return {
            "name": self.name,
            "weights": self.weights,
            "dtype": self.dtype,
            "family": config.family,
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "heads": config.num_heads,
            "kv_heads": config.heads(config.layer_types[0]).keys,
            "head_dim": config.head_dim,
            "attention": config.attention,
            "parameters": count_parameters(expected_shapes(config, self.head)),
        }

    def served_by(self, funnels: Iterable[FunnelConfig], backend: str) -> str:
        """The backends that run its ops, with any of these funnels."""
        target = local_target(backend)
        served = [served_by(self.config, funnel, self.dtype, target).backends() for funnel in funnels]
        return ", ".join(sorted({name for names in served for name in names}))


def preset_model(name: str, dtype: str | None, depth: int | None = None) -> Model:
    """A published architecture with random weights; bfloat16 unless told otherwise.

    A Gemma is bidirectional, as an encoder is; another family has its own attention.

    Args:
        depth: keep only this many of its first layers. Default: all.

    Raises:
        ConfigError: no such preset, more layers than it has, or a dtype that the engine does not run.
    """
    dtype = dtype or "bfloat16"
    check_dtype(dtype)
    config = preset(name)
    if config.family.startswith("gemma"):
        config = dataclasses.replace(config, attention="bidirectional")
    if depth is not None:
        check_depth(depth, name, config.num_layers)
        shared = max(0, config.kv_shared_layers - (config.num_layers - depth))  # the others keep their own keys
        config = dataclasses.replace(config, layer_types=config.layer_types[:depth], kv_shared_layers=shared)
        name = f"{name}, {depth} layers"
    return random_model(name, config, dtype)


def funnel_transformer_model(name: str, dtype: str | None) -> Model:
    """A published Funnel-Transformer with random weights; bfloat16 unless told otherwise.

    Its vectors are the rows of [CLS]. Without its funnel all its layers run at full length, as one block.

    Raises:
        ConfigError: no such preset, or a dtype that the engine does not run.
    """
    dtype = dtype or "bfloat16"
    check_dtype(dtype)
    config, funnel = funnel_transformer(name)
    return dataclasses.replace(random_model(name, config, dtype, HeadConfig("first")), funnel=funnel)


def random_model(name: str, config: EncoderConfig, dtype: str, head: HeadConfig = HeadConfig()) -> Model:  # noqa: B008
    """Any architecture with random weights."""

    def load(backend: str) -> dict[str, Any]:
        generator = np.random.default_rng(0)
        shapes = with_bar("Making weights", expected_shapes(config, head).items())
        put = partial(put_weight, dtype=dtype, target=local_target(backend))
        return {name: put(name, random_weight(generator, name, shape, dtype)) for name, shape in shapes}

    return Model(name, "random", config, head, dtype, load)


def put_weight(name: str, weight: Any, dtype: str, target: Target) -> Any:
    """One weight on the device, as an engine of this dtype puts it there."""
    return to_device(name, weight, dtype, default_activations(dtype, target), target)


def check_depth(depth: int, name: str, layers: int) -> None:
    """Raises `ConfigError` unless a model of `layers` layers can be cut down to its first `depth`."""
    if not 1 <= depth <= layers:
        raise ConfigError(f"depth {depth} is not possible: {name} has {layers} layers; take 1 to {layers}")


def checkpoint_model(directory: Path, dtype: str | None) -> Model:
    """A checkpoint that `funnel convert` has written, with its own attention, and its own dtype unless told otherwise.

    Raises:
        CheckpointError: not such a checkpoint.
        ConfigError: a dtype that the engine does not run.
    """
    checkpoint = read_checkpoint(directory)
    dtype = dtype or checkpoint.dtype
    check_dtype(dtype)

    def load(backend: str) -> dict[str, Any]:
        weights = with_bar("Loading weights", checkpoint.weights.items())
        target = local_target(backend)
        return {name: put_weight(name, weight, dtype, target) for name, weight in weights}

    name, config, own = directory.resolve().name, checkpoint.config, checkpoint.manifest.funnel
    funnel = own if isinstance(config, FunnelTransformerConfig) and isinstance(own, FunnelConfig) else None
    return Model(name, name, config, checkpoint.head, dtype, load, funnel)


def with_bar(what: str, items: Collection[Item]) -> Iterable[Item]:
    """The items one by one, with a bar for them on a terminal."""
    console = Console()
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)
