"""Loads checkpoints for processes that serve them, and names the checkpoint and the funnel that made a vector."""

import threading
from os import PathLike
from typing import Any
from weakref import WeakValueDictionary

from funnel_engine import Engine
from funnel_engine.checkpoints.native import MANIFEST, open_checkpoint
from funnel_engine.config import parse_funnel
from funnel_engine.input_files import hash_file, to_path

_engines: WeakValueDictionary[tuple[Any, ...], Engine] = WeakValueDictionary()
_lock = threading.Lock()


def shared_engine(checkpoint: str | PathLike[str], *, funnel: str | None = None, **options: Any) -> Engine:
    """The engine of a checkpoint folder with these options.

    Callers in one process get the same engine as long as one of them keeps it, so that an embedder of queries and an
    embedder of documents do not load the weights twice.

    Args:
        checkpoint: a folder that `convert` wrote.
        funnel: the short form, e.g. "6:2/mean" or "none"; None takes the checkpoint's own.
        options: further arguments of `Engine.load`.

    Raises:
        CheckpointError, ConfigError, BackendUnavailable: as `Engine.load`.
    """
    key = (fingerprint(checkpoint), funnel, *sorted(options.items()))
    with _lock:
        if (engine := _engines.get(key)) is None:
            parsed = None if funnel is None else parse_funnel(funnel)
            engine = _engines[key] = Engine.load(checkpoint, funnel=parsed, **options)
        return engine


def fingerprint(checkpoint: str | PathLike[str]) -> str:
    """The SHA-256 of a checkpoint's manifest, which contains the hashes of its other files.

    Raises:
        CheckpointError: the folder is not a complete checkpoint.
    """
    directory = to_path(checkpoint)
    open_checkpoint(directory)
    return hash_file(directory / MANIFEST)
