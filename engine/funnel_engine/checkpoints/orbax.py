"""Reads DeepMind's Flax checkpoints of Gemma and T5Gemma in Orbax format (https://github.com/google/orbax).

Such a checkpoint is a folder of zarr arrays: each in its own folder, or all in one OCDBT database. The name of an array
is its path in the tree of parameters, joined by dots. An array contains its own shape and dtype, so Orbax's metadata is
not read. `find_parameters` maps the arrays of every layout to one set of names:

    layout     an array                                                our name for it
    FLAT       transformer/layer_1/mlp/linear.w                        layer_1/mlp/linear
    NESTED     layer_1.mlp.linear                                      the same
    KAULDRON   params.layer_1.mlp.linear                               the same
    STACKED    transformer/stacked_layers/attention_type_1/mlp/linear.w    layer_1/mlp/linear, layer_7/mlp/linear, ...
"""

import collections
import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from funnel_engine.checkpoints.architectures import find_config, is_embedding_gemma
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.checkpoints.tensors import Part, Parts, assemble, drop_by_name
from funnel_engine.checkpoints.tokenizer_files import find_tokenizer
from funnel_engine.config import ModelConfig
from funnel_engine.heads import DenseConfig, HeadConfig
from funnel_engine.hugging_face_config.fields import MAX_LAYERS
from funnel_engine.input_files import HEAD_BYTES, file_in, is_file, optional_file, reading, refuse_replacement
from funnel_engine.messages import quote
from funnel_engine.text import TextConfig
from funnel_engine.weights import expected_shapes
from funnel_kernels.errors import CheckpointError

DATABASE = "manifest.ocdbt"
TREE = "_METADATA"  # is in a folder of arrays
AGGREGATE = "checkpoint"  # is in a folder of arrays of Orbax before 2024
DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}  # file that describes an array -> driver of tensorstore
ITEMS = ("default", "params")  # folders of the parameters, if a step has other items too
DEPTH = 2  # levels between the given folder and the arrays: step/item
CONFIG = "config.json"
UNLIMITED = 2**62  # bytes

PREFIXES = ("params/", "rlx_networks/policy_network/", "transformer/")  # training state, post-training, layout FLAT
STACKED = re.compile(r"(?P<root>.*)stacked_layers/attention_type_(?P<kind>[0-9]{1,3})/(?P<leaf>.*)")
EMBEDDING = "embedder/input_embedding"
ENCODER = "encoder/"  # in T5Gemma
DROPPED = drop_by_name(
    (
        "decoder/",
        "SigLiPFromPatches_0/",
        "vision_encoder/",
        "embedder/mm_input_projection",
        "embedder/mm_soft_embedding_norm/",
        "embedder/mm_input_embedding_extra",
        "embedder/mm_output_embedding",
        "opt_state/",
        "collections/",
        "step",
    )
)
NORMS = {  # ours -> Flax's, without "/scale"
    "attention_input_norm": "pre_attention_norm",
    "attention_output_norm": "post_attention_norm",
    "mlp_input_norm": "pre_ffw_norm",
    "mlp_output_norm": "post_ffw_norm",
    "query_norm": "attn/_query_norm",
    "key_norm": "attn/_key_norm",
}


def matches(path: Path) -> bool:
    """Whether a folder, or a step or an item in it, contains arrays in Orbax format."""
    return path.is_dir() and not any(path.glob("*.safetensors")) and bool(find_folders(path))


