"""A process that loads an engine and embeds once: `python -m funnel_benchmarks.cpu.process_memory CHECKPOINT LENGTHS`.

LENGTHS is JSON: tokens of each sequence. The last line of the output is JSON: the most memory that the process has had
resident after each step, in bytes.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

from funnel_benchmarks.engine_costs import random_ids
from funnel_engine import Engine


def peak_bytes(status: Path = Path("/proc/self/status")) -> int:
    """`VmHWM` of this program alone; getrusage's figure begins with that of the process that started it."""
    (kilobytes,) = re.findall(r"^VmHWM:\s*(\d+) kB$", status.read_text(encoding="utf-8"), re.MULTILINE)
    return int(kilobytes) * 1024


def main() -> None:
    checkpoint, lengths = sys.argv[1:]
    peaks = {"imported": peak_bytes()}
    engine = Engine.load(checkpoint)
    peaks["loaded"] = peak_bytes()
    engine.embed(random_ids(engine, np.array(json.loads(lengths), np.int32)))
    print(json.dumps(peaks | {"embedded": peak_bytes()}))


if __name__ == "__main__":
    main()
