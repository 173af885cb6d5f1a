"""How source tensors become rows of ours: pieces, transposed pieces, and what does not fit."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from funnel_engine.checkpoints import tensors
from funnel_engine.checkpoints.tensors import Part, Rows, assemble, drop_by_name, join_shards
from funnel_engine.messages import quote
from funnel_kernels import CheckpointError

WHERE = Path("model")


@dataclasses.dataclass
class Held:
    """A tensor in memory that notes how much of it is read at a time."""

    name: str
    values: np.ndarray
    path: Path = WHERE
    most: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> str:
        return self.values.dtype.name

    def read(self, at: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        part = self.values[at][start:stop]
        self.most = max(self.most, part.nbytes)
        return part


def held(*shape: int, dtype: str = "float32") -> Held:
    return Held("w", np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype))


def made(tensor: Held, *part, **options) -> np.ndarray:
    """What our weight gets of a tensor, flat."""
    return np.concatenate([piece.ravel() for piece in Rows(tensor, Part("w", tensor.shape, *part, **options)).pieces()])


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "at", "axes", "rows"),
    [
        ((7,), (), None, None),
        ((5, 3), (), None, None),
        ((5, 3), (), None, 4),
        ((2, 5, 3), (1,), None, None),
        ((2, 4, 5, 3), (1, 2), None, 2),
        ((5, 3), (), (1, 0), None),
        ((4, 5, 3), (), (0, 2, 1), None),  # heads of a query projection
        ((4, 5, 3), (), (2, 0, 1), None),  # an output projection
        ((2, 4, 5, 3), (1,), (0, 2, 1), None),
        ((3, 2, 5, 3), (2, 1), (1, 0), None),
    ],
)
def test_parts(monkeypatch, shape, at, axes, rows, dtype):
    """In pieces of one row and whole, a part is what NumPy makes of it."""
    tensor = held(*shape, dtype=dtype)
    expected = tensor.values[at][:rows]
    expected = (expected if axes is None else expected.transpose(axes)).ravel()
    for piece_bytes in (1, 40, 2**20):
        monkeypatch.setattr(tensors, "PIECE_BYTES", piece_bytes)
        np.testing.assert_array_equal(made(tensor, at, axes, rows), expected, strict=True)


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("axes", [None, (1, 0)])
@pytest.mark.parametrize(("first", "rows"), [(0, None), (2, None), (1, 4), (3, 3)])
def test_some_rows_of_a_part_are_scaled_and_moved(first, rows, axes, dtype):
    """In float32, also where the tensor has fewer bits; whatever the order of its axes."""
    tensor = held(5, 3, dtype=dtype)
    part = Part("w", (5, 3), axes=axes, rows=rows, first=first, times=3.0, minus=1.0)
    expected = tensor.values[first:rows].astype(np.float32) * np.float32(3) - np.float32(1)
    expected = (expected if axes is None else expected.transpose(axes)).ravel()
    pieces = [piece.ravel() for piece in Rows(tensor, part).pieces()]
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, np.float32), *pieces]), expected, strict=True)


def test_rows_are_read_a_piece_at_a_time():
    """1 MiB at a time; a matrix that must be transposed is read once."""
    tensor = held(3000, 200)
    np.testing.assert_array_equal(made(tensor), tensor.values.ravel())
    assert 2**19 < tensor.most <= 2**20
    sizes = [piece.nbytes for piece in Rows(tensor, Part("w", tensor.shape, axes=(1, 0))).pieces()]
    assert max(sizes) <= 2**20
    assert tensor.most == tensor.values.nbytes


def test_a_row_longer_than_a_piece():
    tensor = held(2, 300_000)
    assert [piece.shape for piece in Rows(tensor, Part("w", tensor.shape)).pieces()] == [(1, 300_000)] * 2


def test_assemble_finds_every_part_and_counts_what_is_left_out():
    found = {name: held(2, 3) for name in ("q", "k", "lm_head", "vision.a", "vision.b", "0.rotary.angles")}
    parts = {"qk": (Part("q", (2, 3)), Part("k", (2, 3)))}
    weights, dropped = assemble(WHERE, parts, found, drop_by_name(("lm_head", "vision.", ".angles", "absent")))
    assert [rows.tensor for rows in weights["qk"]] == [found["q"], found["k"]]
    assert dropped == {"lm_head": 1, "vision.": 2, ".angles": 1}


def test_a_needed_tensor_is_not_left_out():
    weights, dropped = assemble(WHERE, {"q": (Part("x.q", (2, 3)),)}, {"x.q": held(2, 3)}, drop_by_name(("x.",)))
    assert list(weights) == ["q"]
    assert dropped == {}


def test_everything_that_does_not_fit_is_listed():
    found = {"q": held(3, 2), "k": held(2, 3, dtype="int8"), "other": held(1), "lm_head2": held(1)}
    parts = {"qkv": tuple(Part(name, (2, 3)) for name in "qkv")}
    with pytest.raises(CheckpointError) as error:
        assemble(WHERE, parts, found, drop_by_name(("lm_head",)))
    assert {line.strip() for line in str(error.value).splitlines()[1:]} == {
        "missing: v (2, 3)",
        "misshapen: q is (3, 2), but the config says (2, 3)",
        "dtype: k is 'int8', not float32 or bfloat16 or float16",
        "unknown: 'other' (1,)",
        "unknown: 'lm_head2' (1,)",
    }


def test_shards_and_their_index(tmp_path):
    """Every tensor in one file, every file there, and the index, where there is one, as the files are."""
    held_by = {"a": {"x/0", "x/1"}, "b": {"y/0", "x/2"}, "again": {"y/0"}}
    files = [tmp_path / name for name in held_by]
    for file in files:
        file.touch()

    def join(files, *listed):
        return join_shards(
            tmp_path / "index", files, lambda file: {name: held(1) for name in held_by[file.name]}, *listed
        )

    pairs = {("x/0", "a"), ("x/1", "a"), ("y/0", "b"), ("x/2", "b")}
    groups = {("x", "a"), ("x", "b"), ("y", "b")}
    for listed in ((), (pairs,), (groups, lambda name: name[0])):
        assert join(files[:2], *listed).keys() == {"x/0", "x/1", "x/2", "y/0"}
    with pytest.raises(CheckpointError, match=r"again contains 'y/0', which another file contains too"):
        join(files)
    with pytest.raises(CheckpointError, match=r"index lists 'none', which are not in the same folder"):
        join([*files, tmp_path / "none"])
    for listed in (pairs - {("x/2", "b")}, pairs | {("x/2", "a")}):
        (entry,) = listed ^ pairs
        with pytest.raises(CheckpointError, match=f"index does not match the files: 'x/2 in {entry[1]}'"):
            join(files[:2], listed)


def test_names_in_a_message_are_escaped_and_few():
    assert quote(["a\x1b[2J", "b"]) == r"'a\x1b[2J', 'b'"
    assert quote(map(str, range(1007))) == "'0', '1', '2', '3', '4', '5', '6', '7', '8', '9' and 997 more"
    assert len(quote(["x" * 1000])) == 80
