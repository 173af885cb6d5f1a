"""Safetensors files: strictly checked, mapped or read in pieces, and written and hashed in one pass.

A file contains the length of its header (8 bytes, little-endian), the header as JSON (name -> dtype, shape,
data_offsets), and then the bytes of all tensors, one after another without gaps
(https://github.com/huggingface/safetensors#format).
"""

import hashlib
import itertools
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import jax
import ml_dtypes
import numpy as np

from funnel_engine.input_files import open_file, parse_json, read_array, reading
from funnel_engine.weights import EIGHT_BITS, SCALE
from funnel_kernels.errors import CheckpointError

# The dtypes whose values can be read. A file may contain tensors of other dtypes if they are not needed.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
WITH_SCALES = tuple(f"{dtype} with scales" for dtype in EIGHT_BITS)
SPELLINGS = {dtype: spelling for spelling, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_AXES = 16  # of a tensor; limits the number of digits of its size
# On a CPU, JAX uses an array in place, without a copy, if its address is a multiple of this number of bytes.
ALIGNMENT = 64


class StoredTensor(NamedTuple):
    """A tensor in a file, not yet read (a `tensors.SourceTensor`). `start` and `size` are in bytes."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self, at: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """`tensor[at][start:stop]`.

        Raises:
            CheckpointError: the file cannot be read any more, or became shorter.
        """
        dtype, row_shape = np.dtype(self.dtype), self.shape[len(at) + 1 :]
        row = 0
        for index, size in zip((*at, start), self.shape, strict=False):
            row = row * size + index
        count = (stop - start) * math.prod(row_shape)
        start_byte = self.start + row * math.prod(row_shape) * dtype.itemsize
        values = read_array(self.path, start_byte, dtype, count)
        return values.reshape(stop - start, *row_shape)


class DequantizedTensor(NamedTuple):
    """A matrix of 8 bits with a scale for each row, which is read as float32 (a `tensors.SourceTensor`)."""

    weight: StoredTensor
    scale: StoredTensor

    @property
    def path(self) -> Path:
        return self.weight.path

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> str:
        return f"{self.weight.dtype} with scales"

    def read(self, at: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        assert at == (), "a quantized tensor is a matrix and is read by rows"
        scale = self.scale.read((), start, stop).astype(np.float32)
        return self.weight.read((), start, stop).astype(np.float32) * scale[:, None]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, without their values.

    Raises:
        CheckpointError: the file does not exist, is truncated or damaged, or is not a safetensors file.
    """
    with open_file(path) as file:
        file_size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(file_size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is not a complete safetensors file: its header would have {length:,} bytes, but the file has "
                f"{file_size:,} and the limit for a header is {MAX_HEADER_BYTES:,}. Fetch it again"
            )
        header = parse_json(file.read(length), path)
    tensors = {
        name: read_entry(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
    }
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != end:
            raise CheckpointError(
                f"{path} is damaged: tensor {tensor.name!r} starts at byte {tensor.start:,}, but the one before "
                f"it ends at byte {end:,}. Fetch it again"
            )
        end += tensor.size
    if end != file_size:
        raise CheckpointError(
            f"{path} is {'truncated' if end > file_size else 'damaged'}: its tensors end at byte {end:,}, but the file "
            f"has {file_size:,} bytes. Fetch it again"
        )
    return tensors


def read_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """One tensor of a header. If its dtype can be read, its size is compared with dtype and shape."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and is_naturals(shape) and is_naturals(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{path} is damaged: the entry of tensor {name!r} is {entry!r:.200}. Fetch it again")
    begin, end = offsets
    if begin > end or (dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize):
        raise CheckpointError(
            f"{path} is damaged: tensor {name!r} ({dtype} {shape!r:.80}) does not fit into bytes {begin} to {end}. "
            "Fetch it again"
        )
    name_of_dtype = DTYPES[dtype].name if dtype in DTYPES else f"safetensors {dtype}"
    return StoredTensor(path, name, name_of_dtype, tuple(shape), data_start + begin, end - begin)


def is_naturals(value: Any) -> TypeGuard[list[int]]:
    """Whether a value can be the shape or the offsets of a tensor: a short list of integers of at most 63 bits."""
    if not isinstance(value, list) or len(value) > MAX_AXES:
        return False
    return all(type(item) is int and 0 <= item < 2**63 for item in value)


def map_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, np.ndarray]:
    """Read-only arrays on the file, mapped into memory. Its pages are read when they are first used."""
    with reading(path):
        data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    return {
        name: data[tensor.start : tensor.start + tensor.size].view(tensor.dtype).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }


def release(array: np.ndarray) -> None:
    """Frees the memory pages of an array of `map_tensors` after it was copied. Reading it again reads the file.

    Does nothing for other arrays: memory that is mapped for writing may contain data that is not in a file.
    """
    base: Any = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    if base is None or getattr(base, "mode", None) != "r" or not hasattr(mmap, "MADV_DONTNEED"):
        return
    mapping = base.base
    while isinstance(mapping, np.ndarray):
        mapping = mapping.base
    start = array.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
    # Whole pages only: the neighbours of the array may be in use.
    first, last = -(-start // mmap.PAGESIZE), (start + array.nbytes) // mmap.PAGESIZE
    if first < last:
        mapping.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def write_tensors(
    path: Path,
    types: Mapping[str, jax.ShapeDtypeStruct],
    values: Mapping[str, Iterable[np.ndarray]],
    advance: Callable[[int], Any],
) -> str:
    """Writes a new file, waits until it is on the disk, and returns its SHA-256.

    Every tensor whose size is a multiple of 64 bytes starts at a multiple of 64, so that JAX can use it in place. The
    other tensors come after them, because the format has no gaps. Scales come last: they are known when their matrices
    were written.

    Args:
        types: the shape and dtype of each tensor by name.
        values: for each name, arrays of that dtype with its values, one after another.
        advance: called with the number of bytes after each array is written.

    Raises:
        OSError: the file exists or cannot be written.
    """
    sizes = {name: tensor.size * tensor.dtype.itemsize for name, tensor in types.items()}
    order = sorted(types, key=lambda name: (name.endswith(SCALE), sizes[name] % ALIGNMENT > 0))
    ends = dict(zip(order, itertools.accumulate(sizes[name] for name in order), strict=True))
    header = {
        name: {
            "dtype": SPELLINGS[types[name].dtype],
            "shape": types[name].shape,
            "data_offsets": [end - sizes[name], end],
        }
        for name, end in ends.items()
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("xb") as file:
        prefix = len(text).to_bytes(8, "little") + text
        file.write(prefix)
        digest = hashlib.sha256(prefix)
        start = file.tell()
        for name in order:
            for array in values[name]:
                data = array.reshape(-1).view(np.uint8).data
                file.write(data)
                digest.update(data)
                advance(array.nbytes)
            assert file.tell() == start + ends[name], f"the number of values of {name} does not match its shape"
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
