"""Values and lists in error messages. Files and requests may contain values of any length, and any number of them."""

from collections.abc import Iterable
from typing import Any

MAX_ENTRIES = 10  # a broken checkpoint can have thousands


def abbreviate(entries: Iterable[str]) -> list[str]:
    """The first ten entries, then "and N more" if there are more."""
    entries = list(entries)
    return (
        [*entries[:MAX_ENTRIES], f"and {len(entries) - MAX_ENTRIES:,} more"] if len(entries) > MAX_ENTRIES else entries
    )


def quote(names: Iterable[str]) -> str:
    """Names from a file as one line of a message: the first ten, escaped and shortened."""
    names = list(names)
    more = f" and {len(names) - MAX_ENTRIES:,} more" if len(names) > MAX_ENTRIES else ""
    return ", ".join(f"{name!r:.80}" for name in names[:MAX_ENTRIES]) + more


def shorten(value: Any) -> str:
    """A value in at most about 80 characters."""
    large = isinstance(value, int) and abs(value) > 2**64
    return f"an integer of {value.bit_length()} bits" if large else f"{value!r:.80}"
