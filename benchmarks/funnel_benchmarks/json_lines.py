"""JSON documents with a line for each entry, which a reader, `git diff` and `grep` can follow."""

import json
from typing import Any

DIGITS = 6  # of a measured number; no clock or machine here is more precise


def document(content: dict[str, Any]) -> str:
    """A field on each line; a list of objects or of lists has a line for each of its entries.

    Raises:
        ValueError: a number that JSON does not have.
    """
    return "{\n" + ",\n".join(f"{one_line(name)}: {field(value)}" for name, value in content.items()) + "\n}\n"


def field(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
        return "[\n" + ",\n".join(map(one_line, value)) + "\n]"
    return one_line(value)


def one_line(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def rounded(value: Any) -> Any:
    """A JSON value with all of its floating-point numbers rounded to `DIGITS` significant digits."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
