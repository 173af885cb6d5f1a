"""A corpus in Parquet or JSONL files, in chunks of rows that are read one by one."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from funnel_kernels.errors import InputError

ENDINGS = (".parquet", ".jsonl")
HASHED_AT_ONCE = 2**22  # bytes


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Neighbouring rows of a file: `[start, stop)` counts rows of Parquet, or bytes of JSONL."""

    number: int
    file: Path
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Columns:
    """The names of the columns that a corpus is read for."""

    id: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a scan of the files found.

    Attributes:
        files: SHA-256 of each, by name.
        chunks: all rows, in order.
        rows: their number.
    """

    files: dict[str, str]
    chunks: list[Chunk]
    rows: int


def scan(path: Path, columns: Columns, rows_per_chunk: int) -> Corpus:
    """Hashes the files of a corpus, checks every id, and divides the rows into chunks.

    The ids are kept in memory meanwhile. The same files always give the same chunks.

    Raises:
        InputError: there are no rows, a file cannot be read, a column is missing, or an id is missing or not unique.
    """
    hashes: dict[str, str] = {}
    chunks: list[Chunk] = []
    places: dict[Any, str] = {}
    for file in corpus_files(path):
        hashes[file.name] = hash_corpus_file(file)
        rows = parquet_ids(file, columns) if file.suffix == ".parquet" else jsonl_ids(file, columns)
        start = stop = 0
        for count, (place, identity, stop) in enumerate(rows, start=1):
            if isinstance(identity, bool) or not isinstance(identity, (str, int)):
                raise InputError(f"{place}: {columns.id} is {identity!r:.40}; each row needs a text or an integer")
            if identity in places:
                raise InputError(f"{place}: {columns.id} {identity!r:.80} is also that of {places[identity]}")
            if places and type(identity) is not type(next(iter(places))):
                raise InputError(f"{place}: {columns.id} is {identity!r:.40}; all must be texts, or all integers")
            places[identity] = place
            if count % rows_per_chunk == 0:
                chunks.append(Chunk(len(chunks), file, start, stop))
                start = stop
        if start < stop:
            chunks.append(Chunk(len(chunks), file, start, stop))
    if not chunks:
        raise InputError(f"{path} has no rows; give a corpus with texts")
    return Corpus(hashes, chunks, len(places))


def corpus_files(path: Path) -> list[Path]:
    files = sorted(file for file in path.iterdir() if file.suffix in ENDINGS) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix in ENDINGS for file in files):
        raise InputError(f"{path} is no corpus; give a file that ends in {' or '.join(ENDINGS)}, or a folder of such")
    return [file.resolve() for file in files]


def hash_corpus_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while data := content.read(HASHED_AT_ONCE):
            digest.update(data)
    return digest.hexdigest()


def parquet_ids(file: Path, columns: Columns) -> Iterator[tuple[str, Any, int]]:
    """For each row its place, its id, and the number of rows up to its end."""
    content = open_parquet(file)
    for name in (columns.id, columns.text):
        if name not in content.schema_arrow.names:
            raise InputError(f"{file.name} has the columns {', '.join(content.schema_arrow.names)}, but not {name}")
    row = 0
    for batch in content.iter_batches(columns=[columns.id]):
        for identity in batch.column(0).to_pylist():
            row += 1
            yield f"{file.name}, row {row}", identity, row


def open_parquet(file: Path) -> Any:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file} is not Parquet: {error!s:.200}") from error


def jsonl_ids(file: Path, columns: Columns) -> Iterator[tuple[str, Any, int]]:
    """For each line that is not blank its place, its id, and the number of bytes up to its end."""
    stop = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            stop += len(line)
            if line.strip():
                place = f"{file.name}, line {number}"
                yield place, parse(line, place, columns)[columns.id], stop


def parse(line: bytes, place: str, columns: Columns) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}, is not JSON: {error!s:.100}; each line must be a JSON object") from error
    if not isinstance(fields, dict) or not {columns.id, columns.text} <= fields.keys():
        raise InputError(f"{place}, must be a JSON object with {columns.id} and {columns.text}")
    return fields


def read_chunk(chunk: Chunk, columns: Columns) -> pa.Table:
    """The ids and the texts of a chunk."""
    if chunk.file.suffix == ".parquet":
        return read_parquet_rows(chunk, columns)
    with chunk.file.open("rb") as file:
        file.seek(chunk.start)
        lines = file.read(chunk.stop - chunk.start).split(b"\n")
    rows = [parse(line, chunk.file.name, columns) for line in lines if line.strip()]
    texts = [row[columns.text] if isinstance(row[columns.text], str) else None for row in rows]
    return pa.table({columns.id: [row[columns.id] for row in rows], columns.text: pa.array(texts, pa.string())})


def read_parquet_rows(chunk: Chunk, columns: Columns) -> pa.Table:
    parts, first = [], 0
    metadata = open_parquet(chunk.file).metadata
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        start, stop = max(chunk.start - first, 0), min(chunk.stop - first, rows)
        if start < stop:
            parts.append(read_row_group(chunk.file, group, columns).slice(start, stop - start))
        first += rows
    return pa.concat_tables(parts)


@lru_cache(maxsize=1)  # the next chunk of a worker is most often in the same row group
def read_row_group(file: Path, group: int, columns: Columns) -> pa.Table:
    return open_parquet(file).read_row_group(group, columns=[columns.id, columns.text])
