"""Reading files that others wrote: every surprise is a `CheckpointError` that names the file.

A name that a checkpoint gives stays within its folder, only regular files are opened, and JSON is decoded into typed
values.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from funnel_engine.messages import quote
from funnel_kernels.errors import CheckpointError, ConfigError

MAX_JSON_BYTES = 100_000_000
HASHED_AT_ONCE = 2**20  # bytes
REMEDIES = {
    errno.EACCES: "give this user the right to read it (chmod), or run as its owner",
    errno.EPERM: "give this user the right to read it (chmod), or run as its owner",
    errno.ELOOP: "its links lead in a circle; put the file or folder itself there",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EIO: "the disk or the network drive fails; copy it to another one",
}
# How a file begins that was put in the place of a checkpoint's file: what it is, and the remedy.
STAND_INS = {
    rb"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "run: git lfs pull"),
    rb"(\.\./)*\.git/annex/|/annex/objects/": ("a pointer of git-annex, not the file itself", "run: git annex get"),
    rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|error)": (
        "a web page, e.g. of an error, not the file itself",
        "download it again, signed in if the model asks for it",
    ),
    rb"(access to model |entry not found|repository not found|invalid (username|credentials))": (
        "a message of a server, not the file itself",
        "download it again, signed in if the model asks for it",
    ),
    rb"GGUF": (
        "a GGUF file of llama.cpp, which this engine does not read",
        "convert the model that it was made from, or write one with transformers: AutoModel.from_pretrained(FOLDER, "
        "gguf_file=NAME, quantization_config=GgufConfig(dequantize=True)).save_pretrained(NEW)",
    ),
}
HEAD_BYTES = 64  # which tell what a file is
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2")  # of several downloaders


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file whose outermost value is a `kind` (dict or list)."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes; no JSON of a model has {MAX_JSON_BYTES:,}")
        return parse_json(file.read(), path, kind)


def parse_json(data: bytes, path: Path, kind: type = dict) -> Any:
    """JSON from `path`, already read. A name that occurs twice in an object is refused, not overwritten."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); it is damaged, so fetch or write it again"
        ) from error
    if not isinstance(value, kind):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__} where a {kind.__name__} is needed")
    return value


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        (name, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {name!r} occurs twice in one object")
    return fields


def decode(kind: Any, value: Any, where: str) -> Any:
    """Makes a `kind` of a JSON value, the inverse of `json.dumps(dataclasses.asdict(...))`.

    Args:
        kind: a type annotation made of dataclasses, NamedTuples, tuples, dicts, `X | None`, and plain values.
        where: what the message calls the value, e.g. "funnel.json: config.head_dim".

    Raises:
        CheckpointError: a missing or unknown field, or a value of another type. Numbers must be finite.
        ConfigError: a dataclass refuses its values.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else decode(arguments[0], value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
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
        if len(value) != len(hints):
            raise CheckpointError(f"{where} has {len(value)} entries where {len(hints)} are needed")
        items = [decode(hint, item, f"{where}[{key}]") for (key, hint), item in zip(hints.items(), value, strict=True)]
        return tuple(items) if origin is tuple else kind(*items)
    if kind is float:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise CheckpointError(f"{where} is {value!r:.80}; it must be a finite number")
        return float(value)
    check_type(kind, value, where)
    return value


def check_type(kind: type, value: Any, where: str) -> None:
    if type(value) is not kind:  # not isinstance: true is no integer here
        raise CheckpointError(f"{where} is {value!r:.80}; it must be a JSON {kind.__name__}")


def to_path(path: Any) -> Path:
    """What a caller gives as a path, whether anything is there or not.

    Raises:
        CheckpointError: no system path: not a text, too long, or unreachable; or a folder that may not be read.
    """
    try:
        result = Path(path)
        is_folder = stat.S_ISDIR(result.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return result
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        remedy = REMEDIES.get(getattr(error, "errno", 0), "give another")
        raise CheckpointError(f"{path!r:.80} cannot be used as a path ({reason}); {remedy}") from error
    if is_folder and not os.access(result, os.R_OK | os.X_OK):
        raise unreadable(result, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return result


def file_in(directory: Path, name: Any, where: str) -> Path:
    """The file or folder `name` of a directory, whether it exists or not; `where` says who names it.

    Raises:
        CheckpointError: `name` is anything but a plain file name, or a link that leaves the directory.
    """
    plain = isinstance(name, str) and name.isprintable() and os.path.basename(name) == name
    if not plain or name in ("", ".", ".."):
        raise CheckpointError(f"{where} names {name!r}, which is not a file in {directory}")
    path = directory / name
    with reading(path):
        refuse_annexed(path)
        target = Path(os.path.realpath(path))
    if not any(home in target.parents for home in homes(directory)):
        raise CheckpointError(f"{path} is a link to {target}, outside {directory}; put the file itself there")
    return path


def homes(directory: Path) -> Iterator[Path]:
    """Where the files of a directory may lie: in it, or in the blobs of its Hugging Face cache.

    The cache keeps a model in `models--NAME/snapshots/REVISION/`, as links to files in `models--NAME/blobs/`.
    """
    home = directory.resolve()
    yield home
    for folder in (home, *home.parents):
        if folder.parent.name == "snapshots":
            yield folder.parent.parent / "blobs"


def optional_file(directory: Path, name: str) -> Path | None:
    """The file `name` of a directory if it is there."""
    path = file_in(directory, name, str(directory))
    with reading(path):
        return path if is_file(path) else None


def is_file(path: Path) -> bool:
    """Whether a regular file is there.

    Raises:
        OSError: that cannot be known, e.g. in a folder that may not be read.
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
    """The SHA-256 of a file, or of as much as was read before `stop()` came true.

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
    """A regular file, open for reading; a pipe or a device would be read without end.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or it only takes the place of the right one.
    """
    with reading(path):
        if not is_file(path):
            raise CheckpointError(
                f"cannot read {path}: no such file, or not a regular one{unfinished(path.parent)}; fetch it again"
            )
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"{path} is empty; its download or its copy failed, so fetch it again")
            refuse_stand_in(path, os.pread(file.fileno(), HEAD_BYTES, 0))
            yield file


def check_file(path: Path) -> None:
    """Raises `CheckpointError` as `open_file` does."""
    with open_file(path):
        pass


def refuse_stand_in(path: Path, head: bytes) -> None:
    """Raises `CheckpointError` if a file begins as none of a checkpoint does, but as what often takes its place."""
    for pattern, (what, remedy) in STAND_INS.items():
        if re.match(pattern, head, re.IGNORECASE):
            raise CheckpointError(f"{path} is {what}; {remedy}")


def refuse_annexed(path: Path) -> None:
    """Raises `CheckpointError` if a path is a link to content that git-annex has not fetched."""
    if os.path.islink(path) and "/annex/objects/" in os.readlink(path) and not os.path.exists(path):
        raise CheckpointError(f"{path} is a link of git-annex, and its content is not here; run: git annex get")


def unfinished(directory: Path) -> str:
    """For a message about a file that is missing: the downloads in a folder that did not end."""
    try:
        names = [name for name in sorted(os.listdir(directory)) if name.endswith(UNFINISHED)]
    except OSError:
        names = []
    return f" (a download into {directory} has not ended: {quote(names)})" if names else ""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a file is read, or what its content makes of a config, into `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise unreadable(error.filename or path, error) from error
    except ConfigError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def unreadable(path: Path | str, error: OSError) -> CheckpointError:
    remedy = REMEDIES.get(error.errno or 0, "check the path, and whether what is there is whole")
    return CheckpointError(f"cannot read {path}: {error.strerror or error}; {remedy}")
