"""The engine: a loaded model, its compiled programs, and the calls that a serving process makes."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.checks import check_flag, check_integer
from funnel_engine.config import Funnel, FunnelConfig, FunnelLike, check_funnel, read_funnel
from funnel_engine.devices import Devices, OneDevice, choose_dtypes
from funnel_engine.flops import ideal_ratio
from funnel_engine.funnel_transformer_config import EncoderConfig, require_model_config
from funnel_engine.heads import TASKS, HeadConfig
from funnel_engine.inputs import Ragged, read_inputs
from funnel_engine.jax_settings import guarded
from funnel_engine.messages import abbreviate
from funnel_engine.packing import Ints, group_by_length, pack, spans
from funnel_engine.programs import COUNTERS, Counters, Programs, use_compilation_cache, warm_up
from funnel_engine.results import BatchResult, Call, Running, finish_vectors, join_sequences, split_rows
from funnel_engine.sharding import DeviceMesh
from funnel_engine.text import TextConfig, Tokenize, read_tokenizer
from funnel_engine.threads import count_threads
from funnel_engine.weights import (
    ACTIVATIONS,
    DTYPES,
    EIGHT_BITS,
    MATRICES,
    check_dtype,
    dtype_of,
    expected_shapes,
    leaf_of,
    query_splits,
)
from funnel_kernels import PackedWeight, QuantizedWeight, Record, native_calls
from funnel_kernels.errors import CheckpointError, ConfigError, InputError
from funnel_kernels.target import check_backend

CLASSES = {
    "classify": "ForSequenceClassification",
    "tag": "ForTokenClassification",
    "answer": "ForQuestionAnswering",
}  # of Hugging Face, whose checkpoints have a head for a task
MAX_BATCH_TOKENS = 2**24  # row numbers and their sums stay far below the limit of int32


class Engine:
    """Runs one funneled encoder. Make one per process with `Engine.load`; every method may be called from any thread.

    A call packs its sequences into batches of at most `max_batch_tokens` rows, longest sequences first, and returns
    its results in input order. Every batch runs in a *bucket*, a size of the packed axis. The program of a bucket is
    compiled once, by `warmup` or else by the first call that needs it. With a funnel by length, a batch has sequences
    of one class, and every class has buckets and programs of its own; all of them read the same weights.

    JAX settings of the process, e.g. `jax_enable_x64`, do not affect an engine. If the process is forked after an
    engine was made, every method that needs JAX raises `BackendUnavailable` in the fork.
    """

    @guarded
    def __init__(
        self,
        config: EncoderConfig,
        head: HeadConfig,
        weights: Mapping[str, Any],
        *,
        funnel: FunnelLike = FunnelConfig(),
        backend: str = "auto",
        tokenizer: Tokenize | None = None,
        text: TextConfig = TextConfig(),
        max_batch_tokens: int = 16384,
        compilation_cache: str | PathLike[str] | None = None,
        dtype: str | None = None,
        mesh: Mesh | None = None,
        threads: int | None = None,
        intended_funnel: Funnel | None = None,
    ):
        """Puts the weights on the device, or on the devices of a mesh. Most callers want `Engine.load`.

        Args:
            config: the architecture.
            head: what runs on the rows of the encoder.
            weights: arrays with the names and shapes of `weights.expected_shapes`. The matrices of the encoder are all
                float32, all bfloat16, all int8 or all float8_e4m3fn (`funnel_kernels.quantize`), the others float32 or
                bfloat16. Without a mesh, JAX arrays on the device are not copied, so engines can share them.
            funnel: where and how the token axis is pooled; or by the number of tokens of a sequence, see
                `FunnelByLength`: `[(0, None), (64, "6:2/mean")]`. A class that no sequence can reach is not compiled.
            backend: "auto" or one of `funnel_kernels.BACKENDS`, see `funnel_kernels.Target`.
            tokenizer: converts texts to ids; with None the engine takes token ids only.
            text: how else texts are prepared: begin and end of sequence, prompts, length limit.
            max_batch_tokens: tokens of the largest batch, and of the longest sequence.
            compilation_cache: directory where JAX stores compiled programs, for the whole process.
            dtype: "bfloat16" or "float32", to which the weights are cast, and the dtype of activations. "int8" and
                "float8_e4m3fn" quantize the matrices of the encoder; float8 is for GPUs of compute capability 8.9 and
                newer, and slow elsewhere. None keeps the dtype of the weights; then, and with 8 bits, activations are
                bfloat16 where the device multiplies it, else float32.
            mesh: devices to run on, see `sharding`. Devices along the axis "model" share the layers; devices along
                "data" run a batch each. None runs on JAX's default device.
            threads: number of threads of the kernels for CPUs, see `threads.py`; None takes OMP_NUM_THREADS, or else
                all cores of the process.
            intended_funnel: the funnel that the weights are meant for, which `describe` names if it is another one;
                None if there is none.

        Raises:
            ConfigError: options contradict the model or each other, or the mesh does not divide the model.
            CheckpointError: weights are missing or unknown, or have a wrong shape or dtype.
            BackendUnavailable: the backend is not available here, or does not support this model.
        """
        max_batch_tokens = check_integer("max_batch_tokens", max_batch_tokens, least=1, most=MAX_BATCH_TOKENS)
        funnel = read_funnel(funnel)
        if dtype is not None:
            dtype = check_dtype(dtype)
        check_backend(backend)
        count = count_threads(threads)
        check_funnel(config, funnel)
        self.devices: Devices = (
            OneDevice(config, backend=backend, threads=count)
            if mesh is None
            else DeviceMesh(mesh, config, backend=backend, threads=count)
        )
        if backend == "auto" and mesh is None and self.devices.target.platform == "cpu":
            native_calls.warn_without_kernels()
        check_weights(weights, config, head)
        if compilation_cache is not None:
            use_compilation_cache(compilation_cache)
        self.config, self.head = config, head
        self.intended_funnel = funnel if intended_funnel is None else intended_funnel
        self.tokenizer, self.text, self.max_batch_tokens = tokenizer, text, max_batch_tokens
        self.max_length = min(config.max_positions, text.max_tokens or max_batch_tokens, max_batch_tokens)
        matrices, self.activations = choose_dtypes(dtype_of(weights), dtype, self.devices)
        self.params = self.devices.put(weights, funnel, matrices, self.activations)
        self._use_funnel(funnel)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        funnel: FunnelLike | None = None,
        backend: str = "auto",
        dtype: str | None = None,
        attention: str | None = None,
        pooling: str | None = None,
        max_batch_tokens: int = 16384,
        compilation_cache: str | PathLike[str] | None = None,
        verify: bool = False,
        mesh: Mesh | None = None,
        threads: int | None = None,
    ) -> "Engine":
        """Loads a checkpoint that `convert` wrote.

        Args:
            path: its directory.
            funnel: None takes the checkpoint's own, see `convert`; `FunnelConfig()` is no funnel. A list of pairs
                chooses by the number of tokens of a sequence, e.g. `[(0, None), (64, "6:2/mean"), (512, "2:2/mean")]`,
                see `FunnelByLength`. A warning is given if the checkpoint has a funnel and this is another.
            dtype: one of `weights.DTYPES`, see `Engine`; None keeps the checkpoint's.
            attention: "bidirectional" or "causal"; None keeps the checkpoint's.
            pooling: how rows become a vector, see `HeadConfig`; None keeps the checkpoint's.
            verify: first read every file and compare its SHA-256 with the one that `convert` recorded.

        The other arguments are those of `Engine`.

        Raises:
            CheckpointError: the directory is not a complete checkpoint.
            ConfigError, BackendUnavailable: as `Engine`.
        """
        checkpoint = read_checkpoint(path, verify=check_flag("verify", verify))
        config, head = checkpoint.config, checkpoint.head
        if attention is not None:
            known = require_model_config(config, f"attention={attention!r}")
            config = dataclasses.replace(known, attention=attention)
        if pooling is not None:
            head = dataclasses.replace(head, pooling=pooling)
        own = checkpoint.manifest.funnel
        funnel = own if funnel is None else read_funnel(funnel)
        if funnel != own != FunnelConfig():
            warnings.warn(
                f"{path} is meant for the funnel {own}, but it is loaded with {funnel}; its results may be worse. "
                "Leave funnel out to use its own",
                stacklevel=native_calls.users_stacklevel(),
            )
        return cls(
            config,
            head,
            checkpoint.weights,
            funnel=funnel,
            backend=backend,
            tokenizer=read_tokenizer(checkpoint.tokenizer_file) if checkpoint.tokenizer_file else None,
            text=checkpoint.manifest.text,
            max_batch_tokens=max_batch_tokens,
            compilation_cache=compilation_cache,
            dtype=dtype,
            mesh=mesh,
            threads=threads,
            intended_funnel=own,
        )

    @guarded
    def with_funnel(self, funnel: FunnelLike) -> "Engine":
        """Another engine for the same weights, which stay on the device once; `FunnelConfig()` is no funnel.

        It has programs and counters of its own, so this engine does not notice what the other one compiles or runs.

        Raises:
            ConfigError: the funnel does not fit the model, or needs weights in another form.
        """
        config, funnel = require_model_config(self.config, "another funnel for the same weights"), read_funnel(funnel)
        check_funnel(config, funnel)
        for number, is_split in enumerate(query_splits(config, funnel)):
            layer = self.params["layers"][number]
            lacks_parts = any(is_split) and "kv" not in layer
            lacks_whole = not all(is_split) and "kv" in layer and "qkv" not in layer
            if lacks_parts or lacks_whole:
                raise ConfigError(
                    f"the funnels {self.funnel} and {funnel} cannot share weights: with pool_query_only, layer "
                    f"{number} keeps those of queries apart from those of keys; load the checkpoint again with {funnel}"
                )
        other = copy.copy(self)
        other._use_funnel(funnel)
        return other

    def token_ids(self, inputs: Any, *, prompt_name: str | None = None, truncate: bool = False) -> Ragged:
        """The token ids `(ids, offsets, types)` that the other methods run for these inputs; they also accept them.

        With it, all inputs can be checked before any is run. The arguments are those of `embed`.

        Raises:
            InputError: the inputs cannot be run.
        """
        truncate = check_flag("truncate", truncate, error=InputError)
        ragged = read_inputs(
            inputs,
            self.tokenizer,
            self.text,
            prompt_name=prompt_name,
            vocab_size=self.config.vocab_size,
            max_length=self.max_length,
            truncate=truncate,
            token_types=self.config.token_types,
        )
        if ragged.types is not None and not self.config.token_types:
            raise InputError(f"inputs have token types, which a model of family {self.config.family} does not read")
        return ragged

    @guarded
    def embed(
        self,
        inputs: Any,
        *,
        normalize: bool = True,
        truncate_dim: int | None = None,
        prompt_name: str | None = None,
        truncate: bool = False,
    ) -> np.ndarray:
        """One vector per input: its rows are pooled, then the dense layers of the head are applied.

        Args:
            inputs: a text, texts, pairs of texts, sequences of token ids, or ragged `(ids, offsets)`, see
                `inputs.read_inputs`.
            normalize: scale each vector to length 1.
            truncate_dim: keep only the first dimensions, before normalising (Matryoshka, arXiv:2205.13147).
            prompt_name: the prompt of the checkpoint to put before each text.
            truncate: cut the end off inputs that are longer than `max_length`, instead of refusing them.

        Returns:
            [B, D] float32.

        Raises:
            InputError: the inputs cannot be run; the engine stays usable.
        """
        normalize = check_flag("normalize", normalize, error=InputError)
        width = self.embedding_size
        if truncate_dim is not None:
            width = check_integer("truncate_dim", truncate_dim, least=1, most=width, error=InputError)
        ragged = self.token_ids(inputs, prompt_name=prompt_name, truncate=truncate)
        return finish_vectors(join_sequences(ragged, self._run(ragged, "embed")), width, normalize)

    @guarded
    def classify(self, inputs: Any, *, truncate: bool = False) -> np.ndarray:
        """Raw logits of each input, [B, labels] float32.

        The classifier reads the last token that is not padding, or the pooled vector, see
        `HeadConfig.classifier_input`. As in transformers, that token is the rightmost id other than
        `config.pad_token_id`, or the first token if all ids are padding. Without a pad id it is the last token.

        Raises:
            ConfigError: the checkpoint has no sequence classifier.
            InputError: the inputs cannot be run.
        """
        self.check_method("classify")
        ragged = self.token_ids(inputs, truncate=truncate)
        return join_sequences(ragged, self._run(ragged, "classify"))

    @guarded
    def tag(self, inputs: Any, *, truncate: bool = False) -> list[np.ndarray]:
        """Raw logits of each token, one [T, labels] float32 array per input.

        Raises:
            ConfigError: the checkpoint has no token classifier, or the output has fewer rows than tokens.
            InputError: the inputs cannot be run.
        """
        self.check_method("tag")
        ragged = self.token_ids(inputs, truncate=truncate)
        return split_rows(ragged, self._run(ragged, "tag"))

    @guarded
    def answer(self, inputs: Any, *, truncate: bool = False) -> list[np.ndarray]:
        """Raw logits that an answer starts, and ends, at each token, one [T, 2] float32 array per input.

        An input is a pair of a question and a context, or their ids and types; the answer is the part of the context
        with the largest sum of both.

        Raises:
            ConfigError: the checkpoint has no head for answers, or the output has fewer rows than tokens.
            InputError: the inputs cannot be run.
        """
        self.check_method("answer")
        ragged = self.token_ids(inputs, truncate=truncate)
        return split_rows(ragged, self._run(ragged, "answer"))

    @guarded
    def hidden_states(self, inputs: Any, *, truncate: bool = False) -> list[np.ndarray]:
        """The encoder's rows after the final norm, one [R, D] float32 array per input.

        R is the number of tokens or, with a funnel and no recovery, the number of pooled rows. Dense layers, such as
        the projection of EmbeddingGemma 2, are not applied.

        Raises:
            InputError: the inputs cannot be run.
        """
        ragged = self.token_ids(inputs, truncate=truncate)
        return split_rows(ragged, self._run(ragged, "hidden_states"))

    @guarded
    def start(self, inputs: Ragged, method: str) -> Call:
        """Packs and dispatches a batch, and returns while it runs: a server packs the next batch meanwhile.

        Args:
            inputs: what `token_ids` returned. All of them are dispatched at once, so they should not need many more
                than `batch_rows` rows.
            method: "embed", "classify", "tag", "answer" or "hidden_states".

        Raises:
            ConfigError: the checkpoint, or its funnel, has no such results.
        """
        self.check_method(method)
        running = [
            self._dispatch(programs, [inputs.take(order) for order in group], group, method)
            for programs, group in self._groups(inputs.lengths)
        ]
        self.counters.add(calls=1)
        return Call(inputs, method, running, self.params)

    def check_method(self, method: str) -> None:
        """Raises `ConfigError` unless the checkpoint and its funnel have results for this method."""
        if method in TASKS and self.head.task != method:
            raise ConfigError(
                f"{method} needs a head for this task, but this checkpoint's task is {self.head.task or 'none'}; "
                f"convert a {CLASSES[method]} checkpoint"
            )
        for programs in self.programs if method in ("tag", "answer") else ():
            if programs.plan.output_stride != 1:
                which = f", for {programs.min_tokens} tokens or more," if programs.min_tokens > 1 else ""
                raise ConfigError(
                    f"{method} needs one row per token, but with strides {programs.funnel.strides}{which} there is one "
                    f"row per {programs.plan.output_stride} tokens; load with a recovery, e.g. FunnelConfig(..., "
                    "recovery='mean_last')"
                )

    def rows_needed(self, lengths: Ints) -> Ints:
        """The rows of a batch that each sequence of these lengths takes, with the padding of its funnel."""
        rows = np.empty(len(lengths), np.int32)
        for number, members in group_by_length([programs.min_tokens for programs in self.programs], lengths):
            rows[members] = self.programs[number].plan.rows_needed(lengths[members])
        return rows

    @property
    def batch_rows(self) -> int:
        """The rows of the largest batches that run at once: one for each device along the mesh's axis "data"."""
        return self.devices.data * min(programs.buckets[-1] for programs in self.programs)

    @guarded
    def warmup(
        self, *, progress: bool | Callable[[int, int], None] = True, buckets: Sequence[int] | None = None
    ) -> None:
        """Compiles the programs of every bucket, so that no later call compiles.

        Args:
            progress: True shows a progress bar if standard error is a terminal. A function is called as
                `progress(compiled, total)` after each program; an exception from it ends the warm-up.
            buckets: numbers of rows. For each number, the smallest bucket with at least this many rows is compiled,
                for every funnel; None compiles all buckets. A sequence takes as many rows as it has tokens, rounded up
                to a multiple of the funnel's total stride.

        Raises:
            InputError: `buckets` contains a number for which no bucket is large enough.
        """
        if not callable(progress):
            progress = check_flag("progress", progress, error=InputError)
        asked = None if buckets is None else self._check_rows(buckets)
        warm_up({programs: programs.buckets_for(asked) for programs in self.programs}, progress)

    @guarded
    def stats(self) -> dict[str, Any]:
        """Counters since the engine was made, see `programs.COUNTERS`, and `compile_seconds`, summed over threads.

        With a funnel by length, "by_length" has those of each class.
        """
        counters = [programs.counters.values() for programs in self.programs]
        totals: dict[str, Any] = {name: sum(each[name] for each in counters) for name in COUNTERS}
        if len(self.programs) > 1:
            totals["by_length"] = [
                {"from_tokens": tokens, "funnel": str(funnel), **each}
                for (tokens, funnel), each in zip(self.funnel.classes, counters, strict=False)
            ]
        return self.counters.values() | totals

    @guarded
    def describe(self) -> str:
        """A description for people: the model, the ops of the programs, the backend of each op, devices and limits."""
        facts = self.facts()
        width = max(map(len, facts))
        return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())

    @guarded
    def facts(self) -> dict[str, str]:
        """What `describe` says, by name."""
        config, dtype, activations = self.config, dtype_of(self.params), self.activations
        buckets = [programs.buckets for programs in self.programs]
        is_another = self.intended_funnel not in (self.funnel, FunnelConfig())
        return {
            "model": f"{config.family}, {config.num_layers} layers of width {config.hidden_size}, "
            f"{config.attention} attention, {dtype}"
            + (f" weights, {activations} activations" if activations != dtype else ""),
            **describe_funnels(config, self.funnel, self.max_length),
            **({"meant for": f"the funnel {self.intended_funnel}"} if is_another else {}),
            "head": f"pooling {self.head.pooling}, {len(self.head.dense)} dense layers, "
            f"task {self.head.task or 'none'}"
            + (", of the pooled vector" if self.head.classifier_input == "pooled" else "")
            + (", after a dense layer" if self.head.classifier_dense is not None else ""),
            **self.backends(),
            "devices": str(self.devices),
            "buckets": "; ".join(f"{len(rows)} from {rows[0]} to {rows[-1]} rows" for rows in buckets),
            "limits": f"{self.max_length} tokens a sequence",
        }

    @guarded
    def backends(self) -> dict[str, str]:
        """The backend of each op, then why no better one runs, as recorded from the programs; see `Record.facts`.

        If none has been traced yet, the smallest ones are traced now.
        """
        for programs in self.programs:
            if not programs.record.served:
                programs.trace()
        return Record.merged(programs.record for programs in self.programs).facts()

    @property
    def embedding_size(self) -> int:
        """Dimensions of the vectors that `embed` returns."""
        return self.head.dense[-1].out_features if self.head.dense else self.config.hidden_size

    def _use_funnel(self, funnel: Funnel) -> None:
        """Makes the programs of a funnel over the weights that are on the device, with counters from 0."""
        self.funnel, self.counters = funnel, Counters("calls")
        self.programs = tuple(
            Programs(
                self.config,
                each,
                self.head,
                params=self.params,
                activations=self.activations,
                devices=self.devices,
                max_batch_tokens=self.max_batch_tokens,
                min_tokens=tokens,
            )
            for tokens, each in funnel.classes
            if tokens <= self.max_length
        )
        if (
            self.devices.target.backend != "auto"
        ):  # a named backend may refuse an op; then it must do so now, not in the first call
            for programs in self.programs:
                programs.trace()

    def _check_rows(self, asked: Sequence[int]) -> Sequence[int]:
        """Raises `InputError` unless these are numbers of rows that some bucket is large enough for."""
        if not isinstance(asked, (Sequence, np.ndarray)) or len(asked) == 0:
            raise InputError(f"buckets={asked!r} must be a list of numbers of rows, or None for all buckets")
        largest = max(programs.buckets[-1] for programs in self.programs)
        return [
            check_integer(f"buckets[{index}]", rows, least=1, most=largest, error=InputError)
            for index, rows in enumerate(asked)
        ]

    def _groups(self, lengths: Ints) -> Iterator[tuple[Programs, list[Ints]]]:
        """The batches of a call in groups that run at once, the longest sequences first.

        With each group come the programs of its funnel. A batch is the indices of its sequences.
        """
        for number, members in group_by_length([programs.min_tokens for programs in self.programs], lengths):
            programs = self.programs[number]
            for group in self.devices.group_batches(programs.plan, lengths[members], programs.buckets):
                yield programs, [members[order] for order in group]

    def _run(self, ragged: Ragged, method: str) -> Iterator[BatchResult]:
        """Runs all batches. The next one is packed and dispatched before the result of the previous one is yielded, so
        the device does not wait for the host, and no more than two are on the device."""
        running: list[Running] = []
        try:
            for programs, group in self._groups(ragged.lengths):
                running.append(self._dispatch(programs, [ragged.take(order) for order in group], group, method))
                if len(running) > 1:
                    yield from running.pop(0).results()
            self.counters.add(calls=1)
            for last in running:
                yield from last.results()
        finally:
            jax.block_until_ready([each.output for each in running])  # see `Running`

    def _dispatch(self, programs: Programs, batches: list[Ragged], group: list[Ints], method: str) -> Running:
        """Packs a group of batches and starts their programs. On a mesh they run at once, all in the same bucket."""
        plan = programs.plan
        rows = programs.bucket(max(int(plan.rows_needed(batch.lengths).sum()) for batch in batches))
        packed = self.devices.stack([pack(plan, batch.ids, batch.offsets, rows, batch.types) for batch in batches])
        output = programs.run_encoder(packed, rows)
        tokens = sum(len(batch.ids) for batch in batches)
        programs.counters.add(
            sequences=sum(map(len, group)),
            tokens=tokens,
            batches=len(batches),
            padding_rows=self.devices.data * rows - tokens,
        )
        row_spans = [spans(plan, batch.lengths, plan.output_stride) for batch in batches]
        if method in programs.heads:
            reader = programs.heads[method]
            inputs = [reader.sequence_inputs(*pair) for pair in zip(batches, row_spans, strict=True)]
            try:
                output = programs.run_head(method, output, inputs)
            except BaseException:  # e.g. an interrupt while the head is compiled, see `Running`
                jax.block_until_ready(output)
                raise
        return Running(self.devices, group, row_spans, output)


