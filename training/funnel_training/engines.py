"""Engines of one checkpoint with several funnels."""

import dataclasses
import os
from collections.abc import Callable

from funnel_engine import Engine, FunnelConfig
from funnel_engine.checkpoints.native import Checkpoint, read_checkpoint
from funnel_engine.config import Funnel
from funnel_engine.funnel_transformer_config import require_model_config
from funnel_engine.text import read_tokenizer
from funnel_engine.weights import EIGHT_BITS
from funnel_kernels.errors import ConfigError

EngineMaker = Callable[[Funnel], Engine]


def read_checkpoint_as(
    path: str | os.PathLike[str], *, attention: str | None = None, pooling: str | None = None
) -> Checkpoint:
    """Opens a checkpoint with another attention or pooling than its own; None keeps its own."""
    checkpoint = read_checkpoint(path)
    config, head = checkpoint.config, checkpoint.head
    if attention is not None:
        known = require_model_config(config, f"attention={attention!r}")
        config = dataclasses.replace(known, attention=attention)
    if pooling is not None:
        head = dataclasses.replace(head, pooling=pooling)
    manifest = dataclasses.replace(checkpoint.manifest, config=config, head=head)
    return dataclasses.replace(checkpoint, manifest=manifest)


def check_untrained(path: str | os.PathLike[str], checkpoint: Checkpoint, role: str) -> None:
    """Raises `ConfigError` if a checkpoint was trained for a funnel: without it, it is not what it was before.

    Args:
        role: what it was to be without a funnel, e.g. "baseline".
    """
    if checkpoint.manifest.training is not None and checkpoint.manifest.funnel.total_stride > 1:
        raise ConfigError(
            f"{path} was trained for the funnel {checkpoint.manifest.funnel}, so it cannot be the {role}, which runs "
            "without a funnel; give the checkpoint that its training began with"
        )


def check_trainable(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Raises `ConfigError` if the weights of a checkpoint have 8 bits, whose products have no derivative."""
    if checkpoint.dtype in EIGHT_BITS:
        raise ConfigError(
            f"{path} has {checkpoint.dtype} weights, which cannot be trained; train the float checkpoint that it was "
            f"made from, and then convert the result: funnel convert TRAINED NEW --dtype {checkpoint.dtype}"
        )


def funnel_to_train(checkpoint: Checkpoint, funnel: Funnel | None) -> FunnelConfig:
    """The funnel that a checkpoint is to be trained for; None is its own.

    Raises:
        ConfigError: there are several, by length.
    """
    chosen = checkpoint.manifest.funnel if funnel is None else funnel
    if not isinstance(chosen, FunnelConfig):
        raise ConfigError(
            f"{chosen} has several funnels, by length, and training is for one; give that, e.g. --funnel 6:2/mean"
        )
    return chosen


def first_layers(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """The checkpoint with only its first layers; the final norm follows the last of them."""
    dropped = tuple(f"layers.{index}." for index in range(count, checkpoint.config.num_layers))
    weights = {name: weight for name, weight in checkpoint.weights.items() if not name.startswith(dropped)}
    whole = require_model_config(checkpoint.config, "a model of the first layers only")
    config = dataclasses.replace(whole, layer_types=whole.layer_types[:count])
    manifest = dataclasses.replace(checkpoint.manifest, config=config)
    return dataclasses.replace(checkpoint, manifest=manifest, weights=weights)


def engine_maker(
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    backend: str = "auto",
    compilation_cache: str | os.PathLike[str] | None = None,
) -> EngineMaker:
    """A function that makes an engine of a checkpoint with a funnel.

    The weights stay mapped into memory and the tokenizer is read once, so an engine costs only what it puts on the
    device. Drop one engine before the next is made. The options are those of `Engine.load`.
    """
    tokenizer = read_tokenizer(checkpoint.tokenizer_file) if checkpoint.tokenizer_file else None

    def make(funnel: Funnel) -> Engine:
        return Engine(
            checkpoint.config,
            checkpoint.head,
            checkpoint.weights,
            funnel=funnel,
            backend=backend,
            tokenizer=tokenizer,
            text=checkpoint.manifest.text,
            dtype=dtype,
            compilation_cache=compilation_cache,
        )

    return make
