"""The formats that `convert` reads, and the detection of a source's format."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from funnel_engine.checkpoints import (
    funnel_transformer,
    funnel_transformer_pytorch,
    gemma_pytorch,
    gguf,
    hugging_face,
    keras_hub,
    native,
    orbax,
)
from funnel_engine.checkpoints.foreign import describe_unknown
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.checks import check_option
from funnel_engine.input_files import check_file, is_file, reading, to_path
from funnel_kernels.errors import CheckpointError, ConfigError


class Format(NamedTuple):
    """One format.

    Attributes:
        matches: whether the content of a file or folder has this format.
        read: reads the model without its values; its arguments are the path and `sliding_window` of `convert`, and for
            "hugging_face" also `base`.
    """

    matches: Callable[[Path], bool]
    read: Callable[..., SourceModel]


# Checked in this order; the first that matches is used.
FORMATS = {
    "funnel": Format(native.matches, native.read_source),
    "keras": Format(keras_hub.matches, keras_hub.read_keras),
    "orbax": Format(orbax.matches, orbax.read_orbax),
    "funnel_transformer": Format(funnel_transformer.matches, funnel_transformer.read_funnel_transformer),
    "funnel_transformer_pytorch": Format(
        funnel_transformer_pytorch.matches, funnel_transformer_pytorch.read_funnel_transformer_pytorch
    ),
    "gemma_pytorch": Format(gemma_pytorch.matches, gemma_pytorch.read_gemma_pytorch),
    "gguf": Format(gguf.matches, gguf.read_gguf),
    "hugging_face": Format(hugging_face.matches, hugging_face.read_hugging_face),
}


def detect_format(path: Path) -> str:
    """The name of a source's format, from its content.

    Raises:
        CheckpointError: `path` does not exist, or its format is unknown.
    """
    path = to_path(path)
    with reading(path):
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; give the file or folder of the model")
        for name, form in FORMATS.items():
            if form.matches(path):
                return name
        raise CheckpointError(f"the format of {path} is not known ({', '.join(FORMATS)}){describe_unknown(path)}")


def read_source(
    path: Path, form: str | None = None, sliding_window: int | None = None, base: Path | None = None
) -> SourceModel:
    """Reads a source without the values of its tensors.

    Args:
        form: the name of its format; None detects it.
        sliding_window: replaces the value in the config, e.g. by 512 if an old save halved EmbeddingGemma's to 257.
        base: the folder of the base model of an adapter; None finds it.

    Raises:
        CheckpointError: the source is missing, damaged or not supported.
        ConfigError: the format is unknown, or has no adapters but a base is given.
    """
    path = to_path(path)
    if form is None:
        form = detect_format(path)
    check_option("format", form, tuple(FORMATS))
    if base is not None and form != "hugging_face":
        raise ConfigError(f"{path} is in the format {form}, which has no adapters; leave the base {base} out")
    options = {} if base is None else {"base": to_path(base)}
    with reading(path):
        if is_file(path):
            check_file(path)
        return FORMATS[form].read(path, sliding_window, **options)