def describe_funnels(config: EncoderConfig, funnel: Funnel, max_length: int) -> dict[str, str]:
    """For each class of lengths its funnel, and what that saves at 512 tokens or at the nearest length of the class."""
    facts, ends = {}, [*(tokens - 1 for tokens, _ in funnel.classes[1:]), max_length]
    for (tokens, each), end in zip(funnel.classes, ends, strict=True):
        length = max(1, min(max(512, tokens), end, max_length))
        ratio = ideal_ratio(config, each, np.array([length], np.int32))
        saving = f"ideal latency ratio at {length} tokens {ratio:.3f}"
        unused = f"not used: a sequence has at most {max_length} tokens"
        name = "funnel" if len(ends) == 1 else f"funnel from {tokens}"
        facts[name] = f"{describe_funnel(each)}; {saving if tokens <= max_length else unused}"
    return facts


def describe_funnel(funnel: FunnelConfig) -> str:
    if funnel.total_stride == 1:
        return "none"
    places = [f"{stride}:1 before layer {index}" for index, stride in enumerate(funnel.strides) if stride > 1]
    options = f"{funnel.pool} pooling, positions {funnel.positions}, recovery {funnel.recovery or 'none'}"
    return f"{', '.join(places)}; {options}"


def check_weights(weights: Mapping[str, Any], config: EncoderConfig, head: HeadConfig) -> None:
    """Raises `CheckpointError` unless the table contains exactly the expected weights, in dtypes that fit together."""
    expected = expected_shapes(config, head)
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in expected]
    wrong += [
        f"{name} has shape {tuple(weights[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if wrong:
        raise CheckpointError(f"weights do not fit the config: {'; '.join(abbreviate(wrong))}")
    kinds: dict[bool, set[str]] = {True: set(), False: set()}  # the dtypes of matrices, and of other weights
    for name, weight in weights.items():
        kinds[leaf_of(name) in MATRICES].add(str(weight.dtype))
    matrices, others = kinds[True], kinds[False]
    if not matrices <= set(DTYPES) or not others <= set(ACTIVATIONS) or len(matrices) > 1:
        raise CheckpointError(
            f"matrices are {', '.join(sorted(matrices))} and other weights {', '.join(sorted(others))}; all matrices "
            f"must be one of {', '.join(DTYPES)}, and other weights {' or '.join(ACTIVATIONS)}"
        )
    if plain := [name for name, weight in weights.items() if lacks_scales(weight)]:
        raise CheckpointError(
            f"{plain[0]} is {weights[plain[0]].dtype} without scales; give what funnel_kernels.quantize returns"
        )


def lacks_scales(weight: Any) -> bool:
    return str(weight.dtype) in EIGHT_BITS and not isinstance(weight, QuantizedWeight | PackedWeight)
