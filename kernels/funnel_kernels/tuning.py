"""Block sizes that were measured on a device: `tuned/DEVICE.json` beside this file, one table for each kind of device.

A table has one entry per op, width and dtype, with the time that was measured; `python -m funnel_benchmarks.tune`
writes it. Nothing is tuned while serving: what no table has gets the rule in the kernel's own file.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

TUNED = Path(__file__).parent / "tuned"


class Key(NamedTuple):
    """What block sizes depend on.

    Attributes:
        op: "attention", "pool_norm" or "recover_norm".
        width: of the rows that a block holds, rounded up to a power of two: the head dim of attention, else the
            model's width.
        dtype: of the activations.
    """

    op: str
    width: int
    dtype: str


def find(key: Key, device_kind: str) -> Mapping[str, int] | None:
    """The block sizes that were measured on a kind of device, or None."""
    return read_table(table_file(device_kind)).get(key)


def table_file(device_kind: str) -> Path:
    """Where the table of a kind of device is, e.g. `tuned/nvidia-h200.json` for "NVIDIA H200"."""
    return TUNED / f"{re.sub('[^a-z0-9]+', '-', device_kind.lower()).strip('-')}.json"


@functools.cache
def read_table(file: Path) -> Mapping[Key, Mapping[str, int]]:
    """The entries of a table; none if there is no such file."""
    if not file.is_file():
        return {}
    entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
    return {Key(entry["op"], entry["width"], entry["dtype"]): entry["sizes"] for entry in entries}
