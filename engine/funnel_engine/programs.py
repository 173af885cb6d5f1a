"""The compiled programs of a funnel, for each bucket one of the encoder and some of each head, and its counters."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from funnel_engine.config import FunnelConfig
from funnel_engine.devices import Devices, batch_shapes
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.heads import HeadConfig, head_shapes, make_heads
from funnel_engine.jax_settings import default_settings
from funnel_engine.models import forward_of
from funnel_engine.packing import Batch, Ints, make_plan, row_alignment, row_buckets, sequence_bucket, sequence_buckets
from funnel_engine.xla_options import compiler_options
from funnel_kernels import Record
from funnel_kernels.errors import ConfigError

Program = Callable[..., jax.Array]
COUNTERS = (
    "sequences",
    "tokens",
    "batches",
    "padding_rows",  # rows that were computed but contain no token
    "compilations",
    "compilations_after_warmup",
    "compile_seconds",
)


class ProgramKey(NamedTuple):
    """Identifies a program.

    Attributes:
        name: "forward" for the encoder, or the name of a head.
        rows: the bucket of the encoder.
        sequences: the number of sequences that a head reads; 0 for the encoder and for a head that runs on every row.
    """

    name: str
    rows: int
    sequences: int = 0


class Counters:
    """Numbers that only grow, by name. Any thread may add to them."""

    def __init__(self, *names: str):
        self._values: dict[str, float] = dict.fromkeys(names, 0)
        self._lock = threading.Lock()

    def add(self, **counts: float) -> None:
        with self._lock:
            for name, count in counts.items():
                self._values[name] += count

    def values(self) -> dict[str, float]:
        with self._lock:
            return dict(self._values)


class Programs:
    """The programs of one funnel. Each is compiled when it is first needed. Any thread may call any method.

    Attributes:
        funnel, min_tokens: the funnel, and the least number of tokens of a sequence that runs with it.
        plan: how batches are packed for it.
        buckets: the numbers of rows that batches are packed into, ascending.
        heads: those that can run on its rows, by name.
        record: which backends serve the ops of the programs that were traced.
        counters: see `COUNTERS`; `compile_seconds` is summed over threads.
        compiled: the programs, also those that are being compiled.
        is_warm: whether a warm-up has ended, so that a compilation is counted as one too many.
    """

    def __init__(
        self,
        config: EncoderConfig,
        funnel: FunnelConfig,
        head: HeadConfig,
        *,
        params: Any,
        activations: str,
        devices: Devices,
        max_batch_tokens: int,
        min_tokens: int,
    ):
        """
        Args:
            config: the whole model, also where each device computes a part of it.
            params: the weights, as `devices.put` returns them; funnels can share them.
            activations: the dtype of activations.
            max_batch_tokens: tokens of the largest batch.
        """
        self.funnel, self.min_tokens = funnel, max(1, min_tokens)
        self.plan = make_plan(config, funnel)
        alignment = row_alignment(devices.target.platform)
        self.buckets = row_buckets(self.plan, max_batch_tokens, self.min_tokens, alignment=alignment)
        self.heads = {each.name: each for each in make_heads(head, self.plan, config.pad_token_id)}
        self.params, self.devices = params, devices
        self.activations, self.width = activations, config.hidden_size
        self.head_params = {name: params[name] for name in head_shapes(config.hidden_size, head)}
        self.record = Record()
        self.counters = Counters(*COUNTERS)
        self.compiled: dict[ProgramKey, Future[Program]] = {}
        self._encoder: Callable[..., jax.Array] = partial(
            forward_of(config), config=devices.config, funnel=funnel, dtype=activations, axis=devices.axis
        )
        self._target = dataclasses.replace(devices.target, record=self.record)
        self._lock = threading.Lock()  # guards what is compiled
        self.is_warm = False

    def bucket(self, rows: int) -> int:
        """The smallest bucket with at least this many rows."""
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def buckets_for(self, asked: Sequence[int] | None) -> list[int]:
        """The buckets for these numbers of rows, if they are not larger than all buckets; None is all buckets."""
        if asked is None:
            return list(self.buckets)
        return sorted({self.bucket(rows) for rows in asked if rows <= self.buckets[-1]})

    def run_encoder(self, packed: Batch, rows: int) -> jax.Array:
        """Runs the encoder on the output of `devices.stack` for a group of batches of `rows` rows each."""
        return self.program(ProgramKey("forward", rows))(self.params, packed)

    def run_head(self, name: str, rows: jax.Array, inputs: Sequence[tuple[Ints, ...]]) -> jax.Array:
        """Runs a head on the encoder's rows. `inputs` contains `Head.sequence_inputs` for every batch."""
        bucket = rows.shape[-2] * self.plan.output_stride
        if not self.heads[name].inputs_per_sequence:
            return self.program(ProgramKey(name, bucket))(self.head_params, rows)
        sequences = sequence_bucket(max(len(batch[0]) for batch in inputs))
        padded = np.zeros((len(inputs), len(inputs[0]), sequences), np.int32)
        for row, batch in zip(padded, inputs, strict=True):
            row[:, : len(batch[0])] = batch
        program = self.program(ProgramKey(name, bucket, sequences))
        return program(self.head_params, rows, *self.devices.stack([tuple(batch) for batch in padded]))

    def keys(self, rows: int) -> list[ProgramKey]:
        """The programs of a bucket."""
        counts = sequence_buckets(rows // self.plan.rows_needed(self.min_tokens))
        heads = [
            ProgramKey(head.name, rows, n)
            for head in self.heads.values()
            for n in (counts if head.inputs_per_sequence else (0,))
        ]
        return [ProgramKey("forward", rows), *heads]

    def program(self, key: ProgramKey) -> Program:
        """A compiled program. The first caller that needs it compiles it; other callers wait."""
        with self._lock:
            program = self.compiled.get(key)
            is_first = program is None
            if program is None:
                program = self.compiled[key] = Future()
        if is_first:
            begin = time.perf_counter()
            try:
                with default_settings(), jax.default_device(self.devices.device):  # settings of this thread
                    program.set_result(self._compile(key))
            except BaseException as error:
                with self._lock:
                    del self.compiled[key]  # the next caller tries again
                interrupted = RuntimeError("the compilation that this call waited for was interrupted; call again")
                program.set_exception(error if isinstance(error, Exception) else interrupted)
                raise
            else:
                seconds = time.perf_counter() - begin
                self.counters.add(compilations=1, compilations_after_warmup=int(self.is_warm), compile_seconds=seconds)
        return program.result()

    def trace(self) -> None:
        """Traces the encoder and each head for the smallest bucket, so that the record has the backends of their ops.

        Nothing is kept but the record: to trace takes a tenth of a second, and the bucket may never be compiled.

        Raises:
            BackendUnavailable: the backend does not support one of the ops.
        """
        for key in {key.name: key for key in self.keys(self.buckets[0])}.values():
            with jax.default_device(self.devices.device):
                self._trace(key)

    def _compile(self, key: ProgramKey) -> Program:
        options = compiler_options(self._target.platform, self._target.threads)
        return self.devices.thread_safe(self._trace(key).lower().compile(options))

    def _trace(self, key: ProgramKey) -> jax.stages.Traced:
        """The traced program for a group of batches."""
        shapes: tuple[Any, ...]
        if key.name == "forward":
            function, params, shapes = self._encoder, self.params, (batch_shapes(self.plan, key.rows),)
        else:
            function, params = self.heads[key.name], self.head_params
            hidden = jax.ShapeDtypeStruct((key.rows // self.plan.output_stride, self.width), self.activations)
            per_sequence = jax.ShapeDtypeStruct((key.sequences,), np.int32)
            shapes = (hidden, *[per_sequence] * self.heads[key.name].inputs_per_sequence)
        sharded = self.devices.shard(partial(function, target=self._target), params)
        return jax.jit(sharded).trace(params, *self.devices.stacked_shapes(shapes))


def warm_up(buckets: Mapping[Programs, Sequence[int]], progress: bool | Callable[[int, int], None]) -> None:
    """Compiles the programs of these buckets; see `Engine.warmup`."""
    from rich.console import Console  # imported here: a process that only serves needs neither
    from rich.progress import track

    needed = [(programs, key) for programs, some in buckets.items() for rows in some for key in programs.keys(rows)]
    console = Console(stderr=True)
    hidden = progress is not True or not console.is_terminal
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = [pool.submit(programs.program, key) for programs, key in needed]
        bar = track(compiled, "Compiling", console=console, disable=hidden, transient=True)
        try:
            for done, program in enumerate(bar, 1):
                program.result()
                if callable(progress):
                    progress(done, len(needed))
        finally:
            pool.shutdown(cancel_futures=True)  # if one failed, those that wait are not compiled
    for programs in buckets:
        programs.is_warm = True


def use_compilation_cache(path: str | PathLike[str]) -> None:
    """Makes JAX store compiled programs in the directory `path`, from now on and for the whole process.

    Raises:
        ConfigError: the directory cannot be made.
    """
    if not isinstance(path, (str, PathLike)) or not os.fspath(path):
        raise ConfigError(
            f"compilation_cache={path!r} is not the path of a directory; give a path, or None for no cache"
        )
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the directory compilation_cache={directory} cannot be made: {error.strerror}; choose another path"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax_cache.reset_cache()  # otherwise JAX keeps using a directory that was set before
