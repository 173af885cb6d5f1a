"""Block sizes that were measured on a device: one table per kind of device, `tuned/DEVICE.json` in this folder.

A table has one entry per op, width and dtype, with the measured time; `python -m funnel_benchmarks.tune` writes it.
Nothing is tuned while serving. Where no table has an entry, the rule in the kernel's file gives the sizes.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

TUNED = Path(__file__).parent / "tuned"


class Key(NamedTuple):
    """The key of an entry: what block sizes depend on.

    Attributes:
        op: "attention", "pool_norm" or "recover_norm".
        width: the width of a row in a block, rounded up to a power of two: for attention the head dim, else the
            model's width.
        dtype: the dtype of the activations.
    """

    op: str
    width: int
    dtype: str


def find(key: Key, device_kind: str) -> Mapping[str, int] | None:
    """The block sizes that were measured on a kind of device; None if there are none."""
    return read_table(table_file(device_kind)).get(key)


def table_file(device_kind: str) -> Path:
    """The file of a device's table, e.g. `tuned/nvidia-h200.json` for "NVIDIA H200"."""
    return TUNED / f"{re.sub('[^a-z0-9]+', '-', device_kind.lower()).strip('-')}.json"


@functools.cache
def read_table(file: Path) -> Mapping[Key, Mapping[str, int]]:
    """The entries of a table; empty if the file does not exist."""
    if not file.is_file():
        return {}
    entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
    return {Key(entry["op"], entry["width"], entry["dtype"]): entry["sizes"] for entry in entries}
