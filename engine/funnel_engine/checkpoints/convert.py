"""Converts a checkpoint to our own format. A destination that exists is always complete."""

import contextlib
import dataclasses
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
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.checks import check_flag
from funnel_engine.config import Funnel, FunnelLike, check_funnel, read_funnel
from funnel_engine.input_files import is_file, to_path
from funnel_engine.weights import EIGHT_BITS, check_dtype, count_bytes, expected_shapes
from funnel_kernels.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: Any = "bfloat16",
    overwrite: bool = False,
    funnel: FunnelLike | None = None,
    format: str | None = None,
    sliding_window: int | None = None,
    allow_nonfinite: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> None:
    """Converts a checkpoint for `Engine.load`.

    Reads and writes piece by piece, so memory contains at most one tensor. The destination appears, by a rename, when
    it is complete and on the disk. A run that fails leaves no files. The files of a run that was killed are removed by
    the next run to the same destination.

    Args:
        source: a file or folder in one of the formats of docs/checkpoints.md.
        destination: the directory to make.
        dtype: the dtype to which the weights are rounded: "bfloat16", "float32", "int8" or "float8_e4m3fn", or the
            NumPy or JAX dtype. With the last two the matrices of the encoder and its embedding table get a scale for
            each row, and the other weights are float32.
        overwrite: replace `destination` if it is a checkpoint. The old one is kept until the new one is complete.
        funnel: the funnel that `Engine.load` will use if it is given none; as there, it may be a list by length. None
            keeps the source's, which only a converted checkpoint has.
        format: the format of the source, a key of `formats.FORMATS`; None detects it from the content.
        sliding_window: replaces the value in the source's config, if an old save wrote a wrong one.
        allow_nonfinite: accept weights that are NaN or infinite; not with 8 bits, which cannot represent them.
        base: the folder of the base model, if the source is a LoRA adapter. None finds it in the same folder, beside it
            by the name in adapter_config.json, or where that says.

    Raises:
        CheckpointError: the source is missing, damaged or not supported, or the destination exists or cannot be
            written.
        ConfigError: the dtype or the format is unknown, an option has a wrong type, the funnel does not fit the model,
            or the source was trained for another funnel.
    """
    dtype = check_dtype(dtype)
    overwrite, allow_nonfinite = check_flag("overwrite", overwrite), check_flag("allow_nonfinite", allow_nonfinite)
    if dtype in EIGHT_BITS and allow_nonfinite:
        raise ConfigError(
            f"{dtype} cannot represent NaN or infinity; leave allow_nonfinite out, or use dtype='bfloat16'"
        )
    source, destination = to_path(source), to_path(destination)
    destination = prepare_destination(destination, source, overwrite)
    model = read_source(source, format, sliding_window, None if base is None else to_path(base))
    if funnel is not None:
        model = with_funnel(model, read_funnel(funnel))
    save(model, destination, dtype, overwrite=overwrite, allow_nonfinite=allow_nonfinite)


def with_funnel(model: SourceModel, funnel: Funnel) -> SourceModel:
    """The model, to be run with `funnel` by default. A record of training without a funnel is left out.

    Raises:
        ConfigError: the funnel does not fit the model, or the model was trained for another one.
    """
    check_funnel(model.config, funnel)
    if funnel == model.funnel:
        return model
    if model.training is not None and model.funnel.total_stride > 1:
        raise ConfigError(
            f"{model.directory} was trained for the funnel {model.funnel}; another one, {funnel}, cannot be stored "
            "with it. Give it to Engine.load, or convert the checkpoint that training began with"
        )
    return dataclasses.replace(model, funnel=funnel, training=None)


def prepare_destination(destination: Path, source: Path, overwrite: bool) -> Path:
    """The resolved path of a checkpoint that will be written, after a check that it may be.

    Raises:
        CheckpointError: the destination exists, overlaps the source, or cannot be written.
    """
    with writing(destination):
        destination = destination.resolve()
        remove_leftovers(destination)
        check_destination(destination, source.resolve(), overwrite)
    return destination


def save(
    model: SourceModel, destination: Path, dtype: str, *, overwrite: bool = False, allow_nonfinite: bool = False
) -> None:
    """Writes a model as a checkpoint at a path from `prepare_destination`, where it appears when it is complete.

    Raises:
        CheckpointError: the model cannot be read, a weight is not finite, or the destination cannot be written.
    """
    size = count_bytes(expected_shapes(model.config, model.head), dtype)
    with writing(destination):
        free = shutil.disk_usage(destination.parent).free
        if size > free:
            raise CheckpointError(
                f"{destination} needs {size / 1e9:,.2f} GB, but {free / 1e9:,.2f} GB are free on its disk; free some "
                "space or choose another folder"
            )
        with staging_directory(destination) as staging, progress_bar() as progress:
            task = progress.add_task(f"Converting to {dtype}", total=size)
            advance = partial(progress.advance, task)
            write_checkpoint(staging / "new", model, dtype, allow_nonfinite=allow_nonfinite, advance=advance)
            publish(staging / "new", destination, staging / "old" if overwrite else None)


@contextlib.contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Turns errors of the file system at a destination into `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {destination}: {error.strerror or error}; no files were left. Free some space or choose a "
            "folder that can be written"
        ) from error


def check_destination(destination: Path, source: Path, overwrite: bool) -> None:
    """Raises `CheckpointError` unless the destination does not exist, or is a checkpoint that may be replaced."""
    if destination == source or source in destination.parents or destination in source.parents:
        raise CheckpointError(
            f"destination {destination} and source {source} overlap; choose a destination outside the source"
        )
    if not destination.parent.is_dir():
        raise CheckpointError(f"cannot make {destination.name}: {destination.parent} is not a directory; make it first")
    if not destination.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{destination} exists; choose another name, or overwrite it (--overwrite)")
    if not is_file(destination / MANIFEST):
        raise CheckpointError(f"{destination} is not a checkpoint, so it is not overwritten; choose another name")


def remove_leftovers(destination: Path) -> None:
    """Removes the files that killed conversions to this destination have left.

    If one was killed between the two renames of `publish`, the old checkpoint is moved back first.
    """
    prefix = glob.escape(staging_prefix(destination))
    for leftover in destination.parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), locked(leftover):
            if (leftover / "old").is_dir() and not destination.exists():
                (leftover / "old").rename(destination)
            shutil.rmtree(leftover)


def staging_prefix(destination: Path) -> str:
    return f".{destination.name}.converting-"


@contextlib.contextmanager
def staging_directory(destination: Path) -> Iterator[Path]:
    """A new hidden directory in the same folder as `destination`, which is removed at the end.

    It is locked until the process ends, even if it is killed; `remove_leftovers` skips locked directories.
    """
    with (
        tempfile.TemporaryDirectory(
            prefix=staging_prefix(destination), dir=destination.parent, ignore_cleanup_errors=True
        ) as name,
        contextlib.ExitStack() as stack,
    ):
        with contextlib.suppress(OSError):  # a file system without locks; there, leftovers are not removed
            stack.enter_context(locked(Path(name)))
        yield Path(name)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Locks a directory. Raises `OSError` if another process has locked it, or the file system has no locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def publish(new: Path, destination: Path, old: Path | None) -> None:
    """Renames `new` to `destination`. An existing destination is moved to `old`, and back if the rename fails."""
    if old is not None and destination.exists():
        destination.rename(old)
    try:
        new.rename(destination)
    except BaseException as error:
        if old is not None and old.exists():
            old.rename(destination)
        elif isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise CheckpointError(
                f"{destination} was made by another conversion in the meantime and was not changed; choose another name"
            ) from error
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
