"""The results of one part: a JSON file that is whole after every measured cell, so that a killed run keeps them."""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from funnel_engine.output_files import write_text
from funnel_kernels.errors import InputError

SCHEMA = 1
ENDING = ".json"

Row = dict[str, Any]
Cell = tuple[str, Callable[[], Row]]  # what a row is called, and what measures it


class LeftOut(Exception):
    """Raised by a cell that cannot be measured here; the text says why. It is no failure."""


class Clock:
    """The time that a run may take. A cell that has begun is finished; none begins after it."""

    def __init__(self, minutes: float, start: float):
        self.end = start + 60 * minutes  # as time.monotonic() counts

    def seconds_left(self) -> float:
        return max(0.0, self.end - time.monotonic())


class Table:
    """The file of one part.

    Its fields: `schema`, `part`, what `header` says, `complete`, `rows` (each with its `cell`), `left_out` (`cell` and
    `reason`) and `errors` (`cell` and `error`).
    """

    def __init__(self, folder: Path, part: str, header: Row):
        self.path = folder / (part + ENDING)
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.content: Row = {"schema": SCHEMA, "part": part, "started": started, **header, "complete": False}
        self.content |= {"rows": [], "left_out": [], "errors": []}
        self.write()

    @property
    def failed(self) -> bool:
        """Whether a cell raised, or found a wrong result."""
        return bool(self.content["errors"]) or any(not row.get("passed", True) for row in self.content["rows"])

    def measure_all(self, cells: Iterable[Cell], clock: Clock) -> None:
        """Measures cell after cell; what a cell raises is written down, and the next one is measured."""
        remaining = iter(cells)
        while True:
            try:
                cell = next(remaining)
            except StopIteration:
                break
            except Exception as error:  # of the code between cells
                self.fail("the rest of the part", error)
                break
            self.measure(*cell, clock)
        self.content["complete"] = True
        self.write()

    def measure(self, cell: str, measure: Callable[[], Row], clock: Clock) -> None:
        start = time.monotonic()
        try:
            if not clock.seconds_left():
                raise LeftOut("not measured: out of time")
            row = measure() | {"took_seconds": time.monotonic() - start}
        except LeftOut as reason:
            self.append("left_out", {"cell": cell, "reason": str(reason)})
        except Exception as error:
            self.fail(cell, error)
        else:
            self.append("rows", {"cell": cell, **row})

    def fail(self, cell: str, error: Exception) -> None:
        traceback.print_exception(error, file=sys.stderr)
        self.append("errors", {"cell": cell, "error": error_text(error)})

    def append(self, field: str, entry: Row) -> None:
        """Adds an entry, writes the file, and tells on standard output what there is to tell by then."""
        self.content[field].append(entry)
        self.write()
        if field == "rows":
            news = f"{entry['took_seconds']:.1f} s" + ("" if entry.get("passed", True) else ", WRONG")
        else:
            news = entry["reason"] if field == "left_out" else entry["error"]
        print(f"{self.content['part']:<10} {entry['cell']}: {news}", flush=True)

    def write(self) -> None:
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def error_text(error: Exception) -> str:
    """An error in one line of bearable length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


def read_tables(folder: Path, parts: Iterable[str]) -> dict[str, Row]:
    """The tables of a folder by part, in the order of `parts`.

    Raises:
        InputError: a file of this name that is no such table.
    """
    tables = {}
    for part in parts:
        path = folder / (part + ENDING)
        if not path.exists():
            continue
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            known = table["schema"] == SCHEMA and table["part"] == part
        except (OSError, ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise InputError(f"{path} is no table of schema {SCHEMA} that this command has written; remove it")
        tables[part] = table
    return tables
