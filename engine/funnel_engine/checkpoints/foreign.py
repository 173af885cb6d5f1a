"""Recognizes what users often give instead of a complete model with plain weights, and names the remedy."""

import os
from pathlib import Path

from funnel_engine.input_files import check_file, is_file, optional_file, read_json, unfinished_downloads
from funnel_engine.messages import quote
from funnel_kernels.errors import CheckpointError

ADAPTER = "adapter_config.json"  # of peft; transformers and sentence-transformers look for it in every folder
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".npz", ".gguf")


def describe_unknown(path: Path) -> str:
    """The end of a message about a file or folder in an unknown format.

    Raises:
        CheckpointError: it is something with its own remedy.
    """
    if is_file(path):
        check_file(path)
        return "; give the folder of the model, with its config.json"
    refuse_adapter(path)
    return (
        ": it has no config.json or modules.json, no Orbax _METADATA, no .ckpt, no .weights.h5 and no .gguf"
        f"{other_weights(path)}{unfinished_downloads(path)}"
    )


def refuse_adapter(directory: Path) -> None:
    """Raises `CheckpointError` if a folder contains a peft adapter, which transformers would apply to its base."""
    file = optional_file(directory, ADAPTER)
    if file is None:
        return
    base = read_json(file).get("base_model_name_or_path")
    raise CheckpointError(
        f"{file} says that {directory} contains a peft adapter for the base model {base!r:.80}; this engine does not "
        "apply adapters. Merge the two with PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload() and save the "
        f"result; if the weights in this folder are already merged, delete {ADAPTER}"
    )


def other_weights(directory: Path) -> str:
    """For a message about missing weights: the files with weights of another format."""
    names = [name for name in sorted(os.listdir(directory)) if name.endswith(WEIGHTS)]
    return f", but {quote(names)}" if names else ""
