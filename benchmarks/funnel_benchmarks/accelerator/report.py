"""Tables -> report.md, which says what was measured, what was left out, and what went wrong; and the plots."""

import io
import math
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from funnel_benchmarks.accelerator.plots import PLOTS, render
from funnel_benchmarks.results import read_results
from funnel_engine.output_files import write_bytes, write_text
from funnel_kernels.errors import InputError

Row = dict[str, Any]
Table = dict[str, Any]
Tables = dict[str, Table]
Column = tuple[str, Callable[[Row], str]]
NONE = "-"
ARCHIVE = "results.tar.gz"

TITLES = {
    "check": "Right or wrong",
    "ceilings": "What the device can do",
    "attention": "Attention",
    "rows": "Pooling and recovery",
    "engine": "The engine without a funnel",
    "funnel": "Funnels",
    "peer": "Hugging Face Gemma",
    "latency": "One short sequence, and where the time goes",
    "ragged": "Ragged sequences",
    "flags": "Compiler options",
}

NOTES = {
    "check": "Relative error ||result - float64|| / ||float64|| over the whole result; each run twice, bit for bit, "
    "into memory that was full of NaN before.",
    "ceilings": "Random bfloat16 numbers. A copy's bytes count twice: read and written.",
    "attention": "Useful operations: 4 x head dim for each query-key pair that a query head sees.",
    "rows": "Bandwidth counts each byte read and written once; the copy reads and writes as many in all.",
    "engine": "`Engine.embed`, from token ids on the host to vectors on the host; the forward pass, from ids on the "
    "device. Operations of matrix products and attention only, and of tokens only.",
    "funnel": "The same engine with the funnel and without it, in turns. Efficiency is the ideal ratio of operations "
    "over the measured ratio of times.",
    "peer": "The same architecture and batch, random weights, each in its own process; ours right before and after. "
    "Ours starts from token ids on the host, the peer from ids on the device.",
    "latency": "Busy: the share of a call's time, from ids on the host to vectors on the host, in which a kernel runs. "
    "The kernels' times are from a profile, in which XLA replays no CUDA graphs; the call's time is without one.",
    "ragged": "Both batches have the same number of tokens, which is a bucket's size.",
    "flags": "The forward pass alone, against no options at all; a ratio below 1 means that the options help.",
}


def number(key: str, form: str, factor: float = 1.0) -> Callable[[Row], str]:
    """Shows one number of a row, which the row may lack."""
    return lambda row: format(factor * row[key], form) if key in row else NONE


def milliseconds(key: str) -> Callable[[Row], str]:
    """Shows a median with its quartiles."""

    def show(row: Row) -> str:
        if key not in row:
            return NONE
        low, median, high = (1e3 * row[key][bound] for bound in ("low", "median", "high"))
        return f"{median:,.3f} ({low:,.3f} - {high:,.3f})"

    return show


def median(key: str) -> Callable[[Row], str]:
    """Shows a ratio with its bounds."""
    return lambda row: f"{row[key]['median']:.3f} ({row[key]['low']:.3f} - {row[key]['high']:.3f})"


def against_goal(value: Callable[[Row], float | None]) -> Callable[[Row], str]:
    """Shows a value next to its goal, and whether it reaches that."""

    def show(row: Row) -> str:
        found = value(row)
        if found is None:
            return NONE
        if row.get("goal") is None:
            return f"{found:.3f}"
        return f"{found:.3f} (goal {row['goal']:g}: {'reached' if found >= row['goal'] else 'missed'})"

    return show


CELL: Column = ("what", lambda row: row["cell"])

