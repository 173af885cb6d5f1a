"""The compiled programs of an engine, for each bucket one of the encoder and some of each head, and its counters."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from funnel_engine.devices import Devices, batch_shapes
from funnel_engine.heads import Head
from funnel_engine.jax_settings import default_settings
from funnel_engine.packing import Batch, Ints, Plan, sequence_bucket, sequence_buckets
from funnel_engine.xla_options import compiler_options
from funnel_kernels import Record
from funnel_kernels.errors import ConfigError

Program = Callable[..., jax.Array]
COUNTERS = (
    "calls",
    "sequences",
    "tokens",
    "batches",
    "padding_rows",  # rows that were computed but contain no token
    "compilations",
    "compilations_after_warmup",
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


class Programs:
    """Compiles each program when it is first needed. Every method may be called from any thread.

    Attributes:
        record: which backends serve the ops of the programs that were traced.
        compiled: the programs, also those that are being compiled.
    """

    def __init__(
        self,
        encoder: Callable[..., jax.Array],
        heads: Sequence[Head],
        *,
        params: Any,
        head_params: Any,
        plan: Plan,
        devices: Devices,
    ):
        """
        Args:
            encoder: `model.forward` with all arguments but params, batch and target.
            heads: the heads that the engine may run.
            params: the encoder's weights, as `devices.put` returns them.
            head_params: the weights of all heads.
        """
        self.encoder, self.heads = encoder, {head.name: head for head in heads}
        self.params, self.head_params, self.plan, self.devices = params, head_params, plan, devices
        self.record = Record()
        self.compiled: dict[ProgramKey, Future[Program]] = {}
        self._target = dataclasses.replace(devices.target, record=self.record)
        self._counters = dict.fromkeys(COUNTERS, 0) | {"compile_seconds": 0.0}
        self._lock = threading.Lock()  # guards what is compiled and the counters
        self._is_warm = False

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

    def warm_up(self, buckets: Sequence[int], progress: bool | Callable[[int, int], None]) -> None:
        """Compiles all programs of these buckets; see `Engine.warmup`."""
        from rich.console import Console  # imported here: a process that only serves needs neither
        from rich.progress import track

        keys = [key for rows in buckets for key in self.keys(rows)]
        console = Console(stderr=True)
        hidden = progress is not True or not console.is_terminal
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = [pool.submit(self.program, key) for key in keys]
            bar = track(compiled, "Compiling", console=console, disable=hidden, transient=True)
            try:
                for done, program in enumerate(bar, 1):
                    program.result()
                    if callable(progress):
                        progress(done, len(keys))
            finally:
                pool.shutdown(cancel_futures=True)  # if one failed, those that wait are not compiled
        self._is_warm = True

    def keys(self, rows: int) -> list[ProgramKey]:
        """The programs of a bucket."""
        counts = sequence_buckets(rows // self.plan.total_stride)
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
                self.count(compilations=1, compilations_after_warmup=int(self._is_warm), compile_seconds=seconds)
        return program.result()

    def trace(self, rows: int) -> None:
        """Traces the encoder and each head for one bucket, so that the record contains the backends of their ops.

        Nothing is kept but the record: to trace takes a tenth of a second, and the bucket may never be compiled.

        Raises:
            BackendUnavailable: the backend does not support one of the ops.
        """
        for key in {key.name: key for key in self.keys(rows)}.values():
            with jax.default_device(self.devices.device):
                self._trace(key)

    def count(self, **counts: float) -> None:
        """Adds to the counters of these names."""
        with self._lock:
            for name, count in counts.items():
                self._counters[name] += count

    def counters(self) -> dict[str, float]:
        """Counters since the programs were made, see `COUNTERS`, and `compile_seconds`, summed over threads."""
        with self._lock:
            return dict(self._counters)

    def _compile(self, key: ProgramKey) -> Program:
        options = compiler_options(self._target.platform, self._target.threads)
        return self.devices.thread_safe(self._trace(key).lower().compile(options))

    def _trace(self, key: ProgramKey) -> jax.stages.Traced:
        """The traced program for a group of batches."""
        shapes: tuple[Any, ...]
        if key.name == "forward":
            function, params, shapes = self.encoder, self.params, (batch_shapes(self.plan, key.rows),)
        else:
            function, params, norm = self.heads[key.name], self.head_params, self.params["final_norm"]
            hidden = jax.ShapeDtypeStruct((key.rows // self.plan.output_stride, *norm.shape), norm.dtype)
            per_sequence = jax.ShapeDtypeStruct((key.sequences,), np.int32)
            shapes = (hidden, *[per_sequence] * self.heads[key.name].inputs_per_sequence)
        sharded = self.devices.shard(partial(function, target=self._target), params)
        return jax.jit(sharded).trace(params, *self.devices.stacked_shapes(shapes))


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
