"""What every format's reader finds out about a checkpoint; the values of its tensors stay on disk."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from funnel_engine.checkpoints.tensors import Rows
from funnel_engine.config import ModelConfig
from funnel_engine.heads import HeadConfig
from funnel_engine.text import TextConfig


@dataclasses.dataclass(frozen=True)
class SourceModel:
    """A model found in a source.

    Attributes:
        format: name of the format, a key of `formats.FORMATS`.
        weights: the rows of source tensors that make each of our weights, one after another.
        dropped: how many tensors an encoder does not need, by the rule that says so.
        tokenizer_file: tokenizer.json, or a SentencePiece model; None takes token ids only.
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
        """Those that hold weights, in order of name."""
        paths = {rows.tensor.path for several in self.weights.values() for rows in several}
        files = {file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}
        return sorted(files)
