"""The formats that `convert` reads, and how a source's format is known."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from funnel_engine.checkpoints import gemma_pytorch, hugging_face, keras_hub, native, orbax
from funnel_engine.checkpoints.foreign import name_foreign
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.config import check_option
from funnel_engine.input_files import check_file, is_file, reading, to_path
from funnel_kernels.errors import CheckpointError


class Format(NamedTuple):
    """One format.

    Attributes:
        matches: whether a file or folder looks like it, from what is in it.
        read: finds out what it holds; arguments are the path, and the sliding window that stands for the config's.
    """

    matches: Callable[[Path], bool]
    read: Callable[[Path, int | None], SourceModel]


# In this order; the first that matches is taken.
FORMATS = {
    "funnel": Format(native.matches, native.read_source),
    "keras": Format(keras_hub.matches, keras_hub.read_keras),
    "orbax": Format(orbax.matches, orbax.read_orbax),
    "gemma_pytorch": Format(gemma_pytorch.matches, gemma_pytorch.read_gemma_pytorch),
    "hugging_face": Format(hugging_face.matches, hugging_face.read_hugging_face),
}


def detect_format(path: Path) -> str:
    """The name of a source's format, from its content.

    Raises:
        CheckpointError: there is nothing at `path`, or nothing that is known.
    """
    path = to_path(path)
    with reading(path):
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; give the file or folder that holds the model")
        for name, form in FORMATS.items():
            if form.matches(path):
                return name
        raise CheckpointError(f"{path} is in no format that is known ({', '.join(FORMATS)}){name_foreign(path)}")


def read_source(path: Path, form: str | None = None, sliding_window: int | None = None) -> SourceModel:
    """Finds out what a source holds, without reading the values of its tensors.

    Args:
        form: name of its format; None detects it.
        sliding_window: stands for the config's, e.g. 512 where an old save has halved EmbeddingGemma's to 257.

    Raises:
        CheckpointError: a source that is missing, damaged or of a form that the engine does not run.
        ConfigError: no such format.
    """
    path = to_path(path)
    if form is None:
        form = detect_format(path)
    check_option("format", form, tuple(FORMATS))
    with reading(path):
        if is_file(path):
            check_file(path)
        return FORMATS[form].read(path, sliding_window)
