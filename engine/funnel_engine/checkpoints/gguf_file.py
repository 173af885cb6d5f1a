"""GGUF files of llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a checked header, and tensors.

A file begins with a header: named values (architecture, sizes, tokenizer) and, for each tensor, its name, shape, type
and offset. The tensors follow, each at a multiple of the alignment. All numbers are little-endian. Most types are
quantized: a block of 32 or 256 values has one or more scales and few bits per value.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from funnel_engine.input_files import open_file, read_array
from funnel_engine.messages import abbreviate
from funnel_kernels.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 had shorter numbers
MAX_HEADER_BYTES = 100_000_000  # Gemma 3's has 7 MB, almost all of it the vocabulary
MAX_ENTRIES = 100_000  # values, and tensors; the largest Gemma has about 40 and 1,000
MAX_AXES = 4
ALIGNMENT = 32  # the default
# The types that are read; the float types too are returned as float32, which contains all their values.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K")
# The type of a value in the header: its number in the file, and its format for `struct`.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT32, STRING, ARRAY = 6, 8, 9


class GGUFTensor(NamedTuple):
    """A tensor in a file, not yet read (a `tensors.SourceTensor`).

    Attributes:
        dtype: llama.cpp's name of the type, e.g. "Q4_K".
        start, size: its place in the file, in bytes.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self, at: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Rows as float32.

        Raises:
            CheckpointError: the file cannot be read any more, or became shorter.
        """
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        assert at == (), "the tensors of a Gemma are vectors and matrices, which are read by rows"
        row_bytes = self.size // self.shape[0]
        first, size = self.start + start * row_bytes, (stop - start) * row_bytes
        data = read_array(self.path, first, np.dtype(np.uint8), size)
        with np.errstate(over="ignore", invalid="ignore"):  # scales may be damaged; values are checked when written
            values = dequantize(data.reshape(stop - start, row_bytes), GGMLQuantizationType[self.dtype])
        return values.reshape(stop - start, *self.shape[1:])


class Header(NamedTuple):
    """The content of a file without the values of its tensors, by name."""

    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_header(path: Path) -> Header:
    """Reads the header of a file.

    Raises:
        CheckpointError: the file does not exist, is truncated or damaged, has another version or byte order, or the
            package gguf is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path} is a GGUF file; to read it, run: pip install 'funnel-engine[gguf]'") from error
    sizes = {kind.value: (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    with open_file(path) as file:
        file_size = os.fstat(file.fileno()).st_size
        stream = Stream(path, file, file_size)
        check_version(path, stream)
        tensor_count, field_count = stream.numbers("QQ")
        if max(tensor_count, field_count) > MAX_ENTRIES:
            raise damaged(
                path, f"it has {field_count:,} values and {tensor_count:,} tensors; the limit is {MAX_ENTRIES:,}"
            )
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            name, (kind,) = stream.text(), stream.numbers("I")
            if name in fields:
                raise damaged(path, f"it has the key {name!r:.80} twice")
            fields[name] = stream.value(kind)
        entries = {}
        for _ in range(tensor_count):
            name, (axes,) = stream.text(), stream.numbers("I")
            if name in entries or not 1 <= axes <= MAX_AXES:
                raise damaged(path, f"it has tensor {name!r:.80} twice, or with {axes} axes")
            entries[name] = stream.numbers(f"{axes}Q"), *stream.numbers("IQ")
        header_size = file.tell()
    alignment = fields.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise damaged(path, f"general.alignment is {alignment!r:.80}, which must be a power of two")
    tensors = {}
    end = header_size
    for name, (axes, kind, offset) in sorted(entries.items(), key=lambda entry: entry[1][-1]):
        if kind not in sizes:
            raise CheckpointError(
                f"{path}: tensor {name!r:.80} has type {kind}, which the installed package gguf does not know; run: "
                "pip install --upgrade gguf. Or the file is damaged, so fetch it again"
            )
        kind_name, block, block_bytes = sizes[kind]
        size = math.prod(axes) // block * block_bytes
        start = -(-header_size // alignment) * alignment + offset
        if axes[0] % block or not all(axes) or start < end or start + size > file_size:
            raise damaged(
                path,
                f"tensor {name!r:.80} ({kind_name} {axes!r:.80}) would be at bytes {start:,} to {start + size:,} of "
                f"{file_size:,}, and the one before it ends at {end:,}",
            )
        end = start + size
        tensors[name] = GGUFTensor(path, name, kind_name, axes[::-1], start, size)
    return Header(fields, tensors)


def check_version(path: Path, stream: "Stream") -> None:
    magic = stream.take(4)
    if magic != MAGIC:
        raise damaged(path, f"it begins with {magic!r}, and a GGUF file with {MAGIC!r}")
    (version,) = stream.numbers("I")
    if version and not version & 0xFFFF:
        raise CheckpointError(
            f"{path} is big-endian; this engine reads little-endian GGUF files. Fetch such a file, or write it again "
            "with gguf_convert_endian.py of llama.cpp"
        )
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path} has version {version} of GGUF; this engine reads {' and '.join(map(str, VERSIONS))}. Write it "
            "again with a llama.cpp of today"
        )


def check_types(where: Path, tensors: list[GGUFTensor]) -> None:
    """Raises `CheckpointError` if a tensor has a type that is not read."""
    other = sorted({tensor.dtype for tensor in tensors} - {*TYPES})
    if other:
        raise CheckpointError(
            f"{where} has tensors of type {', '.join(other)}; this engine reads {', '.join(TYPES)}. Fetch the model in "
            "one of these, or run: llama-quantize --allow-requantize OLD.gguf NEW.gguf Q8_0"
        )
    vectors = [tensor.name for tensor in tensors if len(tensor.shape) == 1 and tensor.dtype.startswith("Q")]
    if vectors:
        raise CheckpointError(
            f"{where} has quantized vectors, which llama.cpp does not write: {', '.join(abbreviate(vectors))}. Fetch "
            "the model again"
        )


def damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged, or not a GGUF file: {problem}. Fetch it again")


class Stream:
    """Reads a header. No length in it is believed before it is compared with the bytes that are left."""

    def __init__(self, path: Path, file: BinaryIO, file_size: int) -> None:
        self.path, self.file, self.file_size = path, file, file_size
        self.left = min(file_size, MAX_HEADER_BYTES)

    def take(self, size: int) -> bytes:
        self.require(size)
        self.left -= size
        data = self.file.read(size)
        if len(data) < size:
            raise CheckpointError(f"{self.path} became shorter while it was read; convert it again")
        return data

    def require(self, size: int) -> None:
        if size > self.left:
            raise damaged(
                self.path,
                f"a value of {size:,} bytes begins {self.left:,} bytes before the end; the file has "
                f"{self.file_size:,} bytes, and the limit for a header is {MAX_HEADER_BYTES:,}",
            )

    def numbers(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self) -> str:
        (size,) = self.numbers("Q")
        data = self.take(size)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"the text {data!r:.80} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """A value of the header: a number, a text, or a list of one of them."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            item, count = self.numbers("IQ")
            if item == STRING:
                self.require(8 * count)  # each has at least its length
                return [self.text() for _ in range(count)]
            return self.array(item, count)
        (value,) = self.array(kind, 1)
        # The decimal number that was rounded to float32, e.g. 1e-6 and not 9.99999997e-7.
        return float(str(np.float32(value))) if kind == FLOAT32 else value

    def array(self, kind: int, count: int) -> list[Any]:
        if kind not in NUMBERS:
            raise damaged(self.path, f"a value has type {kind}, which is not a number or a text")
        dtype = np.dtype(f"<{NUMBERS[kind]}")
        values: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return values
