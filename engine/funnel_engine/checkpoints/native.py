"""Our own checkpoint format: a directory that is loaded without copying.

funnel.json                        the description of the model (`Manifest`); written last
weights.safetensors                every weight of `weights.expected_shapes` as `weights.tensor_types` says, aligned for
  or weights-00001-of-00003...     use in place; in several files above 5 GB
tokenizer.json, tokenizer.model    for the tokenizers or the sentencepiece library; only if the source had one
"""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from funnel_engine.checkpoints.safetensors_file import (
    WITH_SCALES,
    DequantizedTensor,
    StoredTensor,
    map_tensors,
    read_header,
    write_tensors,
)
from funnel_engine.checkpoints.source import SourceModel, TrainingRecord
from funnel_engine.checkpoints.tensors import Part, Rows, assemble, check_tensors, join_shards
from funnel_engine.config import Funnel, FunnelConfig, check_funnel, read_funnel, set_field
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.heads import HeadConfig
from funnel_engine.input_files import (
    check_file,
    decode,
    file_in,
    hash_file,
    is_file,
    read_json,
    reading,
    to_path,
    unfinished_downloads,
)
from funnel_engine.messages import abbreviate
from funnel_engine.text import TextConfig
from funnel_engine.weights import (
    ACTIVATIONS,
    DTYPES,
    SCALE,
    count_parameters,
    expected_shapes,
    is_norm,
    join_scales,
    tensor_types,
)
from funnel_kernels import quantize
from funnel_kernels.errors import CheckpointError

VERSION = 7
# The fields that a version added to the one before it, and what they mean where they are missing.
# Version 4 also allows a funnel by length. Before version 5, norms had the dtype of the other weights.
ADDED: dict[int, dict[str, Any]] = {
    3: {"funnel": dataclasses.asdict(FunnelConfig()) | {"strides": []}, "training": None},
    4: {"head": {"classifier_input": "last_token"}, "training": {"held_out": {}}, "quantized": {}},
    5: {
        "config": {
            "full_kv_heads": None,
            "full_head_dim": None,
            "activation": "gelu_tanh",
            "scale_embedding": True,
            "value_norm": False,
            "keys_as_values": False,
            "kv_shared_layers": 0,
            "double_wide_mlp": False,
            "per_layer_width": 0,
            "per_layer_vocab": 0,
            "layer_scalar": False,
        },
        "funnel": {"keep_last": False},
    },
    6: {"head": {"classifier_dense": None}},
    7: {"config": {"attention_bias": False, "mlp_bias": False}},
}
MANIFEST = "funnel.json"
SHARD_BYTES = 4_900_000_000  # bytes of tensors in a file; with its header it stays below 5 GB


