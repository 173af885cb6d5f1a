"""The result of the readers of all formats: a model without the values of its tensors."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from funnel_engine.checkpoints.tensors import Rows
from funnel_engine.config import ModelConfig
from funnel_engine.heads import HeadConfig
from funnel_engine.text import TextConfig


@dataclasses.dataclass(frozen=True)
class SourceModel:
    """A model in a source checkpoint.

    Attributes:
        format: the name of the format, a key of `formats.FORMATS`.
        weights: for each of our weights, the rows of source tensors that it consists of, in order.
        dropped: how many tensors are left out because an encoder does not need them, by the rule for leaving them out.
        tokenizer_file: tokenizer.json, or a SentencePiece model; None if there is no tokenizer.
        directory: the folder of the source.
    """

    format: str
    config: ModelConfig
    head: HeadConfig
    weights: Mapping[str, tuple[Rows, ...]]
    dropped: dict[str, int]
    text: TextConfig
    tokenizer_file: Path | None
    directory: Path

    @property
    def files(self) -> list[Path]:
        """The files that contain weights, sorted by name."""
        paths = {rows.tensor.path for weight in self.weights.values() for rows in weight}
        files = {file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}
        return sorted(files)
