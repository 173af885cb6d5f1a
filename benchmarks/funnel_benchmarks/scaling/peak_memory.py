"""The most memory that was in use at once while something ran."""

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

PROCESS = Path("/proc/self")


@contextmanager
def watched_memory() -> Iterator[dict[str, int]]:
    """Fills a table, when the block ends, with bytes by owner.

    `process` is the most memory that was resident during the block, and `before` what was resident at its beginning;
    neither is there where the operating system does not tell. `device` is what the device counts, if it does, since
    the process began: it cannot be asked to forget.
    """
    peaks: dict[str, int] = {}
    before = forget_peak()
    yield peaks
    if before is not None:
        peaks |= {"process": peak_bytes(), "before": before}
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        peaks["device"] = stats["peak_bytes_in_use"]


def forget_peak() -> int | None:
    """Makes the peak of resident memory what is resident now, in bytes; None where that cannot be done.

    What was freed is given back first: the C library keeps it otherwise, and a larger run before would count.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
    if trim is not None:
        trim(0)
    try:
        (PROCESS / "clear_refs").write_text("5", encoding="ascii")  # see proc_pid_clear_refs(5)
    except OSError:
        return None
    return peak_bytes()


def peak_bytes() -> int:
    """`VmHWM` of Linux: the most memory that was resident since the process began, or since `forget_peak`."""
    status = (PROCESS / "status").read_text(encoding="utf-8")
    (kilobytes,) = re.findall(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) * 1024
