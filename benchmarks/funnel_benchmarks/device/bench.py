"""What the parts of a run share: sizes, backend, one set of weights on the device, and engines with them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funnel_benchmarks.device.clock import Clock
from funnel_benchmarks.device.sizes import Sizes
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_benchmarks.inputs import random_inputs
from funnel_benchmarks.measure import Call, Sample, sampler
from funnel_engine import Engine, FunnelConfig, HeadConfig
from funnel_engine.devices import local_target
from funnel_engine.packing import Ints
from funnel_engine.weights import expected_shapes
from funnel_kernels import Target

DTYPE = "bfloat16"


@dataclasses.dataclass
class Bench:
    """One run.

    Attributes:
        seed: of all random data.
        matrix_rate: TFLOP/s of a large product, if they are known.
        engines: by funnel; they share weights and compiled programs, and are made when first asked for.
    """

    sizes: Sizes
    backend: str
    seed: int
    clock: Clock
    matrix_rate: float | None = None
    engines: dict[FunnelConfig, Engine] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def target(self) -> Target:
        return local_target(self.backend)

    @functools.cached_property
    def weights(self) -> dict[str, jax.Array]:
        shapes = expected_shapes(self.sizes.config, HeadConfig())
        return {name: self.normal(index, shape, 0.02) for index, (name, shape) in enumerate(shapes.items())}

    def normal(self, stream: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
        """Random bfloat16 numbers, made on the device; another `stream` has others."""
        return device_normal(jax.random.fold_in(jax.random.key(self.seed), stream), shape) * jnp.bfloat16(scale)

    def engine(self, funnel: FunnelConfig = NO_FUNNEL) -> Engine:
        if funnel not in self.engines:
            self.engines[funnel] = Engine(
                self.sizes.config,
                HeadConfig(),
                self.weights,
                funnel=funnel,
                backend=self.backend,
                max_batch_tokens=self.sizes.tokens,
            )
        return self.engines[funnel]

    def inputs(self, lengths: Ints) -> tuple[Ints, Ints]:
        """Random token ids of sequences of these lengths."""
        return random_inputs(self.sizes.config.vocab_size, lengths, self.seed)

    @property
    def equal_lengths(self) -> Ints:
        """Of the batch that everything but funnels is measured with."""
        sequences, tokens = self.sizes.batches[0]
        return np.full(sequences, tokens, np.int32)

    def embedding(self, lengths: Ints, funnel: FunnelConfig = NO_FUNNEL) -> Callable[[], Any]:
        """The call that embeds sequences of these lengths, from token ids on the host to vectors on the host."""
        engine, inputs = self.engine(funnel), self.inputs(lengths)
        return lambda: engine.embed(inputs)

    def sampler(self, call: Call) -> Sample:
        return sampler(call, self.sizes.sample_seconds)


@functools.partial(jax.jit, static_argnums=1)
def device_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)
