"""Merges a LoRA adapter of the peft library with its base: adapter_config.json and adapter_model.safetensors.

For a matrix W of the base, the adapter has A [rank, in] and B [out, rank]. The merged matrix is `W + scale * B @ A`,
where the scale is `lora_alpha / rank`, or `lora_alpha / sqrt(rank)` with `use_rslora`. DoRA also has a magnitude [out]:
the length to which each row of the merged matrix is scaled. A full copy of a tensor, e.g. of a classifier that was
trained with the adapter, replaces that of the base.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from funnel_engine.checkpoints.safetensors_file import StoredTensor, read_header
from funnel_engine.checkpoints.tensors import FLOAT_DTYPES, SourceTensor, unwrap
from funnel_engine.input_files import decode, is_file, optional_file, read_json, to_path
from funnel_engine.messages import abbreviate, quote, shorten
from funnel_kernels.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE_FILES = ("model.safetensors", "model.safetensors.index.json")
MERGE = "merge the two with PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload() and convert what you save"
# Fields of adapter_config.json that are followed, and those that do not change what the tensors say. `fan_in_fan_out`
# is only for layers of GPT-2's kind; peft ignores it for others.
FOLLOWED = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "task_type"}
NO_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "velora_config",
}
INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal", "eva")  # the others change the weights of the base
TASKS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
CLASSIFIERS = ("score.", "classifier.")  # what the names of their tensors begin with
PREFIX = "base_model.model."
MAX_RANK = 2**31 - 1
LORA = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?"
)
MATRIX, DORA = {"lora_A", "lora_B"}, {"lora_A", "lora_B", "lora_magnitude_vector"}
TABLE = {"lora_embedding_A", "lora_embedding_B"}
PATTERN = re.compile(r"\^?(\w|\\?\.)+")  # the simple patterns: a name, or the end of one

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The fields of adapter_config.json that decide the scale of each module.

    Attributes:
        rank_pattern, alpha_pattern: other values of `r` and `lora_alpha`, by the name of a module, or the end of it.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    def rank(self, module: str) -> int:
        return first_match(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        rank, alpha = self.rank(module), first_match(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


class MergedMatrix(NamedTuple):
    """A matrix of the base, merged with its adapter when it is read, in float32 (a `tensors.SourceTensor`)."""

    base: SourceTensor
    a: StoredTensor
    b: StoredTensor
    scale: float
    magnitude: StoredTensor | None

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def name(self) -> str:
        return f"{self.base.name}, merged with {self.a.path},"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> str:
        return "float32" if self.base.dtype in FLOAT_DTYPES else self.base.dtype

    def read(self, at: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        assert at == (), "a merged tensor is a matrix and is read by rows"
        weight = self.base.read((), start, stop).astype(np.float32)
        with np.errstate(all="ignore"):  # the reader of the values looks for NaN and infinity
            weight += np.float32(self.scale) * self.product(start, stop)
            if self.magnitude is not None:
                length = np.linalg.norm(weight, axis=1, keepdims=True)
                weight *= floats(self.magnitude, start, stop)[:, None] / length
        return weight

    def product(self, start: int, stop: int) -> np.ndarray:
        """Rows of `B @ A`."""
        return floats(self.b, start, stop) @ floats(self.a, 0, self.a.shape[0])


class MergedTable(MergedMatrix):
    """The same for an embedding table [ids, width], where the product is transposed."""

    def product(self, start: int, stop: int) -> np.ndarray:
        """Rows of `(B @ A).T`."""
        a = [self.a.read((rank,), start, stop).astype(np.float32) for rank in range(self.a.shape[0])]
        return np.stack(a, axis=1) @ floats(self.b, 0, self.b.shape[0]).T


def floats(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    return tensor.read((), start, stop).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in a folder.

    Attributes:
        base: the folder of its base, in Hugging Face or sentence-transformers format. It may be the same folder.
        dora: whether each matrix has a magnitude.
        task: the end of the name of the transformers class that it was trained with, if that has a classifier.
        updates: the tensors of each module by kind, e.g. "lora_A".
        copies: the full copies of tensors by name.
    """

    directory: Path
    base: Path
    scaling: Scaling
    dora: bool
    task: str | None
    updates: dict[str, dict[str, StoredTensor]]
    copies: dict[str, StoredTensor]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.directory / CONFIG, self.directory / WEIGHTS)

    def merge(
        self, base: Mapping[str, SourceTensor], prefixes: tuple[str, ...], drop_rule: Callable[[str], str | None]
    ) -> dict[str, SourceTensor]:
        """The tensors of the base with the adapter.

        Args:
            prefixes: what the encoder's tensors may begin with. The base and the adapter may have different ones.
            drop_rule: why a tensor is not needed, see `tensors.assemble`.

        Raises:
            CheckpointError: the adapter does not fit the base; the message lists all of its modules that do not.
        """
        prefixes = tuple(sorted({*prefixes, "model.", ""}, key=len, reverse=True))

        def bare(name: str) -> str:
            return next(name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix))

        merged, names = dict(base), {bare(name): name for name in base}

        def name_in_base(name: str) -> str:
            return name if name in base else names.get(bare(name), name)

        problems = []
        for name, copy in self.copies.items():
            name = name_in_base(name)
            if name in base and copy.shape != base[name].shape:
                problems.append(f"misshapen: the copy of {name!r} is {copy.shape}, but the base has {base[name].shape}")
            elif name not in base and not name.startswith(CLASSIFIERS) and not drop_rule(name):
                problems.append(f"unknown: the base has no tensor {name!r}")
            merged[name] = copy
        changed: dict[str, str] = {}
        for module, tensors in self.updates.items():
            name = name_in_base(f"{module}.weight")
            if name in changed:
                problems.append(f"{module!r} and {changed[name]!r} are the same module of the base")
            changed[name] = module
            if name not in merged and drop_rule(name):
                merged[name] = next(iter(tensors.values()))  # is counted as left out
            elif name not in merged:
                problems.append(f"unknown: the base has no tensor {name!r}")
            elif problem := self.misfit(module, tensors, merged[name].shape):
                problems.append(problem)
            else:
                merged[name] = self.merged_tensor(module, tensors, merged[name])
        if problems:
            raise CheckpointError(
                "\n  ".join(
                    [
                        f"the adapter in {self.directory} does not fit its base {self.base}; give the base that it was "
                        "trained on (--base), or save the adapter again:",
                        *abbreviate(problems),
                    ]
                )
            )
        return merged

    def misfit(self, module: str, tensors: dict[str, StoredTensor], shape: tuple[int, ...]) -> str | None:
        """What is wrong with the tensors of a module whose weight has this shape; None if they fit."""
        kinds = tensors.keys()
        needed = TABLE if kinds & TABLE else DORA if self.dora else MATRIX
        if kinds != needed:
            return f"{module!r} has {' and '.join(sorted(kinds))}; it must have {' and '.join(sorted(needed))}"
        if kinds == TABLE and self.dora:
            return f"{module!r} is an embedding with DoRA, which is not supported; {MERGE}"
        if wrong := [
            f"{tensor.name!r} is {tensor.dtype!r}" for tensor in tensors.values() if tensor.dtype not in FLOAT_DTYPES
        ]:
            return f"dtype: {wrong[0]}, not {' or '.join(FLOAT_DTYPES)}"
        if len(shape) != 2:
            return f"misshapen: {module!r} has a weight {shape} in the base; only a matrix can have an adapter"
        rank, (rows, columns) = self.scaling.rank(module), shape
        shapes = {
            "lora_A": (rank, columns),
            "lora_B": (rows, rank),
            "lora_embedding_A": (rank, rows),
            "lora_embedding_B": (columns, rank),
            "lora_magnitude_vector": (rows,),
        }
        for kind, tensor in tensors.items():
            if tensor.shape != shapes[kind]:
                return (
                    f"misshapen: {tensor.name!r} is {tensor.shape}; for rank {rank} and a weight {shape} in the base "
                    f"it must be {shapes[kind]}"
                )
        return None

    def merged_tensor(self, module: str, tensors: dict[str, StoredTensor], base: SourceTensor) -> MergedMatrix:
        scale = self.scaling.scale(module)
        if tensors.keys() == TABLE:
            return MergedTable(base, tensors["lora_embedding_A"], tensors["lora_embedding_B"], scale, None)
        return MergedMatrix(base, tensors["lora_A"], tensors["lora_B"], scale, tensors.get("lora_magnitude_vector"))

    def check_base(self, encoder: Path) -> None:
        """Raises `CheckpointError` if the folder of the base's encoder contains another adapter."""
        if encoder.resolve() != self.directory.resolve() and is_adapter(encoder):
            raise CheckpointError(
                f"{encoder}, the base of the adapter in {self.directory}, is itself an adapter; merge it with its own "
                "base first (merge_and_unload), and give the result with --base"
            )

    def with_task(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The content of the base's config.json, for the class that the adapter was trained with.

        If the base is no classifier, the number of labels is that of the adapter's classifier. Their names are unknown.
        """
        architectures = decode(tuple[str, ...], fields.get("architectures") or [], "architectures in config.json")
        matrices = [copy for name, copy in self.copies.items() if name.startswith(CLASSIFIERS) and len(copy.shape) == 2]
        classifier = next((copy for copy in matrices if copy.size > 0), None)
        known = any(name.endswith(task) for name in architectures for task in TASKS.values())
        if self.task is None or known:
            return fields
        if classifier is None:
            raise CheckpointError(
                f"the adapter in {self.directory} was trained with a {self.task} model, but neither it nor its base "
                f"{self.base} contains a classifier; save the adapter with modules_to_save=['score']"
            )
        return fields | {"architectures": [self.task], "num_labels": classifier.shape[0], "id2label": None}


def is_adapter(directory: Path) -> bool:
    return is_file(directory / CONFIG)


def find_adapter(directory: Path, root: Path, base: Path | None) -> Adapter | None:
    """The adapter in a folder; None if there is none.

    Args:
        root: the folder of the source, which contains `directory` or is the same.
        base: the folder of the adapter's base. None finds it, see `find_base`.

    Raises:
        CheckpointError: the adapter is not of a supported kind, is damaged, or its base is not found; or there is no
            adapter, but a base was given.
    """
    file = optional_file(directory, CONFIG)
    if root != directory and is_adapter(root):
        raise CheckpointError(
            f"{root / CONFIG} is not beside the encoder, which is in {directory}; move the adapter there, or delete it"
        )
    if file is None:
        if base is not None:
            raise CheckpointError(
                f"{directory} has no {CONFIG}, so it is not an adapter and needs no base; leave --base {base} out"
            )
        return None
    fields = read_json(file)
    check_fields(file, fields)
    scaling = read_scaling(file, fields)
    dora = decode(bool | None, fields.get("use_dora"), f"{file}: use_dora") or False
    updates, copies = read_tensors(directory)
    name = decode(str | None, fields.get("base_model_name_or_path"), f"{file}: base_model_name_or_path") or ""
    return Adapter(
        directory=directory,
        base=find_base(directory, root, name, base),
        scaling=scaling,
        dora=dora,
        task=read_task(file, fields),
        updates=updates,
        copies=copies,
    )


def check_fields(file: Path, fields: dict[str, Any]) -> None:
    """Raises `CheckpointError` if the adapter is of another kind, or has an option that the engine does not support."""
    if fields.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{file}: peft_type is {shorten(fields.get('peft_type'))}; this engine merges adapters of the type 'LORA'. "
            f"For another type, {MERGE}"
        )
    if other := [name for name, value in fields.items() if value and name not in FOLLOWED | NO_EFFECT]:
        raise CheckpointError(f"{file} has options that this engine does not support: {quote(sorted(other))}; {MERGE}")
    if (initialization := fields.get("init_lora_weights")) not in INITIALIZATIONS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {shorten(initialization)}, which has changed the weights of the base before "
            "the training; save the adapter with peft's path_initial_model_for_weight_conversion, which makes it fit "
            f"the original base, or {MERGE}"
        )


def read_scaling(file: Path, fields: dict[str, Any]) -> Scaling:
    scaling = Scaling(
        decode(int, fields.get("r"), f"{file}: r"),
        decode(float, fields.get("lora_alpha"), f"{file}: lora_alpha"),
        decode(bool | None, fields.get("use_rslora"), f"{file}: use_rslora") or False,
        decode(dict[str, int] | None, fields.get("rank_pattern"), f"{file}: rank_pattern") or {},
        decode(dict[str, float] | None, fields.get("alpha_pattern"), f"{file}: alpha_pattern") or {},
    )
    for rank in (scaling.r, *scaling.rank_pattern.values()):
        if not 1 <= rank <= MAX_RANK:
            raise CheckpointError(
                f"{file} has the rank {shorten(rank)}; it must be from 1 to {MAX_RANK:,}, so save the adapter again"
            )
    for pattern in (*scaling.rank_pattern, *scaling.alpha_pattern):
        if not PATTERN.fullmatch(pattern):
            raise CheckpointError(
                f"{file}: {pattern!r:.80} in rank_pattern or alpha_pattern is a regular expression; this engine only "
                f"supports the name of a module, or the end of one. Write the names, or {MERGE}"
            )
    return scaling


def first_match(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first pattern that is the module's name, or the end of it after a dot. "^" allows no end."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").replace("\\", "")
        if module == name or (name == pattern.replace("\\", "") and module.endswith(f".{name}")):
            return value
    return default


def read_task(file: Path, fields: dict[str, Any]) -> str | None:
    """The end of the name of the class that the adapter was trained with, if that has a classifier."""
    if (task_type := decode(str | None, fields.get("task_type"), f"{file}: task_type")) is not None:
        return TASKS.get(task_type)
    mapping = decode(dict[str, Any] | None, fields.get("auto_mapping"), f"{file}: auto_mapping") or {}
    name = decode(str | None, mapping.get("base_model_class"), f"{file}: auto_mapping.base_model_class") or ""
    return next((task for task in TASKS.values() if name.endswith(task)), None)


def read_tensors(directory: Path) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """The tensors of an adapter: `updates` and `copies` of `Adapter`."""
    file = optional_file(directory, WEIGHTS)
    if file is None:
        raise CheckpointError(
            f"{directory} has {CONFIG} but no {WEIGHTS}; load the adapter with peft and save it again, which writes "
            f"safetensors. If the weights in this folder are already merged, delete {CONFIG}"
        )
    updates: dict[str, dict[str, StoredTensor]] = {}
    copies: dict[str, StoredTensor] = {}
    twice = []
    for name, tensor in unwrap(file, read_header(file)).items():
        name = name.removeprefix(PREFIX)
        if update := LORA.fullmatch(name):
            of_kind, key = updates.setdefault(update["module"], {}), update["kind"]
        else:
            of_kind, key = copies, name.replace(".base_layer.", ".")
        if key in of_kind:
            twice.append(name)
        of_kind[key] = tensor
    if twice:
        raise CheckpointError(f"{file} has {quote(twice)} twice, with different spellings; save the adapter again")
    if not updates and not copies:
        raise CheckpointError(f"{file} contains no tensors; save the adapter again")
    return updates, copies


def find_base(directory: Path, root: Path, name: str, given: Path | None) -> Path:
    """The folder of an adapter's base.

    It is the given one; else the adapter's own, if it has weights; else a folder beside it with the last part of the
    base's name, or the folder with that name.

    Args:
        root: the folder of the source, which contains that of the adapter or is the same.

    Raises:
        CheckpointError: it is not found.
    """
    if given is None and any(is_file(directory / weights) for weights in BASE_FILES):
        return directory
    if given is not None:
        tried = [given]
    else:
        beside = name.rstrip("/").rpartition("/")[2]
        tried = [to_path(folder.absolute().parent / beside) for folder in (directory, root)] + [to_path(name)]
        tried = [] if ".." in Path(name).parts or beside in ("", ".") else tried
    for folder in tried:
        if folder.is_dir() and folder.resolve() not in (directory.resolve(), root.resolve()):
            return folder
    looked = f" (looked for {', '.join(dict.fromkeys(map(str, tried)))})" if tried else ""
    raise CheckpointError(
        f"the base {name!r:.80} of the adapter in {directory} is not found{looked}; fetch it in Hugging Face format "
        "and give its folder with --base"
    )