def read_orbax(root: Path, sliding_window: int | None = None) -> SourceModel:
    """Reads a checkpoint without the values of its arrays.

    Args:
        root: the folder of the arrays, or a folder above it without other checkpoints. config.json must be in one of
            these folders. The tokenizer may also be in the folder above `root`, as on Kaggle.
        sliding_window: replaces the value in config.json.

    Raises:
        CheckpointError: there is no checkpoint or several, arrays are damaged or do not fit, the architecture is
            unknown, or tensorstore, which reads zarr, is not installed.
    """
    folder = choose_folder(root)
    check_files(folder)
    tensors = find_parameters(ArrayFolder(folder))
    table = next((name for name in (EMBEDDING, ENCODER + EMBEDDING) if name in tensors), None)
    if table is None or len(tensors[table].shape) != 2:
        raise CheckpointError(
            f"{folder} is not a checkpoint of Gemma or T5Gemma: it has no matrix {EMBEDDING!r}; the names of its "
            f"{len(tensors)} parameters are {quote(sorted(tensors))}"
        )
    vocabulary = tensors[table].shape[0]
    folders = [folder, *(above for above in folder.parents if above == root or root in above.parents)]
    config_folder = next((parent for parent in folders if optional_file(parent, CONFIG)), None)
    config = find_config(
        config_folder or folder, tensors, lambda config: encoder_parts(config, tensors), vocabulary, sliding_window
    )
    parts = encoder_parts(config, tensors)
    head, dense = read_head(config, parts, tensors)
    weights, dropped = assemble(folder, {**parts, **dense}, tensors, DROPPED)
    if is_embedding_gemma(config) and not dense and config_folder is None:
        raise CheckpointError(
            f"{folder} has EmbeddingGemma's encoder but not its two dense layers, without which its vectors are "
            f"useless; to convert only the encoder, put a Hugging Face {CONFIG} into this folder"
        )
    if vocabulary > config.vocab_size:
        dropped[f"rows of {table} beyond the vocabulary"] = vocabulary - config.vocab_size
    if folder == root:
        folders.append(root.absolute().parent)
    tokenizers = (find_tokenizer(parent, config) for parent in folders)
    text, tokenizer_file = next((found for found in tokenizers if found[1]), (TextConfig(), None))
    return SourceModel(
        format="orbax",
        config=config,
        head=head,
        weights=weights,
        dropped=dropped,
        text=text,
        tokenizer_file=tokenizer_file,
        directory=root,
    )


def choose_folder(root: Path) -> Path:
    """The one folder of arrays at or below `root`."""
    folders = find_folders(root) if root.is_dir() else []
    if not folders:
        raise CheckpointError(
            f"{root} is not a folder with an Orbax checkpoint: neither it nor a step or an item in it has "
            f"{DATABASE} or {TREE}; give the folder that has one of them"
        )
    if len(folders) > 1:
        names = quote(str(folder.relative_to(root)) for folder in folders)
        raise CheckpointError(f"{root} contains several checkpoints: {names}; give one of them")
    return folders[0]


def find_folders(path: Path, depth: int = DEPTH) -> list[Path]:
    """The folders of arrays at or below `path`; if a step has several items, only those of the parameters."""
    if is_file(path / DATABASE) or is_file(path / TREE):
        return [path]
    if is_file(path / AGGREGATE) and any(path.rglob(".zarray")):
        return [path]
    names: list[str] = []
    if depth > 0:
        with contextlib.suppress(PermissionError), os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    below = [folder for name in names for folder in find_folders(path / name, depth - 1)]
    return [folder for folder in below if folder.parent == path and folder.name in ITEMS] or below


def check_files(folder: Path) -> None:
    """Checks every file in a folder and in its subfolders.

    Raises:
        CheckpointError: there is a link that leaves the folder, a link to a folder, or a pipe, which would block.
    """
    with reading(folder):
        names = sorted(os.listdir(folder))
    for name in names:
        path = file_in(folder, name, str(folder))
        if path.is_dir() and not path.is_symlink():
            check_files(path)
        elif not path.is_file():
            raise CheckpointError(f"{path} is neither a file nor a folder; copy the checkpoint again")
        else:
            with reading(path), path.open("rb") as file:
                refuse_replacement(path, file.read(HEAD_BYTES))


