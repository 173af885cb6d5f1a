"""One result file for every suite: whole after every measured cell, so that a run that is killed keeps what it has.

A file is one JSON document with a line for each row (`json_lines`); numbers have six significant digits:

| field | what it says |
|---|---|
| `schema` | the version of this form |
| `suite` | which suite has written it |
| `started` | when, UTC |
| `options` | everything that the figures depend on; a run resumes only a file of its own options |
| `machine` | see `machine.machine_facts` |
| `resumed` | later runs that added to it: `started`, `machine`, and `rows`, the number of rows before them |
| `complete` | whether the last run reached its end |
| `rows` | what was measured: `cell`, a name of its own, `took_seconds`, and figures |
| `left_out` | `cell` and `reason`; `same_as`, the cell whose row says the same, where nothing is missing without it |
| `errors` | `cell` and `error` |

and whatever else the suite writes. A *figure with samples* is `{low, median, high, samples}` (`measure.spread`); of
such a figure less is better (seconds, bytes), which `compare` relies on.
"""

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from funnel_benchmarks.json_lines import document, rounded
from funnel_engine.output_files import write_text
from funnel_kernels.errors import FunnelError, InputError

SCHEMA = 3
SAME_MACHINE = ("cpu", "kernel_instruction_set", "cores", "devices")  # facts that may not change within a file
FIELDS: dict[str, type] = {
    "suite": str,
    "started": str,
    "options": dict,
    "machine": dict,
    "resumed": list,
    "complete": bool,
    "rows": list,
    "left_out": list,
    "errors": list,
}
ENOUGH_SAMPLES = 10  # of each side, for a figure that is quoted
A_DAY = 24 * 3600.0
LARGEST = 1e300  # of the numbers in a figure
REST = "the rest of the suite"  # names a cell that has no name, because naming it failed

Row = dict[str, Any]
Measurement = tuple[str, Callable[[], Row]]  # what a row is called, and what measures it


class LeftOut(Exception):
    """Raised by a cell that is not measured; the text says why. It is not a failure.

    Attributes:
        same_as: the cell that measures the same; None if this one cannot be measured here.
    """

    def __init__(self, reason: str, same_as: str | None = None):
        super().__init__(reason)
        self.same_as = same_as


class Results:
    """The results of one run of a suite, in memory and in their file."""

    def __init__(
        self,
        path: Path | None,
        *,
        suite: str,
        options: Row,
        machine: Row,
        facts: Row | None = None,
        resume: bool = False,
        show: Callable[[Row], str] | None = None,
        console: Console | None = None,
    ):
        """Writes nothing yet.

        Args:
            path: the file, or None to keep the results in memory only. A file that is there already is replaced
                when there is a first row to put in its place.
            options, machine, facts: the head of the file; plain JSON.
            resume: keep the rows of a file that is there already, and measure only the cells that it lacks.
            show: the line that tells of a new row. Default: how long it took.
            console: where lines go, and on a terminal how far the run has got. Default: standard output.

        Raises:
            InputError: with `resume`, a file that is not a result, or is one of another suite, other options or another
                machine.
        """
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.path, self.show, self.console = path, show or took, console or Console()
        self.content: Row = {"schema": SCHEMA, "suite": suite, "started": started, "options": options}
        self.content |= {"machine": machine, "resumed": [], **(facts or {})}
        self.content |= {"complete": False, "rows": [], "left_out": [], "errors": []}
        self.kept = path is not None and path.exists() and not resume  # until there is something better
        self.advance: Callable[[], object] = lambda: None
        if resume and path is not None and path.exists():
            self.take_over(path)

    def take_over(self, path: Path) -> None:
        """Continues with what a file contains, if it is of this run's kind."""
        earlier, now = read_results(path), self.content
        changed = differences(kind_of(earlier), kind_of(now))
        changes = "; ".join(f"{name} was {there!r} and is {here!r} now" for name, there, here in changed)
        if changes:
            raise InputError(
                f"{path} cannot be resumed: {changes}; use the options and machine of its first run, or write to "
                "another file"
            )
        run = {"started": now["started"], "machine": now["machine"], "rows": len(earlier["rows"])}
        self.content = earlier | {"resumed": [*earlier["resumed"], run], "complete": False}

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.content["rows"]
        return rows

    @property
    def failed(self) -> bool:
        """Whether a cell raised, or found a wrong result."""
        return bool(self.content["errors"]) or any(not row.get("passed", True) for row in self.rows)

    def measure_all(self, cells: Iterable[Measurement], *, steps: int = 1) -> None:
        """Measures every cell that has no row yet; what a cell raises is written down, and the next one is measured.

        Args:
            steps: how often a cell calls `self.advance`, at most: once after each of that many equal parts of its work.
        """
        named: list[Measurement] = []
        broken = None
        try:
            named.extend(cells)
        except Exception as error:  # of the code between cells
            broken = error
        names = [cell for cell, _ in named]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two cells are called {repeated!r}, so that a file could not tell them apart")
        again = {REST, *names}
        for field in ("left_out", "errors"):
            self.content[field] = [entry for entry in self.content[field] if entry["cell"] not in again]
        done = {row["cell"] for row in self.rows}
        missing = [(cell, measure) for cell, measure in named if cell not in done]
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:.0f} %, time left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[cell]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            speed_estimate_period=A_DAY,  # of all of the run, since a single step may take minutes
        ) as bar:
            task = bar.add_task(self.content["suite"], total=len(missing) * steps, cell="")
            self.advance = partial(bar.advance, task)
            for index, (cell, measure) in enumerate(missing):
                bar.update(task, completed=index * steps, cell=cell)  # however many steps were told of
                self.measure(cell, measure)
        if broken is not None:
            self.fail(REST, broken)
        self.content["complete"] = True
        self.write()

    def measure(self, cell: str, measure: Callable[[], Row]) -> None:
        start = time.monotonic()
        try:
            row = {"cell": cell, **measure(), "took_seconds": time.monotonic() - start}
            check_row(row)
        except LeftOut as reason:
            entry = {"cell": cell, "reason": str(reason)}
            self.append("left_out", entry if reason.same_as is None else entry | {"same_as": reason.same_as})
        except Exception as error:
            self.fail(cell, error)
        else:
            self.append("rows", row)

    def fail(self, cell: str, error: Exception) -> None:
        if not isinstance(error, FunnelError):  # whose text says it all
            traceback.print_exception(error, file=sys.stderr)
        self.append("errors", {"cell": cell, "error": error_text(error)})

    def append(self, field: str, entry: Row) -> None:
        """Adds an entry, writes the file, and prints a line about the entry."""
        self.content[field].append(entry)
        self.write()
        if field == "rows":
            self.tell(self.show(entry) + too_few(entry))
        elif field == "left_out":
            self.tell(f"{entry['cell']}: left out: {entry['reason']}")
        else:
            self.tell(f"{entry['cell']}: FAILED: {entry['error']}")

    def tell(self, *lines: str) -> None:
        for line in lines:
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def write(self) -> None:
        self.kept = self.kept and not self.rows
        if self.path is not None and not self.kept:
            write_text(self.path, document(self.content | {"rows": rounded(self.rows)}))


