"""Lists in error messages: the first ten entries, and how many more there are."""

from collections.abc import Iterable

MOST = 10  # entries of a list; a broken checkpoint can give thousands


def first_of(entries: Iterable[str]) -> list[str]:
    """The first ten of some lines, then "and N more" if there are more."""
    entries = list(entries)
    return [*entries[:MOST], f"and {len(entries) - MOST:,} more"] if len(entries) > MOST else entries


def quote(names: Iterable[str]) -> str:
    """Names that a file gave, for one line of a message: the first ten, escaped and cut."""
    names = list(names)
    more = f" and {len(names) - MOST:,} more" if len(names) > MOST else ""
    return ", ".join(f"{name!r:.80}" for name in names[:MOST]) + more