COLUMNS: dict[str, tuple[Column, ...]] = {
    "ceilings": (
        CELL,
        ("ms, quartiles", milliseconds("seconds")),
        ("TFLOP/s", number("tflops_per_second", ",.1f")),
        ("GB/s", number("gb_per_second", ",.0f")),
    ),
    "attention": (
        CELL,
        ("ms, quartiles", milliseconds("seconds")),
        ("TFLOP/s", number("tflops_per_second", ",.1f")),
        ("against", lambda row: row["peer"]),
        ("its TFLOP/s", lambda row: row.get("peer_error") or number("peer_tflops_per_second", ",.1f")(row)),
        ("share", against_goal(lambda row: row.get("share"))),
    ),
    "rows": (
        CELL,
        ("us", lambda row: f"{1e6 * row['seconds']['median']:,.1f}"),
        ("GB/s", number("gb_per_second", ",.0f")),
        ("copy GB/s", number("copy_gb_per_second", ",.0f")),
        ("share", against_goal(lambda row: row["share"])),
    ),
    "funnel": (
        CELL,
        ("ms, quartiles", milliseconds("seconds")),
        ("without", milliseconds("baseline_seconds")),
        ("ratio", median("ratio")),
        ("ideal", number("ideal_ratio", ".3f")),
        ("efficiency", against_goal(lambda row: row["efficiency"])),
    ),
    "peer": (
        CELL,
        ("ours, ms", milliseconds("seconds")),
        ("theirs, ms", milliseconds("peer_seconds")),
        ("ours, tokens/s", number("tokens_per_second", ",.0f")),
        ("theirs", number("peer_tokens_per_second", ",.0f")),
        ("times as fast", against_goal(lambda row: row["speedup"]["median"])),
        ("versions", lambda row: ", ".join(f"{name} {version}" for name, version in row["versions"].items())),
    ),
    "latency": (
        CELL,
        ("ms, quartiles", milliseconds("seconds")),
        ("busy", against_goal(lambda row: row.get("busy_share"))),
        ("kernels", number("kernels", ",d", 1)),
    ),
    "ragged": (
        CELL,
        ("sequences", number("sequences", ",d", 1)),
        ("tokens", number("tokens", ",d", 1)),
        ("tokens/s", number("tokens_per_second", ",.0f")),
        ("equal lengths", number("equal_tokens_per_second", ",.0f")),
        ("share", against_goal(lambda row: row["share"])),
    ),
    "flags": (
        CELL,
        ("ms, quartiles", milliseconds("seconds")),
        ("without", milliseconds("baseline_seconds")),
        ("ratio", median("ratio")),
    ),
}


def file_name(part: str) -> str:
    return f"{part}.json"


def suite_name(part: str) -> str:
    """What the result file of a part calls its suite."""
    return f"accelerator {part}"


def read_tables(folder: Path, parts: Iterable[str]) -> Tables:
    """The result files of a folder by part, in the order of `parts`.

    Raises:
        InputError: a file of such a name that no run has written.
    """
    tables = {}
    for part in parts:
        path = folder / file_name(part)
        if path.exists():
            tables[part] = read_results(path)
            if (suite := tables[part]["suite"]) != suite_name(part):
                raise InputError(f"{path} is of suite {suite!r}, not {suite_name(part)!r}; remove it")
    return tables


def write_plots(folder: Path, tables: Tables) -> None:
    """Draws what there is to draw; without matplotlib nothing, which the report then says."""
    for file, (part, drawable, figure) in PLOTS.items():
        if part in tables and drawable(tables[part]):
            try:
                write_bytes(folder / file, render(figure, tables[part]))
            except ImportError:
                (folder / file).unlink(missing_ok=True)  # of an earlier run


