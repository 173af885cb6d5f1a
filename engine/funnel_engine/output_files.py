"""Writes result files so that a file with the given name is always complete."""

import os
from pathlib import Path

from funnel_kernels.errors import InputError


def check_writable(path: Path, endings: tuple[str, ...]) -> None:
    """Raises `InputError` unless the file can be made and its name ends in one of `endings`."""
    if path.suffix not in endings:
        raise InputError(f"{path.name!r} must end in {' or '.join(endings)}")
    if path.is_dir():
        raise InputError(f"{path} is a directory; give the name of a file")
    if not path.resolve().parent.is_dir():
        raise InputError(f"cannot write {path.name}: {path.parent} is not a directory; make it first")


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and then renames it.

    Raises:
        InputError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    finally:
        partial.unlink(missing_ok=True)
