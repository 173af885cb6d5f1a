"""Makes our weights from the tensors of a source checkpoint, row by row, with at most one source tensor in memory.

The reader of a format lists, for each of our weights, the `Part`s of source tensors that it consists of, in order.
`assemble` compares all of them with the tensors in the files.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from funnel_engine.input_files import is_file, unfinished_downloads
from funnel_engine.messages import abbreviate, quote
from funnel_kernels.errors import CheckpointError

PIECE_BYTES = 2**20  # fits into the cache while it is checked and rounded; 16 MiB takes three times as long
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
# Parts that wrappers for training add to names: torch.compile, FSDP and activation checkpointing anywhere in a name,
# data parallel only at its start.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PARALLEL = "module."
ADAPTER = "by peft, as an adapter with its base; merge them (merge_and_unload) and save the whole model"
QUANTIZED = "by {}, quantized; convert the original model"
# Part of the name or dtype of a tensor that is not a plain weight -> what wrote it, and the remedy.
FOREIGN_TENSORS = dict.fromkeys(("lora_", ".base_layer."), ADAPTER) | {
    sign: QUANTIZED.format(writer)
    for sign, writer in {
        ".absmax": "bitsandbytes",
        ".quant_map": "bitsandbytes",
        ".quant_state": "bitsandbytes",
        ".SCB": "bitsandbytes",
        ".g_idx": "GPTQ",
        ".qweight": "GPTQ or AWQ",
        ".qzeros": "GPTQ or AWQ",
        ".weight_packed": "compressed-tensors",
        ".weight_scale": "a method of fp8 or int8",
        ".biases": "MLX",
        ".scales": "GPTQ, AWQ or MLX",
        "F8_E": "a method of fp8",
        "float8_": "a method of fp8",
    }.items()
}


class SourceTensor(Protocol):
    """A tensor in a file, not yet read."""

    @property
    def path(self) -> Path:
        """The file or folder that contains the tensor."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """NumPy's name of the dtype of the values that `read` returns. A type that only the format has is named as
        there, and `read` returns float32."""

    def read(self, at: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """`tensor[at][start:stop]`: some rows at some leading indices; `at` is often empty.

        Raises:
            CheckpointError: the file cannot be read.
        """


Tensor = TypeVar("Tensor", bound=SourceTensor)


def unwrapped(name: str) -> str:
    """The name of a tensor without the parts that wrappers add."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    while name.startswith(PARALLEL):
        name = name.removeprefix(PARALLEL)
    return name


