"""Converts a checkpoint into our own format, so that what exists under the destination's name is always complete."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funnel_engine.checkpoints.formats import read_source
from funnel_engine.checkpoints.native import MANIFEST, synchronize, write_checkpoint
from funnel_engine.config import check_flag
from funnel_engine.input_files import is_file, to_path
from funnel_engine.weights import DTYPES, check_dtype, count_parameters, expected_shapes
from funnel_kernels.errors import CheckpointError

if TYPE_CHECKING:
    from rich.progress import Progress


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: Any = "bfloat16",
    overwrite: bool = False,
    format: str | None = None,
    sliding_window: int | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Converts a Gemma, EmbeddingGemma or T5Gemma checkpoint for `Engine.load`.

    Reads and writes piece by piece; memory holds at most one tensor, whatever the size of the model. The destination
    appears, by a rename, once it is complete and on the disk; a run that fails leaves nothing behind, and what a
    killed run has left is removed by the next one to the same destination.

    Args:
        source: a file or folder in one of the formats of docs/checkpoints.md.
        destination: the directory to make.
        dtype: what the weights are rounded to, "bfloat16" or "float32", or these as NumPy or JAX have them.
        overwrite: replace `destination` if it is a checkpoint. The old one stays until the new one is complete.
        format: of the source, a key of `formats.FORMATS`; None detects it from the content.
        sliding_window: stands for the config's, where an old save has written a wrong one.
        allow_nonfinite: convert weights that are NaN or infinite as they are.

    Raises:
        CheckpointError: a source that is missing, damaged or of a form that the engine does not run; a destination
            that exists or cannot be written.
        ConfigError: another dtype or format, or an option of another type.
    """
    dtype = check_dtype(dtype)
    overwrite, allow_nonfinite = check_flag("overwrite", overwrite), check_flag("allow_nonfinite", allow_nonfinite)
    source, destination = to_path(source), to_path(destination)
    with writing(destination):
        destination = destination.resolve()
        clear_up(destination)
        check_destination(destination, source.resolve(), overwrite)
    model = read_source(source, format, sliding_window)
    size = count_parameters(expected_shapes(model.config, model.head)) * DTYPES[dtype].itemsize
    with writing(destination):
        free = shutil.disk_usage(destination.parent).free
        if size > free:
            raise CheckpointError(
                f"{destination} needs {size / 1e9:,.2f} GB, but {free / 1e9:,.2f} GB are free on its disk; make room "
                "or choose another place"
            )
        with staging_directory(destination) as staging, progress_bar() as progress:
            task = progress.add_task(f"Converting to {dtype}", total=size)
            advance = partial(progress.advance, task)
            write_checkpoint(staging / "new", model, dtype, allow_nonfinite=allow_nonfinite, advance=advance)
            publish(staging / "new", destination, staging / "old" if overwrite else None)


@contextlib.contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Turns what the file system refuses at a destination into `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {destination}: {error.strerror or error}; nothing was left behind. Make room or choose a "
            "place that can be written"
        ) from error


def check_destination(destination: Path, source: Path, overwrite: bool) -> None:
    """Raises `CheckpointError` unless the destination is free, or a checkpoint that may be replaced."""
    if destination == source or source in destination.parents or destination in source.parents:
        raise CheckpointError(f"destination {destination} and source {source} lie in each other; choose another place")
    if not destination.parent.is_dir():
        raise CheckpointError(
            f"{destination.parent}, where {destination.name} shall be, is not a directory; make it first"
        )
    if not destination.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{destination} exists; choose another name, or overwrite it (--overwrite)")
    if not is_file(destination / MANIFEST):
        raise CheckpointError(f"{destination} is not a checkpoint, so it is not overwritten; choose another name")


def clear_up(destination: Path) -> None:
    """Removes what killed conversions to this destination have left.

    One that was killed between the two renames of `publish` has left the old checkpoint, which comes back first.
    """
    prefix = glob.escape(staging_prefix(destination))
    for left in destination.parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), locked(left):
            if (left / "old").is_dir() and not destination.exists():
                (left / "old").rename(destination)
            shutil.rmtree(left)


def staging_prefix(destination: Path) -> str:
    return f".{destination.name}.converting-"


@contextlib.contextmanager
def staging_directory(destination: Path) -> Iterator[Path]:
    """A new hidden directory beside `destination`, removed on leaving.

    Its owner holds a lock on it, which ends with the process however that ends; `clear_up` spares what is locked.
    """
    with (
        tempfile.TemporaryDirectory(
            prefix=staging_prefix(destination), dir=destination.parent, ignore_cleanup_errors=True
        ) as name,
        contextlib.ExitStack() as stack,
    ):
        with contextlib.suppress(OSError):  # a file system without locks; there, nobody removes what others have left
            stack.enter_context(locked(Path(name)))
        yield Path(name)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the lock on a directory. Raises `OSError` if another process has it, or the file system has no locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def publish(new: Path, destination: Path, old: Path | None) -> None:
    """Renames `new` to `destination`. What is there moves to `old`, and back again if that fails."""
    if old is not None and destination.exists():
        destination.rename(old)
    try:
        new.rename(destination)
    except BaseException as error:
        if old is not None and old.exists():
            old.rename(destination)
        elif isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise CheckpointError(f"{destination} was made by another conversion meanwhile, and stays") from error
        raise
    synchronize(destination.parent)


def progress_bar() -> "Progress":
    """Bytes written, speed and time left, on standard error if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)
