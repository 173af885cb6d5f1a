"""The result of the readers of all formats: a model without the values of its tensors."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from funnel_engine.checkpoints.tensors import Rows
from funnel_engine.config import Funnel, FunnelConfig
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.heads import HeadConfig
from funnel_engine.text import TextConfig


class Agreement(NamedTuple):
    """The share of the ten nearest texts that two models agree on, on texts held out of training.

    Attributes:
        mean: the mean over the texts, from 0 to 1.
        low, high: its 95 % confidence interval.
    """

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class TrainingRecord:
    """How the weights of a checkpoint were trained for its funnel, or without one if it has none.

    Attributes:
        method: the command, "distill" or "finetune".
        source: SHA-256 of the manifest of the checkpoint that training began with.
        data: SHA-256 of the training data.
        loss: the loss function, and which weights were trained.
        steps: number of optimizer steps.
        agreement: with the checkpoint that training began with, unfunneled; None if it was not measured.
        held_out: figures on data held out of training, by name.
        versions: of the packages that computed it, by name.
    """

    method: str
    source: str
    data: str
    loss: str
    steps: int
    agreement: Agreement | None
    held_out: dict[str, float]
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class SourceModel:
    """A model in a source checkpoint.

    Attributes:
        format: the name of the format, a key of `formats.FORMATS`.
        weights: for each of our weights, the rows of source tensors that it consists of, in order.
        dropped: how many tensors are left out because an encoder does not need them, by the rule for leaving them out.
        tokenizer_file: tokenizer.json, or a SentencePiece model; None if there is no tokenizer.
        directory: the folder of the source.
        funnel: the funnel that the model is meant to run with.
        training: how it was trained for this funnel; None if it was not.
        quantized: the quantized types that the weights had in their first source, e.g. "Q4_K", and how many tensors had
            each; the weights are then not those that were published. Empty: none were.
        tokenizer_json: the content of a tokenizer.json that the reader made; then `tokenizer_file` is None.
        adapter_files: the files of an adapter that is merged with the weights.
    """

    format: str
    config: EncoderConfig
    head: HeadConfig
    weights: Mapping[str, tuple[Rows, ...]]
    dropped: dict[str, int]
    text: TextConfig
    tokenizer_file: Path | None
    directory: Path
    funnel: Funnel = FunnelConfig()
    training: TrainingRecord | None = None
    quantized: dict[str, int] = dataclasses.field(default_factory=dict)
    tokenizer_json: str | None = None
    adapter_files: tuple[Path, ...] = ()

    @property
    def files(self) -> list[Path]:
        """The files that contain weights, and those of an adapter, sorted by name."""
        paths = {rows.tensor.path for weight in self.weights.values() for rows in weight}
        files = {file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}
        return sorted({*files, *self.adapter_files})

    def name_of(self, file: Path) -> str:
        """The path of a file, relative to the folder of the source; that of an adapter's base may begin with ".."."""
        if file.is_relative_to(self.directory):
            return file.relative_to(self.directory).as_posix()
        return Path(os.path.relpath(file, self.directory)).as_posix()