class ArrayFolder:
    """The zarr arrays in a folder. The array that was read last stays open, with its decoded chunks.

    A chunk can only be decoded as a whole, and most arrays are one chunk. If the array were closed, reading a few rows
    would decode the whole array again. tensorstore refuses keys with "..", so no path in a database leaves the folder.

    Attributes:
        drivers: the tensorstore driver of each array, by its name.
    """

    def __init__(self, path: Path):
        try:
            import tensorstore
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"{path} is an Orbax checkpoint; to read it, run: pip install 'funnel-engine[orbax]'"
            ) from error
        self.path = path
        self.tensorstore = tensorstore
        self.files = {"driver": "file", "path": f"{path.resolve()}/"}
        self.drivers = self.read_drivers()
        self.known_facts: dict[str, tuple[tuple[int, ...], str]] = {}
        self.open_array: tuple[str, Any] = ("", None)  # name, and the array itself

    @contextlib.contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Turns exceptions of tensorstore, which have many types, into `CheckpointError`."""
        try:
            yield
        except Exception as error:
            reason = str(error).partition(" [")[0]  # without the position in tensorstore's source code
            raise CheckpointError(
                f"cannot read {what} in {self.path}: {reason}. The checkpoint is damaged, so fetch it again"
            ) from error

    def key_value_store(self, prefix: str) -> dict[str, Any]:
        """The key-value store of the keys that begin with a prefix."""
        if is_file(self.path / DATABASE):
            return {"driver": "ocdbt", "base": self.files, "path": prefix}
        return self.files | {"path": self.files["path"] + prefix}

    def read_drivers(self) -> dict[str, str]:
        with self.reading("the list of arrays"):
            keys = self.tensorstore.KvStore.open(self.key_value_store("")).result().list().result()
            described = [key.decode().rpartition("/") for key in sorted(keys)]
        return {name: DRIVERS[file] for name, _, file in described if name and file in DRIVERS}

    def open(self, name: str) -> Any:
        """Opens an array as a `tensorstore.TensorStore`. A missing chunk is an error and is not read as zeros."""
        spec = {
            "driver": self.drivers[name],
            "kvstore": self.key_value_store(f"{name}/"),
            "fill_missing_data_reads": False,
            "recheck_cached_data": False,
            "context": {"cache_pool": {"total_bytes_limit": UNLIMITED}},
        }
        return self.tensorstore.open(spec, open=True, read=True).result()

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """The shape and dtype of an array. Chunks larger than the array are refused; they could fill the memory."""
        if name not in self.known_facts:
            with self.reading(f"array {name!r}"):
                array = self.open(name)
                shape, dtype = tuple(array.shape), array.dtype.name
                layout = array.chunk_layout
                chunks = [tuple(chunk or ()) for chunk in (layout.read_chunk.shape, layout.write_chunk.shape)]
            if any(size > max(length, 1) for chunk in chunks for size, length in zip(chunk, shape, strict=True)):
                raise CheckpointError(
                    f"array {name!r} in {self.path} has chunks of {chunks[1]}, larger than its shape {shape}, which "
                    "Orbax does not write; save the checkpoint again"
                )
            self.known_facts[name] = shape, dtype
        return self.known_facts[name]

    def read(self, name: str, index: tuple[int | slice, ...]) -> np.ndarray:
        with self.reading(f"array {name!r}"):
            if self.open_array[0] != name:
                self.open_array = ("", None)  # frees its memory before the next array is opened
                self.open_array = (name, self.open(name))
            values: np.ndarray = self.open_array[1][index].read().result()
            return values


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An array, or the part of an array at some leading indices (a `tensors.SourceTensor`)."""

    name: str
    folder: ArrayFolder
    array: str
    at: tuple[int, ...] = ()

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.folder.facts(self.array)[0][len(self.at) :]

    @property
    def dtype(self) -> str:
        return self.folder.facts(self.array)[1]

    def read(self, at: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """`tensor[at][start:stop]`.

        Raises:
            CheckpointError: the array is damaged, or a part of it is missing.
        """
        return self.folder.read(self.array, (*self.at, *at, slice(start, stop)))


def find_parameters(folder: ArrayFolder) -> dict[str, Parameter]:
    """The parameters of any layout by the names of the layout NESTED, with "/" between the keys (see above).

    Raises:
        CheckpointError: two arrays are the same parameter, or an array is not a stack of layers but should be.
    """
    names = {array: plain_name(array) for array in folder.drivers}
    stacked = {array: match for array, name in names.items() if not DROPPED(name) and (match := STACKED.match(name))}
    period = 1 + max((int(match["kind"]) for match in stacked.values()), default=0)
    found = [Parameter(name, folder, array) for array, name in names.items() if array not in stacked]
    for array, match in stacked.items():
        shape, _ = folder.facts(array)
        if not shape or shape[0] * period > MAX_LAYERS:
            raise CheckpointError(
                f"{array!r} in {folder.path} has shape {shape}, which is not a stack of at most {MAX_LAYERS} layers. "
                "Fetch it again"
            )
        for index in range(shape[0]):
            layer = f"layer_{index * period + int(match['kind'])}"
            found.append(Parameter(f"{match['root']}{layer}/{match['leaf']}", folder, array, (index,)))
    name, times = collections.Counter(parameter.name for parameter in found).most_common(1)[0] if found else ("", 0)
    if times > 1:
        raise CheckpointError(f"{folder.path} contains {name!r} {times} times; save only the model")
    return {parameter.name: parameter for parameter in found}


def plain_name(name: str) -> str:
    name = name.replace(".", "/")
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name.removesuffix("/w")


def encoder_parts(config: ModelConfig, tensors: Mapping[str, Parameter]) -> Parts:
    """For each of our encoder weights, the tensors that contain its rows, in the form that this checkpoint has.

    Axes: D model width, F intermediate size, N query heads, K key/value heads, H head width.
    """
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_heads, config.num_kv_heads
    if D == F:
        raise CheckpointError(
            f"hidden_size and intermediate_size are both {D}, so the two forms of gating_einsum cannot be told apart; "
            "convert this model from another format"
        )
    root = ENCODER if config.family == "t5gemma" else ""
    table = tensors.get(root + EMBEDDING)
    rows = max(config.vocab_size, table.shape[0] if table and table.shape else 0)  # more than vocab_size: padding
    parts: dict[str, tuple[Part, ...]] = {
        "embedding": (Part(root + EMBEDDING, (rows, D), rows=config.vocab_size),),
        "final_norm": (Part(f"{root}final_norm/scale", (D,)),),
    }
    for index in range(config.num_layers):
        block = f"{root}layer_{index}/"
        fused, gating = f"{block}attn/qkv_einsum", f"{block}mlp/gating_einsum"
        if fused in tensors:
            qkv = tuple(Part(fused, (3, N, D, H), (which,), (0, 2, 1)) for which in range(3))
        else:
            pair = tuple(Part(f"{block}attn/kv_einsum", (2, K, D, H), (which,), (0, 2, 1)) for which in range(2))
            qkv = (Part(f"{block}attn/q_einsum", (N, D, H), axes=(0, 2, 1)), *pair)
        if gating in tensors and tensors[gating].shape == (2, D, F):
            gate_up = tuple(Part(gating, (2, D, F), (which,), (1, 0)) for which in range(2))
        else:
            gate_up = tuple(Part(gating, (2, F, D), (which,)) for which in range(2))
        layer: dict[str, tuple[Part, ...]] = {
            "qkv": qkv,
            "attention_output": (Part(f"{block}attn/attn_vec_einsum", (N, H, D), axes=(2, 0, 1)),),
            "gate_up": gate_up,
            "down": (Part(f"{block}mlp/linear", (F, D), axes=(1, 0)),),
        }
        for ours, theirs in NORMS.items():
            layer[ours] = (Part(f"{block}{theirs}/scale", (H,) if "/" in theirs else (D,)),)
        parts |= {f"layers.{index}.{name}": layer_parts for name, layer_parts in layer.items()}
    return {name: parts[name] for name in expected_shapes(config, HeadConfig())}


def read_head(config: ModelConfig, encoder: Parts, tensors: Mapping[str, Parameter]) -> tuple[HeadConfig, Parts]:
    """EmbeddingGemma's two dense layers D -> X -> D: the only other parameters, stored as [in, out], sorted by name."""
    needed = {part.name for parts in encoder.values() for part in parts}
    others = [name for name in sorted(tensors) if name not in needed and not DROPPED(name)]
    inside = any(name.startswith(("layer_", "embedder/")) for name in others)
    if not is_embedding_gemma(config) or len(others) != 2 or inside:
        return HeadConfig(), {}
    first, second = (tensors[name].shape for name in others)
    if len(first) != 2 or 0 in first or first[0] != config.hidden_size or second != first[::-1]:
        return HeadConfig(), {}
    dense = tuple(DenseConfig(out_features, in_features) for in_features, out_features in (first, second))
    weights = {f"dense.{i}.weight": (Part(name, tensors[name].shape, axes=(1, 0)),) for i, name in enumerate(others)}
    return HeadConfig(dense=dense), weights