def kind_of(content: Row) -> Row:
    """What has to stay as it is while a file grows; tuples become the lists that a file has."""
    machine = {name: content["machine"].get(name) for name in SAME_MACHINE}
    kind: Row = json.loads(json.dumps({"suite": content["suite"], "options": content["options"], "machine": machine}))
    return kind


def took(row: Row) -> str:
    """The line about a row of which nothing else is known."""
    return f"{row['cell']}: {row['took_seconds']:.1f} s" + ("" if row.get("passed", True) else ", WRONG")


def fewest_samples(row: Row) -> int | None:
    """How many samples a row has of the side that has fewest; None without any figure with samples."""
    counts = [len(figure["samples"]) for figure in row.values() if isinstance(figure, dict) and "samples" in figure]
    return min(counts, default=None)


def too_few(row: Row) -> str:
    """What a line says of a row that must not be quoted; else empty."""
    count = fewest_samples(row)
    if count is None or count >= ENOUGH_SAMPLES:
        return ""
    return f"  [samples of a side: {count}; {ENOUGH_SAMPLES} are needed to quote it]"


def error_text(error: Exception) -> str:
    """An error in one line of bearable length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


def differences(first: Any, second: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: the place, as "options.repeats", and both values; None where one has nothing."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in dict.fromkeys((*first, *second)):
            yield from differences(first.get(key), second.get(key), f"{name}.{key}" if name else key)
    elif first != second:
        yield name, first, second


def read_results(path: Path) -> Row:
    """The content of a result file, with every field that this module promises, of the right type.

    Raises:
        InputError: it cannot be read, is cut short, or is of another form.
    """
    try:
        content: Row = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse, parse_float=finite)
        check_content(content)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot read {path}: {reason}; name a file that a suite has written") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is cut short or is not JSON ({error.msg}, line {error.lineno}); measure again, without --resume"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not a result file of schema {SCHEMA}: {error}; measure again, into another file"
        ) from error
    return content


def refuse(constant: str) -> None:
    raise ValueError(f"it contains {constant}, which is not a figure")


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it contains {text}, which is too large")
    return value


def check_content(content: Any) -> None:
    """Raises `ValueError`, with the place, unless this is what `Results` writes."""
    expect("it", content, dict)
    if content.get("schema") != SCHEMA:
        raise ValueError(f"schema is {content.get('schema')!r}")
    for name, kind in FIELDS.items():
        expect(name, content.get(name), kind)
    entries = {"rows": {"cell": str}, "left_out": {"cell": str, "reason": str}, "errors": {"cell": str, "error": str}}
    for field, kinds in (entries | {"resumed": {"started": str, "machine": dict}}).items():
        for index, entry in enumerate(content[field]):
            expect(f"{field}[{index}]", entry, dict)
            for name, kind in kinds.items():
                expect(f"{field}[{index}].{name}", entry.get(name), kind)
    seen: set[str] = set()
    for row in content["rows"]:
        if row["cell"] in seen:
            raise ValueError(f"cell {row['cell']!r} is there twice")
        seen.add(row["cell"])
        check_figures(row)


def expect(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        words = {str: "a text", dict: "an object", list: "a list", bool: "true or false"}
        raise ValueError(f"{name} is not {words[kind]}")


def figures(row: Row, name: str = "") -> Iterator[tuple[str, Row]]:
    """Every figure with samples of a row and its name: "seconds", or "peer.seconds" inside another object."""
    for key, value in row.items():
        if isinstance(value, dict):
            if "samples" in value:
                yield name + key, value
            else:
                yield from figures(value, f"{name}{key}.")


def check_row(row: Row) -> None:
    """Raises `ValueError` or `TypeError` for a row with which its file could not be written, or read again."""
    json.dumps(row, allow_nan=False)
    check_figures(row)


def check_figures(row: Row) -> None:
    for name, figure in figures(row):
        place, samples = f"{name} of cell {row['cell']!r}", figure["samples"]
        expect(f"the samples of {place}", samples, list)
        if not samples:
            raise ValueError(f"{place} has no samples")
        for number in (*(figure.get(bound) for bound in ("low", "median", "high")), *samples):
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < LARGEST:
                raise ValueError(f"{place} contains {number!r}; it must be a number above 0")
