"""Reads files of the user: lines, tables (CSV, TSV, JSONL). A message names the file, the line, the column."""

import csv
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from funnel_engine.messages import quote
from funnel_kernels.errors import InputError

TABLES = (".csv", ".tsv", ".jsonl")


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file that has been read."""

    path: Path
    text: str
    sha256: str

    def lines(self) -> Iterator[tuple[str, str]]:
        """The place of each line and its content, without those that are blank. Only a line feed ends a line."""
        for number, line in enumerate(self.text.split("\n"), start=1):
            if line.strip():
                yield f"{self.path.name}, line {number}", line.removesuffix("\r")


def read_file(path: Path) -> DataFile:
    """Reads a UTF-8 file.

    Raises:
        InputError: it cannot be read, is empty, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    try:
        text = data.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path.name}, line {line}, is not UTF-8: {error.reason} at byte {error.start + 1} of the file; "
            "convert the file to UTF-8 first"
        ) from error
    if not text.strip():
        raise InputError(f"{path} is empty; give a file with data")
    return DataFile(path, text, hashlib.sha256(data).hexdigest())


def hashes(*files: DataFile) -> dict[str, str]:
    """The SHA-256 of files by their names."""
    return {file.path.name: file.sha256 for file in files}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        place: the file and the line, for messages.
        fields: by the names of the columns; strings, or in JSONL any values.
    """

    place: str
    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        value = self.fields[name]
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{self.place}: {name} is {value!r:.40}; it must be a text that is not empty")
        return value

    def number(self, name: str) -> float:
        value = self.fields[name]
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"{self.place}: {name} is {value!r:.40}; it must be a finite number")
        return number


def read_table(file: DataFile, *layouts: tuple[str, ...]) -> tuple[tuple[str, ...], list[Row]]:
    """The rows of a .csv, .tsv or .jsonl file whose columns are those of one of the layouts.

    A CSV or TSV file whose first row contains all names of a layout has a header, and may have further columns. Without
    a header its columns must be exactly those of a layout, in that order. Fields of CSV can be quoted, those of TSV are
    taken as they are. A JSONL file has a JSON object in each line.

    Returns:
        The layout, and the rows.

    Raises:
        InputError: the file is no such table, or has no rows.
    """
    if file.path.suffix not in TABLES:
        raise InputError(f"{file.path.name!r} must end in {', '.join(TABLES)}")
    rows = list(json_rows(file) if file.path.suffix == ".jsonl" else csv_rows(file, layouts))
    layout = next((layout for layout in layouts if rows[0].fields.keys() >= set(layout)), None)
    if layout is None:
        raise InputError(f"{rows[0].place} has the names {quote(rows[0].fields)}; it must have {either(layouts)}")
    for row in rows:
        if missing := [name for name in layout if name not in row.fields]:
            raise InputError(f"{row.place} lacks {', '.join(missing)}; each line must have {', '.join(layout)}")
    return layout, rows


def either(layouts: Sequence[tuple[str, ...]]) -> str:
    return " or ".join(", ".join(layout) for layout in layouts)


def csv_rows(file: DataFile, layouts: Sequence[tuple[str, ...]]) -> list[Row]:
    (place, first), *others = records = list(csv_records(file))
    names = tuple(field.strip() for field in first)
    if any(set(names) >= set(layout) for layout in layouts):
        records = others
        if not records:
            raise InputError(f"{file.path} has a header and no rows; give a file with data")
    elif len(names) in map(len, layouts):
        names = next(layout for layout in layouts if len(layout) == len(names))
    else:
        raise InputError(
            f"{place} has {len(names)} columns and is not a header with the names {either(layouts)}; without a header "
            "the columns must be exactly these, in this order"
        )
    for place, fields in records:
        if len(fields) != len(names):
            raise InputError(f"{place} has {len(fields)} columns; it must have {len(names)}: {', '.join(names)}")
    return [Row(place, dict(zip(names, fields, strict=True))) for place, fields in records]


def csv_records(file: DataFile) -> Iterator[tuple[str, list[str]]]:
    """The place and the fields of each record of a CSV or TSV file, which may extend over several lines."""
    if file.path.suffix == ".tsv":
        for place, line in file.lines():
            yield place, line.split("\t")
        return
    reader, start = csv.reader(io.StringIO(file.text, newline=""), strict=True), 1
    try:
        for fields in reader:
            if fields:
                yield f"{file.path.name}, line {start}", fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{file.path.name}, line {start}, is not CSV: {error}; put fields with commas, quotes or line breaks into "
            "double quotes, and write a double quote inside them twice"
        ) from error


def json_rows(file: DataFile) -> Iterator[Row]:
    for place, line in file.lines():
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}, is not JSON: {error}; each line must be a JSON object") from error
        if not isinstance(fields, dict):
            raise InputError(f"{place}, is a JSON {type(fields).__name__}; each line must be a JSON object")
        yield Row(place, fields)