@dataclasses.dataclass(frozen=True)
class FileFacts:
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of a converted checkpoint.

    Attributes:
        format: a key of `formats.FORMATS`.
        files: the files that contained weights, those of an adapter and of its base included.
        dropped: how many tensors were left out, by the rule for leaving them out.
    """

    format: str
    files: dict[str, FileFacts]
    dropped: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of funnel.json. A change that older engines cannot read needs a new `version`.

    Attributes:
        dtype: one of `weights.DTYPES`; `weights.tensor_types` says what dtype each tensor has.
        quantized: see `SourceModel`.
        funnel: the funnel that the model is meant to run with; `Engine.load` uses it.
        training: how the weights were trained for this funnel; None if they were not.
        tensors, parameters: their numbers, for people; the required tensors follow from `config` and `head`.
        text: how texts are prepared.
        tokenizer: file name of the tokenizer, or None.
        files: every file except this one, by name.
    """

    version: int
    config: EncoderConfig
    head: HeadConfig
    text: TextConfig
    funnel: Funnel
    training: TrainingRecord | None
    dtype: str
    quantized: dict[str, int]
    tensors: int
    parameters: int
    tokenizer: str | None
    files: dict[str, FileFacts]
    source: Source

    def __post_init__(self) -> None:
        set_field(self, "funnel", read_funnel(self.funnel))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose weights are mapped into memory: read-only arrays, read from disk when first used."""

    manifest: Manifest
    weights: Mapping[str, Any]
    tokenizer_file: Path | None

    @property
    def config(self) -> EncoderConfig:
        return self.manifest.config

    @property
    def head(self) -> HeadConfig:
        return self.manifest.head

    @property
    def dtype(self) -> str:
        return self.manifest.dtype


def matches(path: Path) -> bool:
    return is_file(path / MANIFEST)


def read_checkpoint(path: str | os.PathLike[str], *, verify: bool = False) -> Checkpoint:
    """Opens a directory that `convert` wrote, without reading the weights, except for the scales of matrices of 8 bits.

    Args:
        verify: read every file and compare its SHA-256 with the manifest's. Sizes are always compared.

    Raises:
        CheckpointError: it is not a checkpoint, is not complete, or has another version.
    """
    directory = to_path(path)
    with reading(directory):
        manifest, files = open_checkpoint(directory)
        if verify:
            verify_files(files, manifest)
        tensors = read_shards(directory, manifest, files)
        mapped: dict[str, np.ndarray] = {}
        for file in shards(files):
            mapped |= map_tensors(file, {name: tensor for name, tensor in tensors.items() if tensor.path == file})
    weights = join_scales(mapped)
    return Checkpoint(
        manifest=manifest,
        weights={name: weights[name] for name in expected_shapes(manifest.config, manifest.head)},
        tokenizer_file=files[manifest.tokenizer] if manifest.tokenizer else None,
    )


def open_checkpoint(directory: Path) -> tuple[Manifest, dict[str, Path]]:
    """The manifest and the files that it lists, after a check that all of them exist and have the right sizes."""
    if not matches(directory):
        raise CheckpointError(
            f"{directory} is not a checkpoint of this engine: it has no {MANIFEST}. "
            f"Make one with: funnel convert {directory} NEW"
        )
    manifest_file = file_in(directory, MANIFEST, str(directory))
    manifest = read_manifest(manifest_file)
    files = {name: file_in(directory, name, str(manifest_file)) for name in manifest.files}
    for name, file in files.items():
        size, expected = file.stat().st_size if is_file(file) else None, manifest.files[name].bytes
        if size is None:
            raise CheckpointError(
                f"{file} is missing{unfinished_downloads(directory)}; copy or convert the checkpoint again"
            )
        if size != expected:
            check_file(file)  # recognizes what is often found instead of a file
            raise CheckpointError(
                f"{file} is {'truncated' if size < expected else 'damaged'}: it has {size:,} bytes, but the "
                f"manifest says {expected:,}. Copy or convert the checkpoint again"
            )
    return manifest, files


def read_manifest(path: Path) -> Manifest:
    fields = read_json(path)
    version = fields.get("version")
    readable = range(min(ADDED) - 1, VERSION + 1)
    if type(version) is not int or version not in readable:
        raise CheckpointError(
            f"{path} has version {version!r}; this engine reads versions {readable[0]} to {readable[-1]}. Convert the "
            "source again"
        )
    for added in range(version + 1, VERSION + 1):
        fields = with_missing(fields, ADDED[added])
    with reading(path):
        manifest: Manifest = decode(Manifest, fields, str(path))
        expected_shapes(manifest.config, manifest.head)
        check_funnel(manifest.config, manifest.funnel)
    if manifest.dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: dtype is {manifest.dtype!r}; it must be {' or '.join(DTYPES)}. Convert the source again"
        )
    check_text_ids(path, manifest.text, manifest.config)
    if manifest.tokenizer not in (None, *manifest.files):
        raise CheckpointError(
            f"{path}: tokenizer {manifest.tokenizer!r} is not one of its files. Convert the source again"
        )
    return manifest


def with_missing(fields: Any, added: Any) -> Any:
    """The fields, and those of `added` that are missing in them, at any depth, and in all items of a list.

    Those of a funnel are added to each class of a funnel by length.
    """
    if isinstance(fields, list):
        return [with_missing(item, added) for item in fields]
    if not isinstance(fields, dict) or not isinstance(added, dict):
        return fields
    if "classes" in fields:
        return fields | {"classes": with_missing(fields["classes"], added)}
    return added | {name: with_missing(value, added.get(name)) for name, value in fields.items()}


def check_text_ids(where: Path, text: TextConfig, config: EncoderConfig) -> None:
    """Raises `CheckpointError` unless the ids before and after every text are in the vocabulary."""
    for name in ("begin", "end"):
        identifier = getattr(text, name)
        if identifier is not None and not 0 <= identifier < config.vocab_size:
            raise CheckpointError(
                f"{where}: every text gets {name}={identifier}, but ids must be from 0 to {config.vocab_size - 1}; "
                "use the model's own tokenizer and convert again"
            )


def shards(files: Mapping[str, Path]) -> list[Path]:
    return [file for name, file in files.items() if name.endswith(".safetensors")]


def read_shards(directory: Path, manifest: Manifest, files: Mapping[str, Path]) -> dict[str, StoredTensor]:
    """The tensors of all shards, after a check that they are those of the config and that none is in two shards.

    Scales are read and checked too.
    """
    tensors = join_shards(directory, shards(files), read_header)
    types = tensor_types(expected_shapes(manifest.config, manifest.head), manifest.dtype)
    dtypes = {tensor.dtype.name for tensor in types.values()}
    check_tensors(directory, {name: tensor.shape for name, tensor in types.items()}, tensors, tuple(sorted(dtypes)))
    for name, tensor in tensors.items():
        if tensor.dtype != types[name].dtype.name and not (is_norm(name) and tensor.dtype in ACTIVATIONS):
            raise CheckpointError(
                f"{tensor.path}: {name} is {tensor.dtype}, but it must be {types[name].dtype.name} in a checkpoint "
                f"whose dtype is {manifest.dtype}; convert the source again"
            )
        if name.endswith(SCALE) and not is_scale(tensor.read((), 0, tensor.shape[0])):
            raise CheckpointError(
                f"{tensor.path} is damaged: {name} contains NaN, infinity or a negative number; copy or convert the "
                "checkpoint again"
            )
    return tensors


def is_scale(values: np.ndarray) -> bool:
    """Whether all values are finite and not negative."""
    return bool((np.isfinite(values) & (values >= 0)).all())


def verify_files(files: Mapping[str, Path], manifest: Manifest) -> None:
    """Raises `CheckpointError` if the content of a file has changed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = dict(zip(files, pool.map(hash_file, files.values()), strict=True))
    damaged = [str(files[name]) for name, digest in digests.items() if digest != manifest.files[name].sha256]
    if damaged:
        raise CheckpointError(
            f"the SHA-256 of {', '.join(abbreviate(damaged))} differs from the manifest; copy or convert the "
            "checkpoint again"
        )


