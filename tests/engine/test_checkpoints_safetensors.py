"""Safetensors files: damaged ones are refused by name, ours are read by the safetensors library and used in place."""

import json
import math
import mmap
import os
import struct
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from funnel_engine.checkpoints.safetensors_file import (
    MAX_HEADER_BYTES,
    map_tensors,
    read_header,
    release,
    write_tensors,
)
from funnel_kernels import CheckpointError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def file_bytes(header: object, data: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


DATA = bytes(range(96))
GOOD = {"__metadata__": {"format": "pt"}, "b": entry(64, 96, [4, 2]), "a": entry(0, 64)}

DAMAGED = {
    "empty file": (b"", "is empty; a download or a copy failed"),
    "shorter than a length": (b"\0\0\0", "not a complete safetensors"),
    "header beyond the file": (file_bytes(GOOD, DATA, length=1000), "header would have 1,000 bytes"),
    "header of 2^63 bytes": (file_bytes(GOOD, DATA, length=2**63), "not a complete safetensors"),
    "header cut": (file_bytes(GOOD, DATA, length=40), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}', b""), "not valid JSON"),
    "nested without end": (file_bytes(b"[" * 100_000, b""), "not valid JSON"),
    "a list": (file_bytes([], b""), "JSON list"),
    "tensor named twice": (file_bytes(b'{"a": {}, "a": {}}', b""), "'a' occurs twice"),
    "truncated": (file_bytes(GOOD, DATA[:-1]), "truncated"),
    "bytes after the last tensor": (file_bytes(GOOD, DATA + b"x"), "damaged"),
    "overlap": (file_bytes({"a": entry(0, 64), "b": entry(32, 96)}, DATA), "'b' starts at byte"),
    "hole": (file_bytes({"a": entry(0, 60), "b": entry(64, 96)}, DATA), "'b' starts at byte"),
    "not at the beginning": (file_bytes({"b": entry(64, 96)}, DATA), "'b' starts at byte"),
    "beyond the file": (file_bytes({"a": entry(0, 2**40)}, DATA), "truncated"),
    "backwards": (file_bytes({"a": entry(96, 0, [24])}, DATA), "does not fit"),
    "backwards in a dtype that cannot be read": (file_bytes({"a": entry(96, 0, [12], "I64")}, DATA), "does not fit"),
    "negative offset": (file_bytes({"a": entry(-4, 92)}, DATA), "the entry of tensor"),
    "size against shape": (file_bytes({"a": entry(0, 96, [23])}, DATA), "does not fit"),
    "negative axis": (file_bytes({"a": entry(0, 96, [-3, -8])}, DATA), "the entry of tensor"),
    "axis that is true": (file_bytes({"a": entry(0, 96, [True, 24])}, DATA), "the entry of tensor"),
    "axis beyond 63 bits": (file_bytes({"a": entry(0, 96, [2**63])}, DATA), "the entry of tensor"),
    "more axes than a tensor has": (file_bytes({"a": entry(0, 96, [24] + [1] * 16)}, DATA), "the entry of tensor"),
    "size of a million digits": (file_bytes({"a": entry(0, 96, [2**63 - 1] * 400_000)}, DATA), "the entry of tensor"),
    "fractional axis": (file_bytes({"a": entry(0, 96, [24.0])}, DATA), "the entry of tensor"),
    "no offsets": (file_bytes({"a": {"dtype": "F32", "shape": [24]}}, DATA), "the entry of tensor"),
    "three offsets": (file_bytes({"a": entry(0, 96) | {"data_offsets": [0, 96, 96]}}, DATA), "the entry of tensor"),
    "no object": (file_bytes({"a": 7}, DATA), "the entry of tensor"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_refused_by_name(tmp_path, case):
    content, reason = DAMAGED[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as error:
        read_header(path)
    assert str(path) in str(error.value)


def test_header_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)  # a hole on the disk
    with pytest.raises(CheckpointError, match="100,000,001 bytes"):
        read_header(path)


def test_what_is_no_regular_file(tmp_path):
    """Whoever opens a pipe waits for the one who writes."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none", tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match="cannot read"):
            read_header(path)


def test_reads_what_the_library_writes(tmp_path):
    generator = np.random.default_rng(1)
    tensors = {
        "half": generator.standard_normal((3, 5)).astype(np.float16),
        "single": generator.standard_normal((7, 2, 3)).astype(np.float32),
        "brain": generator.standard_normal(11).astype(BFLOAT16),
        "scalar": np.array(generator.standard_normal(), np.float32),
        "empty": np.ones((0, 4), np.float32),
    }
    path = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file(tensors, path, {"format": "np"})
    header = read_header(path)
    mapped = map_tensors(path, header)
    for name, tensor in tensors.items():
        assert header[name].shape == tensor.shape
        np.testing.assert_array_equal(mapped[name], tensor, strict=True)
        if tensor.ndim:
            np.testing.assert_array_equal(header[name].read((), 0, len(tensor)), tensor, strict=True)


def test_other_dtypes_may_stand_in_a_file(tmp_path):
    path = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file({"ids": np.arange(7), "weight": np.arange(3, dtype=np.float32)}, path)
    assert read_header(path)["ids"].dtype == "safetensors I64"


def test_a_spelling_that_is_numpys_is_no_dtype_of_the_format(tmp_path):
    """Its size is not checked, so it must not pass for one that is."""
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(file_bytes({"a": entry(0, 96, [2**40], "float32")}, DATA))
    assert read_header(path)["a"].dtype == "safetensors float32"


def test_rows_of_a_tensor(tmp_path):
    values = np.random.default_rng(2).standard_normal((3, 4, 5)).astype(BFLOAT16)
    path = tmp_path / "some.safetensors"
    safetensors.numpy.save_file({"before": np.ones(7, np.float32), "values": values, "z": np.ones(3, np.int8)}, path)
    tensor = read_header(path)["values"]
    for at, start, stop in (((), 0, 3), ((), 1, 2), ((2,), 0, 4), ((1,), 1, 3), ((0, 3), 2, 5)):
        np.testing.assert_array_equal(tensor.read(at, start, stop), values[at][start:stop], strict=True)


def test_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "shrinking.safetensors"
    safetensors.numpy.save_file({"a": np.arange(100, dtype=np.float32)}, path)
    tensor = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="shorter"):
        tensor.read((), 0, 100)


SHAPES = {"odd": (3, 5), "matrix": (32, 9), "vector": (32,), "last odd": (1,), "cube": (2, 4, 16)}


def types(dtype: np.dtype) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SHAPES.items()}


def random_tensors(dtype: np.dtype) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_writes_what_the_library_reads(tmp_path, dtype):
    tensors = random_tensors(dtype)
    path = tmp_path / "ours.safetensors"
    written = []
    values = {name: np.array_split(tensor.ravel(), 2) for name, tensor in tensors.items()}
    write_tensors(path, types(dtype), values, written.append)
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())
    for loaded in (safetensors.numpy.load_file(path), map_tensors(path, read_header(path))):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(loaded[name], tensor, strict=True)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_mapped_tensors_are_aligned_and_used_in_place(tmp_path, dtype):
    tensors = random_tensors(dtype)
    path = tmp_path / "ours.safetensors"
    write_tensors(path, types(dtype), {name: [tensor] for name, tensor in tensors.items()}, lambda size: None)
    header = read_header(path)
    in_place = {name for name, tensor in tensors.items() if tensor.nbytes % 64 == 0}
    assert in_place == ({"matrix", "vector", "cube"})
    assert {name for name in SHAPES if header[name].start % 64 == 0} >= in_place
    for name, array in map_tensors(path, header).items():
        assert not array.flags.writeable
        on_device = jax.device_put(array, jax.devices("cpu")[0])
        np.testing.assert_array_equal(np.asarray(on_device), tensors[name])
        if name in in_place:
            assert on_device.unsafe_buffer_pointer() == array.ctypes.data


def test_existing_file_is_not_written_over(tmp_path):
    path = tmp_path / "ours.safetensors"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        write_tensors(path, {}, {}, lambda size: None)
    assert path.read_text() == "precious"


numbers = st.integers(-2, 2**66) | st.floats() | st.booleans() | st.none() | st.sampled_from([0, 4, 8, 12, 16])
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I8", "F4", ""]) | numbers,
        "shape": st.lists(numbers | st.integers(0, 4), max_size=4) | numbers,
        "data_offsets": st.lists(numbers, max_size=3) | st.sampled_from([[0, 4], [4, 8], [0, 8], [8, 16]]) | numbers,
    },
)
headers = st.dictionaries(st.text(max_size=3), entries | numbers, max_size=4) | numbers | st.lists(numbers, max_size=2)
contents = st.one_of(
    st.binary(max_size=64),
    st.builds(file_bytes, headers, st.binary(max_size=24)),
    # The good file with one byte changed, or cut.
    st.builds(
        lambda at, byte: file_bytes(GOOD, DATA)[:at] + bytes([byte]) + file_bytes(GOOD, DATA)[at + 1 :],
        st.integers(0, len(file_bytes(GOOD, b"")) - 1),
        st.integers(0, 255),
    ),
    st.builds(lambda at: file_bytes(GOOD, DATA)[:at], st.integers(0, 400)),
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzz.safetensors"


@hypothesis.settings(max_examples=600, deadline=None)
@hypothesis.given(content=contents)
@hypothesis.example(content=file_bytes(GOOD, DATA))
def test_any_file_is_read_whole_or_refused(fuzzed, content):
    fuzzed.write_bytes(content)
    try:
        tensors = read_header(fuzzed)
    except CheckpointError:
        assert content != file_bytes(GOOD, DATA)
        return
    data_start = 8 + struct.unpack("<Q", content[:8])[0]
    assert sum(tensor.size for tensor in tensors.values()) == len(content) - data_start
    for tensor in tensors.values():
        assert data_start <= tensor.start <= tensor.start + tensor.size <= len(content)
        itemsize = {"float32": 4, "bfloat16": 2, "float16": 2}.get(tensor.dtype)
        if itemsize:
            assert math.prod(tensor.shape) * itemsize == tensor.size
            if tensor.shape:
                read = tensor.read((), 0, tensor.shape[0])
                assert read.tobytes() == content[tensor.start :][: tensor.size]


def resident_bytes() -> int:
    """Of this process's memory, what is mapped from files and present."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return 1024 * int(line.split()[1])


def test_memory_of_a_mapped_tensor_can_be_let_go_and_reads_the_same_again(tmp_path):
    values = np.random.default_rng(3).standard_normal((3, 2**20)).astype(np.float32)
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({"a": values[0], "b": values[1:]}, path)
    mapped = map_tensors(path, read_header(path))
    total = sum(float(array.sum()) for array in mapped.values())  # reads all of it
    before = resident_bytes()
    release(mapped["b"])
    assert before - resident_bytes() > 0.95 * values[1:].nbytes
    assert total == sum(float(array.sum()) for array in mapped.values())
    release(values)  # not mapped: nothing happens
    np.testing.assert_array_equal(mapped["b"], values[1:])


def test_memory_that_may_hold_what_no_file_does_is_never_let_go(tmp_path):
    path = tmp_path / "values"
    np.zeros(2**20, np.float32).tofile(path)
    private, anonymous = np.memmap(path, np.float32, mode="c"), np.frombuffer(mmap.mmap(-1, 2**22), np.float32)
    for array in (private, np.asarray(private), anonymous):
        array[:] = 7
        release(array)
        assert (array == 7).all()
