"""What a plan compares: funnels, and the rivals that need no funnel."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from funnel_engine import Engine, FunnelConfig
from funnel_engine.checkpoints.native import Checkpoint
from funnel_engine.config import Funnel
from funnel_engine.flops import forward_flops
from funnel_engine.inputs import Ragged, join
from funnel_engine.weights import dtype_of
from funnel_training.candidates import computed_flops, depths
from funnel_training.engines import EngineMaker, first_layers
from funnel_training.scores import Ints
from funnel_training.tasks.task import Task

NO_FUNNEL = FunnelConfig()
TOKEN_SHARES = (0.75, 0.5, 0.25)  # of all tokens, that stay where inputs are cut off

Run = Callable[[Task, list[Any]], list[Any]]  # a task and its inputs to its outputs


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to run a checkpoint faster.

    Attributes:
        kind: "funnel", "by length" (several funnels), "layers" (only the first ones), "tokens" (only the first ones of
            each input) or "dtype" (int8 weights).
        name: a funnel's short form, or words.
        ideal: FLOPs relative to the unfunneled model, on the lengths of the data.
        computed: the same with the rows of padding that a funnel needs.
        open: makes the engine, which lives as long as the function that is returned.
        funnel: None for a rival and for a funnel by length.
    """

    kind: str
    name: str
    ideal: float
    computed: float
    open: Callable[[], Run]
    funnel: FunnelConfig | None = None


def runner(make: Callable[[], Engine]) -> Callable[[], Run]:
    def open_engine() -> Run:
        engine = make()
        return lambda task, inputs: task.outputs(engine, inputs)

    return open_engine


def funnel_contender(baseline: Engine, make: EngineMaker, funnel: Funnel, lengths: Ints) -> Contender:
    config = baseline.config
    exact = forward_flops(config, NO_FUNNEL, lengths)
    ideal, computed = (flops(config, funnel, lengths) / exact for flops in (forward_flops, computed_flops))
    run = runner(partial(make, funnel))
    if isinstance(funnel, FunnelConfig):
        return Contender("funnel", str(funnel), ideal, computed, run, funnel)
    return Contender("by length", str(funnel), ideal, computed, run)


def rivals(
    checkpoint: Checkpoint,
    baseline: Engine,
    task: Task,
    lengths: Ints,
    make_maker: Callable[..., EngineMaker],
) -> list[Contender]:
    """The same checkpoint with only its first layers; with only the first tokens of its inputs; with int8 weights.

    Args:
        lengths: of all inputs, in tokens.
        make_maker: `engine_maker` with its options.
    """
    config = baseline.config
    exact = forward_flops(config, NO_FUNNEL, lengths)
    found = []
    for count in filter(None, depths(config.num_layers)):
        part = first_layers(checkpoint, count)
        ratio = forward_flops(part.config, NO_FUNNEL, lengths) / exact
        make = partial(make_maker(part), NO_FUNNEL)
        found.append(Contender("layers", f"first {plural(count, 'layer')}", ratio, ratio, runner(make)))
    if not task.per_token:  # there every token needs an output
        for tokens in token_limits(lengths):
            ratio = forward_flops(config, NO_FUNNEL, np.minimum(lengths, tokens)) / exact
            found.append(
                Contender("tokens", f"first {plural(tokens, 'token')}", ratio, ratio, cut_runner(baseline, tokens))
            )
    if dtype_of(baseline.params) != "int8":
        make = partial(make_maker(checkpoint, dtype="int8"), NO_FUNNEL)
        found.append(Contender("dtype", "int8 weights", 1.0, 1.0, runner(make)))
    return found


def token_limits(lengths: Ints) -> list[int]:
    """Numbers of tokens; cut to these, the inputs have about three quarters, half and a quarter of their tokens."""
    limits = np.unique(lengths)
    shares = np.minimum(lengths[:, None], limits).sum(axis=0) / lengths.sum()
    nearest = {int(limits[np.abs(shares - share).argmin()]) for share in TOKEN_SHARES}
    return sorted((limit for limit in nearest if limit < lengths.max()), reverse=True)


def cut_runner(engine: Engine, tokens: int) -> Callable[[], Run]:
    return lambda: lambda task, inputs: task.outputs(engine, [cut(side, tokens) for side in inputs])


def cut(inputs: Ragged, tokens: int) -> Ragged:
    return join([ids[:tokens] for ids in np.split(inputs.ids, inputs.offsets[1:-1])])


def plural(count: int, what: str) -> str:
    return f"{count} {what}s" if count > 1 else what
