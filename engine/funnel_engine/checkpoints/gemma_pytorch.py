"""Reads checkpoints of Google's gemma_pytorch (https://github.com/google/gemma_pytorch): a `.ckpt` file, or shards.

torch.save writes a zip with a pickle, which contains the names of the tensors, and the uncompressed bytes of each
tensor. torch unpickles it with `weights_only=True`, which only rebuilds tensors and plain values, and onto its "meta"
device, which reads no values but records the position of each one. The values are then read as from a safetensors file.

The names are gemma_pytorch's own: the query, key and value projections are one tensor, as in our format, and the norms
have the names of Hugging Face. A quantized model has an int8 `weight` and a `weight_scaler` with one factor per row; it
is dequantized to `weight * weight_scaler`. The file does not contain the architecture; see `architectures.find_config`.
"""

import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from funnel_engine.checkpoints.architectures import find_config
from funnel_engine.checkpoints.hugging_face import NORMS
from funnel_engine.checkpoints.safetensors_file import WITH_SCALES, DequantizedTensor, StoredTensor
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.checkpoints.tensors import (
    FLOAT_DTYPES,
    Part,
    Parts,
    SourceTensor,
    assemble,
    drop_by_name,
    join_shards,
    unwrap,
    unwrapped,
)
from funnel_engine.checkpoints.tokenizer_files import find_tokenizer
from funnel_engine.config import ModelConfig
from funnel_engine.heads import HeadConfig
from funnel_engine.input_files import decode, file_in, is_file, open_file, optional_file, read_json
from funnel_engine.messages import quote
from funnel_engine.weights import expected_shapes
from funnel_kernels.errors import CheckpointError

INDEX = "pytorch_model.bin.index.json"  # the index of shards; the name comes from Hugging Face
SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
MAX_BYTE_ORDER = 16  # bytes of a file with the word "little" or "big"
MAX_PICKLE_BYTES = 1_000_000  # a model with 62 layers has about 120,000
MAX_TUPLE = 1000  # values, with those in nested tuples; a tensor needs about 20
# Pickle operations that add values to the object below them on the stack. All others make a new object.
FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")

# Our names -> gemma_pytorch's, without ".weight".
EMBEDDERS = ("embedder", "text_token_embedder")  # the second is for multimodal Gemma 3
LAYER: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.qkv_proj",),
    "query_norm": ("self_attn.query_norm",),
    "key_norm": ("self_attn.key_norm",),
    "attention_output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
# RoPE tables, and the image encoder of multimodal Gemma 3.
DROPPED = drop_by_name(
    (
        "freqs_cis",
        "local_freqs_cis",
        "global_freqs_cis",
        "siglip_vision_model.",
        "mm_soft_embedding_norm.",
        "mm_input_projection.",
    )
)


def matches(path: Path) -> bool:
    """Whether `path` is a PyTorch file, or a folder with a `.ckpt` or shards and without safetensors."""
    if not path.is_dir():
        return path.suffix in SUFFIXES
    return (any(path.glob("*.ckpt")) or is_file(path / INDEX)) and not any(path.glob("*.safetensors"))


def read_gemma_pytorch(path: Path, sliding_window: int | None = None) -> SourceModel:
    """Reads a checkpoint without the values of its tensors.

    Args:
        path: the file, or a folder with exactly one `.ckpt`, or with shards and their index.
        sliding_window: replaces the value in config.json.

    Raises:
        CheckpointError: a file is damaged, contains code, or was written by another program; files or tensors are
            missing or do not fit the config; torch is not installed.
    """
    tensors = dequantize(unwrap(path, read_tensors(path)))
    if any(name.endswith("embed_tokens.weight") for name in tensors):
        raise CheckpointError(
            f"{path} is a Hugging Face pytorch_model.bin, not gemma_pytorch's; load it with transformers and save it "
            "with save_pretrained, which writes safetensors"
        )
    names = [f"{name}.weight" for name in EMBEDDERS if f"{name}.weight" in tensors]
    if len(names) != 1 or len(tensors[names[0]].shape) != 2 or not all(tensors[names[0]].shape):
        raise CheckpointError(
            f"{path} is not a gemma_pytorch checkpoint: it must have one matrix embedder.weight or "
            f"text_token_embedder.weight; the names of its {len(tensors)} tensors are {quote(tensors)}"
        )
    (embedder,) = names
    directory = path if path.is_dir() else path.parent
    vocabulary = tensors[embedder].shape[0]
    config = find_config(directory, tensors, lambda config: encoder_parts(config, embedder), vocabulary, sliding_window)
    dtypes = (*FLOAT_DTYPES, *WITH_SCALES)
    weights, dropped = assemble(path, encoder_parts(config, embedder), tensors, DROPPED, dtypes)
    text, tokenizer_file = find_tokenizer(directory, config)
    return SourceModel(
        format="gemma_pytorch",
        config=config,
        head=HeadConfig(),
        weights=weights,
        dropped=dropped,
        text=text,
        tokenizer_file=tokenizer_file,
        directory=directory,
    )