def read_source(directory: Path, sliding_window: int | None = None) -> SourceModel:
    """Reads a checkpoint in our format as a source, to write it again with another dtype.

    Raises:
        CheckpointError: see `read_checkpoint`; or a sliding window is given, which is only possible for other formats.
    """
    manifest, files = open_checkpoint(directory)
    if sliding_window is not None:
        raise CheckpointError(f"{directory} is already converted; give the sliding window when converting its source")
    shapes = expected_shapes(manifest.config, manifest.head)
    parts = {name: (Part(name, shape),) for name, shape in shapes.items()}
    tensors = join_scales(read_shards(directory, manifest, files), DequantizedTensor)
    weights, dropped = assemble(directory, parts, tensors, dtypes=(*ACTIVATIONS, *WITH_SCALES))
    matrices = sum(tensor.dtype in WITH_SCALES for tensor in tensors.values())
    return SourceModel(
        format="funnel",
        config=manifest.config,
        head=manifest.head,
        weights=weights,
        dropped=dropped,
        text=manifest.text,
        tokenizer_file=files[manifest.tokenizer] if manifest.tokenizer else None,
        directory=directory,
        funnel=manifest.funnel,
        training=manifest.training,
        quantized=manifest.quantized | ({manifest.dtype: matrices} if matrices else {}),
    )


