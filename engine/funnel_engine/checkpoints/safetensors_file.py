"""Safetensors files, read with distrust, mapped or in pieces, and written and hashed in one pass.

A file is the length of its header (8 bytes, little-endian), the header, which is JSON (name -> dtype, shape,
data_offsets), and then every tensor's bytes, one after another without holes
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

import ml_dtypes
import numpy as np

from funnel_engine.input_files import open_file, parse_json, reading
from funnel_engine.weights import Shapes
from funnel_kernels.errors import CheckpointError

# The dtypes whose values can be read. Tensors of other dtypes may stand in a file as long as nobody needs them.
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
SPELLINGS = {dtype: spelling for spelling, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_AXES = 16  # of a tensor; its size would otherwise be an integer of any length
# JAX uses an array on the CPU in place, without a copy, if it starts at a multiple of this many bytes.
ALIGNMENT = 64


class StoredTensor(NamedTuple):
    """A tensor in a file, not yet read (a `tensors.SourceTensor`): `start` and `size` are in bytes of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self, at: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """`tensor[at][start:stop]`.

        Raises:
            CheckpointError: the file can no longer be read, or has become shorter.
        """
        dtype, rest = np.dtype(self.dtype), self.shape[len(at) + 1 :]
        row = 0
        for index, size in zip((*at, start), self.shape, strict=False):
            row = row * size + index
        count = (stop - start) * math.prod(rest)
        with open_file(self.path) as file:
            file.seek(self.start + row * math.prod(rest) * dtype.itemsize)
            values = np.fromfile(file, dtype, count)
        if len(values) < count:
            raise CheckpointError(f"{self.path} became shorter while it was read; convert it again")
        return values.reshape(stop - start, *rest)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; their values stay on disk.

    Raises:
        CheckpointError: no such file, or one that is truncated, damaged, or not a safetensors file.
    """
    with open_file(path) as file:
        file_size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(file_size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is no whole safetensors file: its header would be {length:,} bytes long, the file has "
                f"{file_size:,} (and a header at most {MAX_HEADER_BYTES:,}). Fetch it again"
            )
        header = parse_json(file.read(length), path)
    tensors = {
        name: read_entry(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
    }
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != end:
            raise CheckpointError(
                f"{path} is damaged: tensor {tensor.name!r} starts at byte {tensor.start:,}, not where the one before "
                f"it ends, at {end:,}. Fetch it again"
            )
        end += tensor.size
    if end != file_size:
        raise CheckpointError(
            f"{path} is {'truncated' if end > file_size else 'damaged'}: its tensors end at byte {end:,}, the file has "
            f"{file_size:,}. Fetch it again"
        )
    return tensors


def read_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """One tensor of a header. Its size is checked against dtype and shape if the dtype is one that can be read."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and is_naturals(shape) and is_naturals(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{path} is damaged: tensor {name!r} is described by {entry!r:.200}. Fetch it again")
    begin, end = offsets
    if begin > end or (dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize):
        raise CheckpointError(
            f"{path} is damaged: tensor {name!r} ({dtype} {shape!r:.80}) cannot lie in bytes {begin} to {end}. "
            "Fetch it again"
        )
    name_of_dtype = DTYPES[dtype].name if dtype in DTYPES else f"safetensors {dtype}"
    return StoredTensor(path, name, name_of_dtype, tuple(shape), data_start + begin, end - begin)


def is_naturals(value: Any) -> TypeGuard[list[int]]:
    """Whether a value is the shape or the place of a tensor: a few integers of 63 bits."""
    if not isinstance(value, list) or len(value) > MAX_AXES:
        return False
    return all(type(item) is int and 0 <= item < 2**63 for item in value)


def map_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, np.ndarray]:
    """Read-only arrays that are the file itself, mapped into memory: pages are read when they are first used."""
    with reading(path):
        data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    return {
        name: data[tensor.start : tensor.start + tensor.size].view(tensor.dtype).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }


def release(array: np.ndarray) -> None:
    """Lets go of the memory behind an array of `map_tensors` that has been copied; reading it again reads the file.

    Any other array is left alone: memory that is mapped to be written to may hold what no file does.
    """
    base: Any = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    if base is None or getattr(base, "mode", None) != "r" or not hasattr(mmap, "MADV_DONTNEED"):
        return
    whole = base.base
    while isinstance(whole, np.ndarray):
        whole = whole.base
    start = array.ctypes.data - np.frombuffer(whole, np.uint8).ctypes.data
    first, last = -(-start // mmap.PAGESIZE), (start + array.nbytes) // mmap.PAGESIZE  # its neighbours may be in use
    if first < last:
        whole.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def write_tensors(
    path: Path,
    dtype: np.dtype,
    shapes: Shapes,
    values: Mapping[str, Iterable[np.ndarray]],
    advance: Callable[[int], Any],
) -> str:
    """Writes a new file, tensor after tensor, waits until it is on the disk, and returns its SHA-256.

    Every tensor whose size is a multiple of 64 bytes starts at a multiple of 64, where JAX can use it in place; since
    the format has no holes, the others come after them.

    Args:
        dtype: of every tensor.
        values: for each name in `shapes`, arrays of that dtype that hold its values one after another.
        advance: called with the number of bytes after each array is written.

    Raises:
        OSError: the file exists or cannot be written.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    order = sorted(shapes, key=lambda name: sizes[name] % ALIGNMENT > 0)
    ends = dict(zip(order, itertools.accumulate(sizes[name] for name in order), strict=True))
    header = {
        name: {"dtype": SPELLINGS[dtype], "shape": shapes[name], "data_offsets": [end - sizes[name], end]}
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
            assert file.tell() == start + ends[name], f"the values of {name} are not as many as its shape says"
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
