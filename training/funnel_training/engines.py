"""Engines of one checkpoint with several funnels."""

import dataclasses
from collections.abc import Callable

from funnel_engine import Engine, FunnelConfig
from funnel_engine.checkpoints.native import Checkpoint
from funnel_engine.text import read_tokenizer

EngineMaker = Callable[[FunnelConfig], Engine]


def engine_maker(
    checkpoint: Checkpoint,
    *,
    attention: str | None = None,
    pooling: str | None = None,
    dtype: str | None = None,
    backend: str = "auto",
) -> EngineMaker:
    """A function that makes an engine of a checkpoint with a funnel.

    The weights stay mapped into memory and the tokenizer is read once, so an engine costs only what it puts on the
    device. Drop one engine before the next is made. The options are those of `Engine.load`.
    """
    config, head = checkpoint.config, checkpoint.head
    if attention is not None:
        config = dataclasses.replace(config, attention=attention)
    if pooling is not None:
        head = dataclasses.replace(head, pooling=pooling)
    tokenizer = read_tokenizer(checkpoint.tokenizer_file) if checkpoint.tokenizer_file else None

    def make(funnel: FunnelConfig) -> Engine:
        return Engine(
            config,
            head,
            checkpoint.weights,
            funnel=funnel,
            backend=backend,
            tokenizer=tokenizer,
            text=checkpoint.manifest.text,
            dtype=dtype,
        )

    return make