def unwrap(where: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PyTorch tensors by their names without the parts that wrappers add.

    Raises:
        CheckpointError: two tensors have the same name.
    """
    plain = {unwrapped(name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        twice = [name for name, count in collections.Counter(map(unwrapped, tensors)).items() if count > 1]
        raise CheckpointError(
            f"{where} has {quote(twice)} twice, with and without {' or '.join((*WRAPPERS, PARALLEL))}; save the model "
            "without wrappers"
        )
    return plain


def join_shards(
    where: Path,
    files: Collection[Path],
    read: Callable[[Path], Mapping[str, Tensor]],
    listed: Collection[tuple[str, str]] | None = None,
    entry_of: Callable[[str], str] = lambda name: name,
    drop_rule: Callable[[str], str | None] = lambda name: None,
) -> dict[str, Tensor]:
    """The tensors of all shards of a checkpoint by name.

    Args:
        where: the index, or the folder that lists the files.
        read: reads the tensors of one file.
        listed: the content of an index: pairs of an entry and the name of a file with this entry.
        entry_of: returns the index entry of a tensor.
        drop_rule: why a tensor is not needed, see `assemble`. Its index entries are not checked.

    Raises:
        CheckpointError: files are missing or cannot be read, a tensor is in two files, or the index does not match the
            files.
    """
    if listed is not None:
        listed = {(entry, file) for entry, file in listed if not drop_rule(entry)}
        needed = {file for _, file in listed}
        files = [file for file in files if file.name in needed or is_file(file)]
    if missing := [file for file in files if not is_file(file)]:
        raise CheckpointError(
            f"{where} lists {quote(file.name for file in missing)}, which are not in the same folder"
            f"{unfinished_downloads(missing[0].parent)}; fetch the missing files"
        )
    tensors: dict[str, Tensor] = {}
    stored = set()
    for file in files:
        found = read(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(f"{file} contains {quote(twice)}, which another file contains too; fetch both again")
        tensors |= found
        stored |= {(entry_of(name), file.name) for name in found if not drop_rule(name)}
    if listed is not None and (wrong := sorted(stored.symmetric_difference(listed))):
        raise CheckpointError(
            f"{where} does not match the files: "
            f"{quote(f'{entry} in {file}' for entry, file in wrong)}; fetch all of them again"
        )
    return tensors


class Part(NamedTuple):
    """The part of a source tensor that goes into one of our weights, flattened:
    `tensor[at][first:rows].transpose(axes) * times - minus`.

    Attributes:
        name: the name of the tensor.
        shape: the required shape of the whole tensor.
        at: leading indices of the part.
        axes: the order of the part's axes in our weight; None keeps the order.
        rows, first: the end of the rows to take, and the first one; None is the end of the tensor.
        times, minus: computed in float32; 1 is subtracted from the factors of norms, because ours are zero-centred.
    """

    name: str
    shape: tuple[int, ...]
    at: tuple[int, ...] = ()
    axes: tuple[int, ...] | None = None
    rows: int | None = None
    first: int = 0
    times: float = 1.0
    minus: float = 0.0

    def change(self, values: np.ndarray) -> np.ndarray:
        """`values * times - minus`; the values themselves, in their own dtype, where that changes nothing."""
        if (self.times, self.minus) == (1, 0):
            return values
        return values.astype(np.float32) * np.float32(self.times) - np.float32(self.minus)


Parts = Mapping[str, tuple[Part, ...]]  # by our weight's name


class Rows(NamedTuple):
    """A part, and the tensor that contains it."""

    tensor: SourceTensor
    part: Part

    def pieces(self) -> Iterator[np.ndarray]:
        """The values in our order, as arrays of about 1 MiB, or of one row if that is larger."""
        _, _, at, axes, rows, first, *_ = self.part
        shape = self.tensor.shape[len(at) :]
        rows = shape[0] if rows is None else rows
        if axes is None:
            for start, stop in row_blocks((rows - first, *shape[1:])):
                yield self.part.change(self.tensor.read(at, first + start, first + stop))
            return
        view = self.tensor.read(at, first, rows).transpose(axes)
        for start, stop in row_blocks(view.shape):
            yield self.part.change(np.ascontiguousarray(view[start:stop]))


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """A tensor in memory, e.g. one that was trained.

    Attributes:
        path: the checkpoint that training began with.
    """

    path: Path
    name: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> str:
        return self.array.dtype.name

    def read(self, at: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        return self.array[at][start:stop]

    @classmethod
    def of(cls, name: str, array: np.ndarray, path: Path) -> tuple[Rows, ...]:
        """One of our weights that consists of an array."""
        return (Rows(cls(path, name, array), Part(name, array.shape)),)


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Cuts the first axis into blocks of about `PIECE_BYTES` in float32, of at least one row."""
    step = max(1, PIECE_BYTES // max(4, 4 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


class Assembly(NamedTuple):
    """Our weights, each as rows of source tensors, and the number of tensors that each rule left out."""

    weights: dict[str, tuple[Rows, ...]]
    dropped: dict[str, int]


def assemble(
    where: Path,
    parts: Parts,
    tensors: Mapping[str, SourceTensor],
    drop_rule: Callable[[str], str | None] = lambda name: None,
    dtypes: tuple[str, ...] = FLOAT_DTYPES,
) -> Assembly:
    """Finds every part among the tensors of a checkpoint.

    Args:
        where: the name of the checkpoint in messages.
        drop_rule: returns the rule by which a tensor may be left out; None if it may not.
        dtypes: the dtypes that can be read.

    Raises:
        CheckpointError: tensors are missing, unknown, or have a wrong shape or dtype; the message lists all of them.
    """
    expected = {part.name: part.shape for weight_parts in parts.values() for part in weight_parts}
    rules = {name: rule for name in tensors if name not in expected and (rule := drop_rule(name))}
    check_tensors(where, expected, {name: tensor for name, tensor in tensors.items() if name not in rules}, dtypes)
    weights = {
        name: tuple(Rows(tensors[part.name], part) for part in weight_parts) for name, weight_parts in parts.items()
    }
    return Assembly(weights, dict(collections.Counter(rules.values())))


def check_tensors(
    where: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, SourceTensor],
    dtypes: tuple[str, ...] = FLOAT_DTYPES,
) -> None:
    """Raises one `CheckpointError` with all tensors that are missing, unknown, or of a wrong shape or dtype.

    If their names or dtypes show which program wrote them, the message begins with that.
    """
    missing = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    unknown, misshapen, dtype = [], [], []
    for name, tensor in found.items():
        if name not in expected:
            unknown.append(f"unknown: {name!r} {tensor.shape}")
        elif tensor.shape != expected[name]:
            misshapen.append(f"misshapen: {name} is {tensor.shape}, but the config says {expected[name]}")
        elif tensor.dtype not in dtypes:
            dtype.append(f"dtype: {name} is {tensor.dtype!r}, not {' or '.join(dtypes)}")
    problems = [line for lines in (missing, unknown, misshapen, dtype) for line in abbreviate(lines)]
    if problems:
        names = [*found, *{tensor.dtype for tensor in found.values()}]
        written = [how for sign, how in FOREIGN_TENSORS.items() if any(sign in name for name in names)]
        cause = f"{where} was written {written[0]}. " if written else ""
        raise CheckpointError("\n  ".join([f"{cause}the tensors of {where} do not fit its config:", *problems]))


def drop_by_name(rules: tuple[str, ...]) -> Callable[[str], str | None]:
    """A rule for `assemble`: tensors with these names, prefixes or suffixes.

    A prefix ends in a dot or a slash, and a suffix begins with a dot.
    """

    def rule_of(name: str) -> str | None:
        for rule in rules:
            is_prefix, is_suffix = rule[-1] in "./", rule[0] == "."
            if name == rule or (is_prefix and name.startswith(rule)) or (is_suffix and name.endswith(rule)):
                return rule
        return None

    return rule_of