def encoder_parts(config: ModelConfig, embedder: str) -> Parts:
    """For each of our weights, the tensors that contain its rows, in order."""
    outer = {"embedding": embedder, "final_norm": "model.norm.weight"}
    layer = LAYER | NORMS[config.family]
    parts = {}
    for ours, shape in expected_shapes(config, HeadConfig()).items():
        block, _, leaf = ours.rpartition(".")  # "layers.3" and "qkv", or "" and "embedding"
        names = [f"model.{block}.{name}.weight" for name in layer[leaf]] if block else [outer[leaf]]
        parts[ours] = tuple(Part(name, (shape[0] // len(names), *shape[1:])) for name in names)
    return parts


def dequantize(tensors: dict[str, StoredTensor]) -> dict[str, SourceTensor]:
    """Joins every int8 matrix with its factors. Tensors that do not match stay separate and are refused later."""
    joined: dict[str, SourceTensor] = dict(tensors)
    for name, scaler in tensors.items():
        weight = tensors.get(name.removesuffix("_scaler")) if name.endswith(".weight_scaler") else None
        if weight is None or weight.dtype != "int8" or len(weight.shape) != 2:
            continue
        if scaler.shape == weight.shape[:1] and scaler.dtype in FLOAT_DTYPES:
            joined[weight.name] = DequantizedTensor(weight, scaler)
            del joined[name]
    return joined


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, of the only `.ckpt` of a folder, or of the shards that its index lists."""
    if not path.is_dir():
        return read_file(path)
    checkpoints = sorted(file.name for file in path.glob("*.ckpt"))
    if len(checkpoints) > 1:
        raise CheckpointError(f"{path} has several checkpoints, {quote(checkpoints)}; give the path of one of them")
    if checkpoints:
        return read_file(file_in(path, checkpoints[0], str(path)))
    index = optional_file(path, INDEX)
    if index is None:
        raise CheckpointError(f"{path} has neither a .ckpt nor {INDEX}; give the path of the checkpoint's file")
    weight_map = decode(dict[str, str], read_json(index).get("weight_map"), f"{index}: weight_map")
    files = [file_in(path, shard, str(index)) for shard in sorted(set(weight_map.values()))]
    return join_shards(index, files, read_file, weight_map.items(), drop_rule=lambda name: DROPPED(unwrapped(name)))


def read_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, without their values.

    Raises:
        CheckpointError: the file does not exist, is damaged or too old, or contains code; torch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{file} is a PyTorch checkpoint; to read it, run: pip install 'funnel-engine[torch]'"
        ) from error
    try:
        with open_file(file) as raw:
            records = find_records(file, raw)
        check_tuples(file, torch._C.PyTorchFileReader(str(file)).get_record("data.pkl"))
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if unsafe:
            raise CheckpointError(
                f"{file} was not opened: its pickle would run code ({quote(map(str, unsafe))}), but a checkpoint must "
                "contain only tensors. Get it as safetensors, from a source that you trust"
            )
        content = torch.load(file, map_location="meta", weights_only=True)
        state = content.get("model_state_dict", content) if isinstance(content, dict) else content
        if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise CheckpointError(f"{file} is not a gemma_pytorch checkpoint: it has no model_state_dict of tensors")
        return {str(name): locate(file, str(name), tensor, records) for name, tensor in state.items()}
    except CheckpointError:
        raise
    except Exception as error:  # for damaged bytes, torch and zipfile may raise any exception
        raise CheckpointError(
            f"{file} is damaged, or not a checkpoint of tensors: {error!s:.300}. Fetch it again"
        ) from error


def find_records(file: Path, raw: BinaryIO) -> dict[int, int]:
    """The sizes in bytes of the files in a zip, by the offset where their content starts.

    Raises:
        CheckpointError: the file is not a zip, is compressed, or has another byte order (which would crash torch).
    """
    if not zipfile.is_zipfile(raw):
        raise CheckpointError(
            f"{file} is not a complete file of torch.save: it is damaged, or older than PyTorch 1.6. Fetch it again, "
            "or write it again: torch.save(torch.load(OLD, weights_only=True), NEW)"
        )
    records = {}
    with zipfile.ZipFile(raw) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{file} is compressed, which torch.save never does; fetch the original")
            if record.filename.lower().endswith("byteorder") and (
                record.file_size > MAX_BYTE_ORDER or archive.read(record) != b"little"
            ):
                raise CheckpointError(
                    f"the values of {file} are not little-endian; write it again on this machine: "
                    "torch.save(torch.load(OLD, weights_only=True), NEW)"
                )
            raw.seek(record.header_offset + 26)  # the header of 30 bytes ends in the lengths of name and extra field
            name_length, extra_length = struct.unpack("<HH", raw.read(4))
            records[record.header_offset + 30 + name_length + extra_length] = record.file_size
    return records


def check_tuples(file: Path, pickle: bytes) -> None:
    """Reads the operations of a pickle without running it, and checks the sizes of its tuples.

    `t = (t, t)`, repeated sixty times, takes a few hundred bytes. As the key of a dict, torch would hash it for years.

    Raises:
        CheckpointError: the pickle is longer, or has a larger tuple, than that of any checkpoint of tensors.
    """
    if len(pickle) > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{file} was not opened: its pickle has {len(pickle):,} bytes, but names of tensors need at most "
            f"{MAX_PICKLE_BYTES:,}. Save a checkpoint with only the tensors"
        )
    sizes: list[int] = []  # the number of values in each object on the stack
    marks: list[int] = []  # positions in the stack
    memo: dict[Any, int] = {}  # the sizes of stored objects
    for operation, argument, _ in pickletools.genops(pickle):
        if operation.name == "MARK":
            marks.append(len(sizes))
        elif "PUT" in operation.name:
            memo[argument] = sizes[-1]
        elif "GET" in operation.name:
            sizes.append(memo[argument])
        else:
            before = operation.stack_before  # what it takes from the stack: a number of objects, or all since a mark
            if pickletools.markobject in before:
                begin = marks.pop() - before.index(pickletools.markobject)
            else:
                begin = len(sizes) - len(before)
            taken = sizes[begin:]
            del sizes[begin:]
            if operation.stack_after:
                sizes.append(taken[0] if operation.name in FILLING else 1 + sum(taken))
                if sizes[-1] > MAX_TUPLE:
                    raise CheckpointError(
                        f"{file} was not opened: its pickle nests more values than the limit of {MAX_TUPLE:,} for a "
                        "tensor. Get the checkpoint as safetensors, from a source that you trust"
                    )


def locate(file: Path, name: str, tensor: Any, records: dict[int, int]) -> StoredTensor:
    """The position in its file of the values of a tensor on the "meta" device."""
    begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)  # where the tensor's storage starts
    if begin is None:
        raise CheckpointError(f"{file} needs torch 2.11 or newer; run: pip install --upgrade 'funnel-engine[torch]'")
    offset, size = (count * tensor.element_size() for count in (tensor.storage_offset(), tensor.numel()))
    if not tensor.is_contiguous():
        raise CheckpointError(
            f"{file}: the values of tensor {name!r} are not in order; save it again after .contiguous()"
        )
    if offset + size > records.get(begin, -1):
        raise CheckpointError(
            f"{file} is damaged, or was zipped again: the values of tensor {name!r} are not where torch.save writes "
            "them. Fetch the original"
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(file, name, dtype, tuple(tensor.shape), begin + offset, size)
