"""What users often give that is not a whole model of plain weights: named, with the remedy."""

import os
from pathlib import Path

from funnel_engine.input_files import check_file, is_file, optional_file, read_json, unfinished
from funnel_engine.messages import quote
from funnel_kernels.errors import CheckpointError

ADAPTER = "adapter_config.json"  # of peft; transformers and sentence-transformers look for it in every folder
GGUF = ".gguf"
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".npz", GGUF)


def name_foreign(path: Path) -> str:
    """What a file or folder in no known format is, as the end of a message.

    Raises:
        CheckpointError: it is something that has a remedy of its own.
    """
    if is_file(path):
        check_file(path)
        return "; give the folder that holds the model, with its config.json"
    refuse_adapter(path)
    return (
        ": it has no config.json or modules.json, no Orbax _METADATA, no .ckpt and no .weights.h5"
        f"{other_weights(path)}{unfinished(path)}"
    )


def refuse_adapter(directory: Path) -> None:
    """Raises `CheckpointError` if a folder holds an adapter of peft, which transformers would put on its base."""
    file = optional_file(directory, ADAPTER)
    if file is None:
        return
    base = read_json(file).get("base_model_name_or_path")
    raise CheckpointError(
        f"{file} says that {directory} holds an adapter of peft for the base model {base!r:.80}; this engine does not "
        "apply adapters. Merge the two with PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload() and save the "
        f"result; if the weights in this folder contain it already, delete {ADAPTER}"
    )


def other_weights(directory: Path) -> str:
    """For a message about weights that are missing: files with weights under names that this engine does not read.

    Raises:
        CheckpointError: they are GGUF files.
    """
    names = [name for name in sorted(os.listdir(directory)) if name.endswith(WEIGHTS)]
    if names and all(name.endswith(GGUF) for name in names):
        check_file(directory / names[0])
    return f", but {quote(names)}" if names else ""