def write_archive(folder: Path) -> None:
    """Packs tables, report and plots of a folder into its `ARCHIVE`: one file to take away."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".md", ".png"):
                archive.add(path, path.name)
    write_bytes(folder / ARCHIVE, content.getvalue())


def write_report(folder: Path, tables: Tables) -> str:
    """Writes report.md and returns its text."""
    sections = [["# Measured on an accelerator"], summary(tables)]
    for part, table in tables.items():
        sections += [[f"## {TITLES[part]}"], [NOTES[part]], *body(part, table, tables), *exceptions(table)]
        for file, (source, drawable, _) in PLOTS.items():
            if source == part and drawable(table):
                drawn = (folder / file).exists()
                sections.append([f"![{TITLES[part]}]({file})" if drawn else f"Not drawn: {file} (needs matplotlib)."])
    sections += [["## Circumstances"], *circumstances(tables)]
    text = "\n\n".join("\n".join(section) for section in sections) + "\n"
    write_text(folder / "report.md", text)
    return text


def summary(tables: Tables) -> list[str]:
    """The device, and every failure."""
    devices = dict.fromkeys(", ".join(table["machine"]["devices"]) for table in tables.values())
    lines = [f"- {device}" for device in devices]
    if any(table["options"]["small"] for table in tables.values()):
        lines.append("- Sizes of a rehearsal: these figures say nothing about speed.")
    wrong = [row for table in tables.values() for row in table["rows"] if not row.get("passed", True)]
    raised = sum(len(table["errors"]) for table in tables.values())
    left_out = sum(len(table["left_out"]) for table in tables.values())
    unfinished = [part for part, table in tables.items() if not table["complete"]]
    lines.append(f"- {len(wrong)} wrong results, {raised} measurements failed, {left_out} left out")
    if unfinished:
        lines.append(f"- stopped before the end of: {', '.join(unfinished)}")
    return lines


def body(part: str, table: Table, tables: Tables) -> list[list[str]]:
    """The tables of one part."""
    if not table["rows"]:
        return []
    if part == "check":
        return check_body(table)
    if part == "engine":
        return [markdown(engine_columns(tables), table["rows"])]
    shown = [markdown(COLUMNS[part], table["rows"])]
    for row in table["rows"]:
        if "most_expensive" in row:
            columns: tuple[Column, ...] = (
                ("kernel", lambda total: f"`{total['name']}`"),
                ("runs", number("runs", ",d", 1)),
                ("ms", number("milliseconds", ",.3f")),
                ("% of all", number("share", ".1f", 100)),
            )
            shown.append(markdown(columns, row["most_expensive"]))
    return shown


def check_body(table: Table) -> list[list[str]]:
    """One line for each op, dtype and precision; every wrong result."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in table["rows"]:
        groups[row["op"], row["dtype"], row["precision"]].append(row)
    columns: tuple[Column, ...] = (
        ("op", lambda group: group["op"]),
        ("dtype, precision", lambda group: f"{group['dtype']}, {group['precision']}"),
        ("checks", lambda group: str(len(group["rows"]))),
        ("worst error", lambda group: f"{max(map(error_of, group['rows'])):.2e}"),
        ("limit", lambda group: f"{group['rows'][0]['limit']:g}"),
        ("wrong", lambda group: str(sum(not row["passed"] for row in group["rows"]))),
    )
    lines = [dict(zip(("op", "dtype", "precision"), key, strict=True), rows=rows) for key, rows in groups.items()]
    wrong = [
        f"- WRONG: {row['cell']}: error {error_of(row):.2e} (limit {row['limit']:g})"
        f"{'' if row['same_bits_twice'] else ', another result the second time'}"
        f"{'' if row['finite'] else ', not finite'}"
        for row in table["rows"]
        if not row["passed"]
    ]
    return [markdown(columns, lines), *([wrong] if wrong else [])]


def error_of(row: Row) -> float:
    """The error of a check; JSON has no number for one that is not finite."""
    return math.inf if row["error"] is None else float(row["error"])


def engine_columns(tables: Tables) -> tuple[Column, ...]:
    """With the share of the matrix product's rate, which stands in another table."""
    rates = [row["tflops_per_second"] for row in tables.get("ceilings", {"rows": []})["rows"] if "flops" in row]
    return (
        CELL,
        ("ms, quartiles", milliseconds("seconds")),
        ("tokens/s", number("tokens_per_second", ",.0f")),
        ("TFLOP/s", number("tflops_per_second", ",.1f")),
        ("share of the matrix rate", against_goal(lambda row: row["tflops_per_second"] / rates[0] if rates else None)),
        ("compiling, s", number("compile_seconds", ",.1f")),
        ("of the time of a full bucket", number("of_full", ".3f")),
    )


def exceptions(table: Table) -> list[list[str]]:
    """What was left out, and what failed."""
    lines = [f"- Left out: {entry['cell']}: {entry['reason']}" for entry in table["left_out"]]
    lines += [f"- FAILED: {entry['cell']}: {entry['error']}" for entry in table["errors"]]
    return [lines] if lines else []


def circumstances(tables: Tables) -> list[list[str]]:
    """Where and how, once for all tables that agree on it."""
    runs: dict[str, list[str]] = defaultdict(list)
    for part, table in tables.items():
        machine = table["machine"]
        lines = [
            f"- command: `{table['command']}`",
            f"- seed {table['options']['seed']}, backend {table['options']['backend']}",
            *(f"- {op} by {answer}" for op, answer in table["served_by"].items()),
            *(f"- {name}: {show(value)}" for name, value in machine.items()),
        ]
        runs["\n".join(lines)].append(f"{part} ({table['started']})")
    return [[f"{', '.join(parts)}:", "", text] for text, parts in runs.items()]


def show(value: Any) -> str:
    """A value of the machine's facts in one line."""
    if isinstance(value, list):
        return ", ".join(map(show, value))
    return "not there" if value is None else " ".join(str(value).split())


def markdown(columns: Iterable[Column], rows: Iterable[Row]) -> list[str]:
    """A table in Markdown."""
    columns = tuple(columns)
    lines = [[title for title, _ in columns], ["---" for _ in columns]]
    lines += [[cell(row).replace("|", "\\|") for _, cell in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
