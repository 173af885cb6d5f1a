"""Reads untrusted files: every problem is a `CheckpointError` that names the file.

A file name in a checkpoint must stay in the checkpoint's folder, only regular files are opened, and JSON is decoded
into typed values.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import stat
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from funnel_engine.messages import quote
from funnel_kernels.errors import CheckpointError, ConfigError

MAX_JSON_BYTES = 100_000_000
HASHED_AT_ONCE = 2**20  # bytes
REMEDIES = {
    errno.EACCES: "give this user the right to read it (chmod), or run as its owner",
    errno.EPERM: "give this user the right to read it (chmod), or run as its owner",
    errno.ELOOP: "its links form a circle; replace the link by the file or folder itself",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EIO: "the disk or the network drive failed; copy it to another one",
}
# Files that are often found instead of a checkpoint's file: pattern of the first bytes -> what it is, the remedy.
REPLACEMENTS = {
    rb"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "run: git lfs pull"),
    rb"(\.\./)*\.git/annex/|/annex/objects/": ("a pointer of git-annex, not the file itself", "run: git annex get"),
    rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|error)": (
        "a web page, e.g. of an error, not the file itself",
        "download it again, signed in if the model asks for it",
    ),
    rb"(access to model |entry not found|repository not found|invalid (username|credentials))": (
        "an error message of a server, not the file itself",
        "download it again, signed in if the model asks for it",
    ),
}
HEAD_BYTES = 64  # first bytes of a file, which show what it is
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2")  # endings that downloaders use


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file whose outermost value is a `kind` (dict or list)."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {size:,} bytes; the limit for a JSON file is {MAX_JSON_BYTES:,}; fetch it again"
            )
        return parse_json(file.read(), path, kind)


def parse_json(data: bytes, path: Path, kind: type = dict) -> Any:
    """Parses JSON that was read from `path`. A name that occurs twice in an object is an error."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); it is damaged, so fetch or write it again"
        ) from error
    if not isinstance(value, kind):
        raise CheckpointError(
            f"{path} contains a JSON {type(value).__name__}; it must be a {kind.__name__}, so fetch it again"
        )
    return value


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        (name, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {name!r} occurs twice in one object")
    return fields


def decode(kind: Any, value: Any, where: str) -> Any:
    """Converts a JSON value to a `kind`; the inverse of `json.dumps(dataclasses.asdict(...))`.

    Args:
        kind: a type annotation of dataclasses, NamedTuples (fields with defaults may be left out at the end), tuples,
            dicts, `X | None`, `X | Y` of dataclasses, and plain types.
        where: the name of the value in messages, e.g. "funnel.json: config.head_dim".

    Raises:
        CheckpointError: a field is missing or unknown, a value has a wrong type, or a number is not finite.
        ConfigError: a dataclass does not accept the values.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None and type(None) in arguments else decode(fitting(arguments, value), value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        annotations = typing.get_type_hints(kind)
        hints = {field.name: annotations[field.name] for field in dataclasses.fields(kind)}
        check_type(dict, value, where)
        for problem, names in (
            ("lacks", hints.keys() - value.keys()),
            ("has the unknown", value.keys() - hints.keys()),
        ):
            if names:
                raise CheckpointError(f"{where} {problem} {quote(sorted(names))}")
        return kind(**{name: decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
    if origin is dict:
        check_type(dict, value, where)
        return {name: decode(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if origin is tuple and arguments[-1] is Ellipsis:
        check_type(list, value, where)
        return tuple(decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is tuple or issubclass(kind, tuple):
        hints = typing.get_type_hints(kind) if origin is None else {str(i): hint for i, hint in enumerate(arguments)}
        check_type(list, value, where)
        least = len(hints) - len(getattr(kind, "_field_defaults", {}))
        if not least <= len(value) <= len(hints):
            raise CheckpointError(f"{where} has {len(value)} entries; it must have {len(hints)}")
        items = [decode(hint, item, f"{where}[{key}]") for (key, hint), item in zip(hints.items(), value, strict=False)]
        return tuple(items) if origin is tuple else kind(*items)
    if kind is float:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise CheckpointError(f"{where} is {value!r:.80}; it must be a finite number")
        return float(value)
    check_type(kind, value, where)
    return value


def fitting(kinds: Sequence[Any], value: Any) -> Any:
    """Of several types the dataclass that shares most fields with the JSON value; else the first one."""
    names = value.keys() if isinstance(value, dict) else set()
    return max(kinds, key=lambda kind: len(names & getattr(kind, "__dataclass_fields__", {}).keys()))


def check_type(kind: type, value: Any, where: str) -> None:
    if type(value) is not kind:  # not isinstance, because true is not an integer here
        raise CheckpointError(f"{where} is {value!r:.80}; it must be a JSON {kind.__name__}")


def to_path(path: Any) -> Path:
    """Converts an argument to a path, which need not exist.

    Raises:
        CheckpointError: it is not a path, is too long or cannot be reached, or is a folder that may not be read.
    """
    try:
        result = Path(path)
        is_folder = stat.S_ISDIR(result.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return result
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        remedy = REMEDIES.get(getattr(error, "errno", 0), "give another path")
        raise CheckpointError(f"{path!r:.80} cannot be used as a path ({reason}); {remedy}") from error
    if is_folder and not os.access(result, os.R_OK | os.X_OK):
        raise unreadable(result, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return result


def file_in(directory: Path, name: Any, where: str) -> Path:
    """The file or folder `name` in a directory, which need not exist. `where` is the file that contains the name.

    Raises:
        CheckpointError: `name` is not a plain file name, or it is a link that leaves the directory.
    """
    plain = isinstance(name, str) and name.isprintable() and os.path.basename(name) == name
    if not plain or name in ("", ".", ".."):
        raise CheckpointError(f"{where} names {name!r}, which is not the name of a file in {directory}; fetch it again")
    path = directory / name
    with reading(path):
        refuse_annexed(path)
        target = Path(os.path.realpath(path))
    if not any(folder in target.parents for folder in allowed_folders(directory)):
        raise CheckpointError(f"{path} is a link to {target}, outside {directory}; replace the link by the file itself")
    return path


def allowed_folders(directory: Path) -> Iterator[Path]:
    """The folders that may contain the files of a directory: itself, and the blobs of its Hugging Face cache.

    The cache keeps a model in `models--NAME/snapshots/REVISION/`, as links to files in `models--NAME/blobs/`.
    """
    resolved = directory.resolve()
    yield resolved
    for folder in (resolved, *resolved.parents):
        if folder.parent.name == "snapshots":
            yield folder.parent.parent / "blobs"


def optional_file(directory: Path, name: str) -> Path | None:
    """The file `name` in a directory; None if it does not exist."""
    path = file_in(directory, name, str(directory))
    with reading(path):
        return path if is_file(path) else None


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file.

    Raises:
        OSError: this cannot be found out, e.g. in a folder that may not be read.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def hash_file(path: Path, stop: Callable[[], bool] = lambda: False) -> str:
    """The SHA-256 of a file, or of the part that was read before `stop()` returned True.

    Raises:
        CheckpointError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open_file(path) as file:
        while not stop() and (data := file.read(HASHED_AT_ONCE)):
            digest.update(data)
    return digest.hexdigest()


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading; reading a pipe or a device might never end.

    Raises:
        CheckpointError: the file does not exist, cannot be read, or is one of `REPLACEMENTS`.
    """
    with reading(path):
        if not is_file(path):
            raise CheckpointError(
                f"cannot read {path}: it does not exist or is not a regular file{unfinished_downloads(path.parent)}; "
                "fetch it again"
            )
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"{path} is empty; a download or a copy failed, so fetch it again")
            refuse_replacement(path, os.pread(file.fileno(), HEAD_BYTES, 0))
            yield file


def read_array(path: Path, start: int, dtype: np.dtype, count: int) -> np.ndarray:
    """`count` numbers from byte `start` of a file on.

    Raises:
        CheckpointError: the file cannot be read any more, or became shorter.
    """
    with open_file(path) as file:
        file.seek(start)
        values = np.fromfile(file, dtype, count)
    if len(values) < count:
        raise CheckpointError(f"{path} became shorter while it was read; convert it again")
    return values


def check_file(path: Path) -> None:
    """Raises the `CheckpointError` of `open_file` if the file cannot be opened."""
    with open_file(path):
        pass


def refuse_replacement(path: Path, head: bytes) -> None:
    """Raises `CheckpointError` if the first bytes of a file show that it is one of `REPLACEMENTS`."""
    for pattern, (what, remedy) in REPLACEMENTS.items():
        if re.match(pattern, head, re.IGNORECASE):
            raise CheckpointError(f"{path} is {what}; {remedy}")


def refuse_annexed(path: Path) -> None:
    """Raises `CheckpointError` if a path is a link to content that git-annex has not fetched."""
    if os.path.islink(path) and "/annex/objects/" in os.readlink(path) and not os.path.exists(path):
        raise CheckpointError(f"{path} is a git-annex link whose content is not here; run: git annex get")


def unfinished_downloads(directory: Path) -> str:
    """For a message about a missing file: the unfinished downloads in a folder."""
    try:
        names = [name for name in sorted(os.listdir(directory)) if name.endswith(UNFINISHED)]
    except OSError:
        names = []
    return f" (a download into {directory} has not finished: {quote(names)})" if names else ""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns errors while a file is read, and a `ConfigError` from its content, into `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise unreadable(error.filename or path, error) from error
    except ConfigError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def unreadable(path: Path | str, error: OSError) -> CheckpointError:
    remedy = REMEDIES.get(error.errno or 0, "check the path, and whether the file or folder is complete")
    return CheckpointError(f"cannot read {path}: {error.strerror or error}; {remedy}")
