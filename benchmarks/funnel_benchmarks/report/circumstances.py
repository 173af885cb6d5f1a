"""How and where a result was measured, and what is missing from it, from the fields that all result files have."""

from collections.abc import Iterator
from typing import Any

from funnel_benchmarks.results import ENOUGH_SAMPLES, Row, differences, fewest_samples

# Facts about the machine that have lines of their own; the others are versions.
DEVICES, SYSTEM, REVISION = "devices", "platform", "revision"
PROCESSOR = ("cpu", "kernel_instruction_set", "cores", "memory_gb")
INSTRUCTIONS = "instruction_sets"
APART = (DEVICES, *PROCESSOR, INSTRUCTIONS, SYSTEM, REVISION)
Fact = tuple[str, list[str]]  # a name, and what there is to say


def circumstances(content: Row) -> Iterator[Fact]:
    """The machine, versions, times, and all that was left out or failed; of what a file does not say, nothing."""
    machine = content["machine"]
    yield "Devices", [shown(machine.get(DEVICES))]
    yield "Processor", [processor(machine)]
    yield "Instruction sets", [shown(machine.get(INSTRUCTIONS))]
    yield "System", [shown(machine.get(SYSTEM))]
    versions = {name: value for name, value in machine.items() if name not in APART and value is not None}
    yield "Versions", [", ".join(f"{name} {shown(value)}" for name, value in versions.items())]
    yield "Revision", [shown(machine.get(REVISION))]
    yield "Samples of each side", [samples(content)]
    yield "Started", [content["started"]]
    yield "Resumed", [resumed(machine, run) for run in content["resumed"]]
    yield "Left out", [f"{entry['cell']}: {entry['reason']}" for entry in content["left_out"]]
    yield "Failed", [f"{entry['cell']}: {entry['error']}" for entry in content["errors"]]
    yield "Wrong results", [row["cell"] for row in wrong(content)]


def samples(content: Row) -> str:
    """How many samples the rows have, and how many rows have too few to be quoted."""
    counts = [count for row in content["rows"] if (count := fewest_samples(row)) is not None]
    if not counts:
        return ""
    few = sum(count < ENOUGH_SAMPLES for count in counts)
    span = " to ".join(f"{count}" for count in dict.fromkeys((min(counts), max(counts))))
    return span + (f"; fewer than {ENOUGH_SAMPLES} in {few} of {len(counts)} rows, too few to quote" if few else "")


def warning(content: Row) -> str:
    """What a reader must know before anything else; empty if all is well."""
    missing = len(content["left_out"]) - len(repeated(content))
    counts = (
        (not content["complete"], "the run was stopped before its end"),
        (content["errors"], f"failed: {len(content['errors'])}"),
        (wrong(content), f"wrong results: {len(wrong(content))}"),
        (missing, f"left out: {missing}"),
    )
    said = "; ".join(text for count, text in counts if count)
    return f"Not everything is here: {said}. The circumstances below have the reasons." if said else ""


def repeated(content: Row) -> list[Row]:
    """What was left out because a row that is there says the same, so that nothing is missing."""
    cells = [row["cell"] for row in content["rows"]]
    return [entry for entry in content["left_out"] if entry.get("same_as") in cells]


def wrong(content: Row) -> list[Row]:
    """The rows that hold a wrong result by their own account."""
    return [row for row in content["rows"] if not row.get("passed", True)]


def where_and_when(content: Row) -> str:
    """Machine and time in a line."""
    machine = content["machine"]
    return "; ".join(filter(None, (shown(machine.get(DEVICES)), processor(machine), content["started"])))


def processor(machine: Row) -> str:
    forms = zip(PROCESSOR, ("{}", "{}", "{} cores", "{} GB"), strict=True)
    return ", ".join(form.format(shown(machine[name])) for name, form in forms if machine.get(name) is not None)


def resumed(first: Row, run: Row) -> str:
    """When a later run added to the file, and what was different about its machine."""
    changes = [
        f"{name} {shown(now) or 'unknown'} instead of {shown(then) or 'unknown'}"
        for name, then, now in differences(first, run["machine"])
    ]
    return run["started"] + (f", with {', '.join(changes)}" if changes else "")


def shown(value: Any) -> str:
    """A value in one line, a list without brackets; nothing for None."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return "" if value is None else " ".join(str(value).split())