def write_checkpoint(
    directory: Path,
    model: SourceModel,
    dtype: str,
    *,
    allow_nonfinite: bool = False,
    advance: Callable[[int], Any] = lambda size: None,
) -> None:
    """Writes `model` as a new directory and waits until it is on the disk; the manifest is written last.

    Memory contains one piece of a tensor at a time, or one tensor if it must be transposed.

    Args:
        dtype: the dtype to which the weights are rounded (to nearest, ties to even).
        allow_nonfinite: accept NaN and infinity.
        advance: called with the number of bytes after each piece.

    Raises:
        CheckpointError: the source cannot be read, or a weight is not finite in `dtype`.
        OSError: the directory exists or cannot be written.
    """
    shapes = expected_shapes(model.config, model.head)
    types = tensor_types(shapes, dtype)
    directory.mkdir()
    files = {}
    values: dict[str, Iterator[np.ndarray]] = {}
    for name, shape in shapes.items():
        if name + SCALE in types:
            values[name], values[name + SCALE] = quantized(model.weights[name], shape[1], dtype)
        else:
            values[name] = rounded(model.weights[name], types[name].dtype, allow_nonfinite)
    with hashing(model.files) as source_files:
        for name, part in plan_shards(types).items():
            digest = write_tensors(directory / name, part, values, advance)
            files[name] = FileFacts((directory / name).stat().st_size, digest)
        hashed = source_files.result()
    tokenizer = None
    if model.tokenizer_json is not None:
        tokenizer = "tokenizer.json"
        (directory / tokenizer).write_text(model.tokenizer_json, encoding="utf-8")
    elif model.tokenizer_file is not None:
        tokenizer = "tokenizer.json" if model.tokenizer_file.suffix == ".json" else "tokenizer.model"
        shutil.copyfile(model.tokenizer_file, directory / tokenizer)
    if tokenizer is not None:
        synchronize(directory / tokenizer)
        files[tokenizer] = file_facts(directory / tokenizer)
    manifest = Manifest(
        version=VERSION,
        config=model.config,
        head=model.head,
        text=model.text,
        funnel=model.funnel,
        training=model.training,
        dtype=dtype,
        quantized=model.quantized,
        tensors=len(types),
        parameters=count_parameters(shapes),
        tokenizer=tokenizer,
        files=files,
        source=Source(
            model.format,
            {model.name_of(file): facts for file, facts in hashed.items()},
            model.dropped,
        ),
    )
    (directory / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
    synchronize(directory / MANIFEST)
    synchronize(directory)


def plan_shards(types: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The tensors of each file. A file is larger than 5 GB only if a single tensor is."""
    groups: list[dict[str, jax.ShapeDtypeStruct]] = []
    total = 0
    for name, tensor in types.items():
        size = tensor.size * tensor.dtype.itemsize
        total += size
        if not groups or total > SHARD_BYTES:
            groups.append({})
            total = size
        groups[-1][name] = tensor
    if len(groups) == 1:
        return {"weights.safetensors": groups[0]}
    return {f"weights-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def quantized(
    parts: tuple[Rows, ...], in_features: int, dtype: str
) -> tuple[Iterator[np.ndarray], Iterator[np.ndarray]]:
    """The values of 8 bits of a matrix in pieces, and the scales of its rows, to be read after all values."""
    scales: list[np.ndarray] = []

    def values() -> Iterator[np.ndarray]:
        for piece in rounded(parts, DTYPES["float32"], allow_nonfinite=False):
            matrix = quantize(piece.reshape(-1, in_features), dtype)
            scales.append(matrix.scale)
            yield matrix.values

    return values(), iter(scales)


def rounded(parts: tuple[Rows, ...], dtype: np.dtype, allow_nonfinite: bool) -> Iterator[np.ndarray]:
    """The values of source tensors, one after another, in pieces of `dtype`."""
    for rows in parts:
        for piece in rows.pieces():
            with np.errstate(over="ignore", invalid="ignore"):
                values = piece.astype(dtype, copy=False)
            if not allow_nonfinite and not np.isfinite(values.astype(np.float32, copy=False)).all():
                raise CheckpointError(
                    f"tensor {rows.tensor.name} in {rows.tensor.path} contains NaN, infinity or a value too large for "
                    f"{dtype}; the model is broken, so train or fetch it again (--allow-nonfinite accepts it, but not "
                    "for 8 bits)"
                )
            yield values


@contextlib.contextmanager
def hashing(files: list[Path]) -> Iterator[Future[dict[Path, FileFacts]]]:
    """Hashes files in another thread; hashing stops when the context ends."""
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(lambda: {file: file_facts(file, stopped.is_set) for file in files})
        finally:
            stopped.set()


def file_facts(file: Path, stop: Callable[[], bool] = lambda: False) -> FileFacts:
    with reading(file):
        return FileFacts(file.stat().st_size, hash_file(file, stop))


def synchronize(path: Path) -> None:
    """Waits until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
