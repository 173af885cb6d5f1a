"""How the tensors of a source checkpoint become ours: row after row, at most one source tensor in memory.

A format's reader names, for each of our weights, the `Part`s of its own tensors whose rows make it, one after another.
`assemble` checks all of them against what the files hold.
"""

import collections
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from funnel_engine.input_files import is_file, unfinished
from funnel_engine.messages import first_of, quote
from funnel_kernels.errors import CheckpointError

PIECE_BYTES = 2**20  # stays in the cache while it is checked and rounded; 16 MiB takes three times as long
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
# Parts of names that training puts around a model: torch.compile, FSDP and activation checkpointing anywhere in a
# name, data parallel only before all of it.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PARALLEL = "module."
ADAPTER = "by peft, as an adapter beside its base; merge them (merge_and_unload) and save the whole model"
QUANTIZED = "by {}, quantized; convert the model that it was made from"
# What the name or dtype of a tensor contains that is no plain weight -> who has written it, and the remedy.
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
        """The file or folder that holds it."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """Of the values that `read` returns, by NumPy's name."""

    def read(self, at: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """`tensor[at][start:stop]`: rows of what stands at some leading indices; `at` is often empty.

        Raises:
            CheckpointError: the file cannot be read.
        """


Tensor = TypeVar("Tensor", bound=SourceTensor)


def unwrapped(name: str) -> str:
    """The name that a tensor has in the model itself."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    while name.startswith(PARALLEL):
        name = name.removeprefix(PARALLEL)
    return name


def unwrap(where: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of PyTorch by the names that they have in the model itself.

    Raises:
        CheckpointError: two tensors have the same one.
    """
    plain = {unwrapped(name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        twice = [name for name, count in collections.Counter(map(unwrapped, tensors)).items() if count > 1]
        raise CheckpointError(
            f"{where} has {quote(twice)} twice, with and without {' or '.join((*WRAPPERS, PARALLEL))}; save the model "
            "alone"
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
        where: the index, or whatever lists the files.
        read: finds the tensors of one file.
        listed: what an index says: pairs of an entry, and the name of a file that holds it.
        entry_of: the entry of an index that a tensor belongs to.
        drop_rule: why a tensor is not needed, as `assemble` has it; what an index says of those does not matter.

    Raises:
        CheckpointError: files that are missing or cannot be read, a tensor that is in two, or an index that says
            otherwise than the files.
    """
    if listed is not None:
        listed = {(entry, file) for entry, file in listed if not drop_rule(entry)}
        needed = {file for _, file in listed}
        files = [file for file in files if file.name in needed or is_file(file)]
    if missing := [file for file in files if not is_file(file)]:
        raise CheckpointError(
            f"{where} lists {quote(file.name for file in missing)}: no such file beside it"
            f"{unfinished(missing[0].parent)}; fetch what is missing"
        )
    tensors: dict[str, Tensor] = {}
    stored = set()
    for file in files:
        found = read(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(f"{file} has {quote(twice)}, which another file has too; fetch both again")
        tensors |= found
        stored |= {(entry_of(name), file.name) for name in found if not drop_rule(name)}
    if listed is not None and (wrong := sorted(stored.symmetric_difference(listed))):
        raise CheckpointError(
            f"{where} and the files disagree about where these are: "
            f"{quote(f'{entry} in {file}' for entry, file in wrong)}; fetch all of them again"
        )
    return tensors


class Part(NamedTuple):
    """What a source tensor gives to one of our weights: `tensor[at][:rows].transpose(axes)`, flattened.

    Attributes:
        name: of the tensor.
        shape: that the whole tensor must have.
        at: leading indices of the piece that is meant.
        axes: the order of the piece's axes in our weight; None leaves it.
        rows: how many rows of the piece count; None takes all.
    """

    name: str
    shape: tuple[int, ...]
    at: tuple[int, ...] = ()
    axes: tuple[int, ...] | None = None
    rows: int | None = None


Parts = Mapping[str, tuple[Part, ...]]  # by our weight's name


class Rows(NamedTuple):
    """A part and the tensor it is of."""

    tensor: SourceTensor
    part: Part

    def pieces(self) -> Iterator[np.ndarray]:
        """The values in our order, as arrays of about 1 MiB, or of one row where that is longer."""
        _, _, at, axes, rows = self.part
        shape = self.tensor.shape[len(at) :]
        rows = shape[0] if rows is None else rows
        if axes is None:
            for start, stop in row_blocks((rows, *shape[1:])):
                yield self.tensor.read(at, start, stop)
            return
        view = self.tensor.read(at, 0, rows).transpose(axes)
        for start, stop in row_blocks(view.shape):
            yield np.ascontiguousarray(view[start:stop])


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Cuts the first axis into pieces of about `PIECE_BYTES` of float32, at least one row each."""
    step = max(1, PIECE_BYTES // max(4, 4 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


class Assembly(NamedTuple):
    """Our weights, each as rows of source tensors, and how many tensors were left out by each rule."""

    weights: dict[str, tuple[Rows, ...]]
    dropped: dict[str, int]


def assemble(
    where: Path,
    parts: Parts,
    tensors: Mapping[str, SourceTensor],
    drop_rule: Callable[[str], str | None] = lambda name: None,
) -> Assembly:
    """Finds every part among the tensors of a checkpoint.

    Args:
        where: what the message calls the checkpoint.
        drop_rule: why a tensor that is not needed may be left out; None if it may not.

    Raises:
        CheckpointError: lists every tensor that is missing, misshapen, of a dtype that cannot be read, or unknown.
    """
    expected = {part.name: part.shape for several in parts.values() for part in several}
    rules = {name: rule for name in tensors if name not in expected and (rule := drop_rule(name))}
    check_tensors(where, expected, {name: tensor for name, tensor in tensors.items() if name not in rules})
    weights = {ours: tuple(Rows(tensors[part.name], part) for part in several) for ours, several in parts.items()}
    return Assembly(weights, dict(collections.Counter(rules.values())))


def check_tensors(
    where: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, SourceTensor],
    dtypes: tuple[str, ...] = FLOAT_DTYPES,
) -> None:
    """Raises one `CheckpointError` that lists missing, unknown and misshapen tensors, and unusable dtypes.

    Where the names or dtypes show who has written such tensors, it says that first.
    """
    missing = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    unknown, misshapen, dtype = [], [], []
    for name, tensor in found.items():
        if name not in expected:
            unknown.append(f"unknown: {name!r} {tensor.shape}")
        elif tensor.shape != expected[name]:
            misshapen.append(f"misshapen: {name} is {tensor.shape}, the config says {expected[name]}")
        elif tensor.dtype not in dtypes:
            dtype.append(f"dtype: {name} is {tensor.dtype!r}, not {' or '.join(dtypes)}")
    problems = [line for lines in (missing, unknown, misshapen, dtype) for line in first_of(lines)]
    if problems:
        names = [*found, *{tensor.dtype for tensor in found.values()}]
        written = [how for sign, how in FOREIGN_TENSORS.items() if any(sign in name for name in names)]
        cause = f"{where} was written {written[0]}. " if written else ""
        raise CheckpointError("\n  ".join([f"{cause}the tensors of {where} do not fit its config:", *problems]))


def drop_by_name(rules: tuple[str, ...]) -> Callable[[str], str | None]:
    """A rule for `assemble`: tensors of these names, or below these prefixes (which end in a dot or a slash)."""

    def rule_of(name: str) -> str | None:
        for rule in rules:
            if name == rule or (rule[-1] in "./" and name.startswith(rule)):
                return rule
        return None

    return rule_of
