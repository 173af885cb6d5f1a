"""Recognizes what users often give instead of a complete model with plain weights, and names the remedy."""

import os
from pathlib import Path

from funnel_engine.input_files import check_file, is_file, unfinished_downloads
from funnel_engine.messages import quote

WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".npz", ".gguf")


def describe_unknown(path: Path) -> str:
    """The end of a message about a file or folder in an unknown format.

    Raises:
        CheckpointError: it is something with its own remedy.
    """
    if is_file(path):
        check_file(path)
        return "; give the folder of the model, with its config.json"
    return (
        ": it has no config.json or modules.json, no Orbax _METADATA, no .ckpt, no .weights.h5 and no .gguf"
        f"{other_weights(path)}{unfinished_downloads(path)}"
    )


def other_weights(directory: Path) -> str:
    """For a message about missing weights: the files with weights of another format."""
    names = [name for name in sorted(os.listdir(directory)) if name.endswith(WEIGHTS)]
    return f", but {quote(names)}" if names else ""
