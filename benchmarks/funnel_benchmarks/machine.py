"""What a result must say about where it was measured. Nothing here names a path or a host."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

from funnel_kernels import native_calls


def machine_facts() -> dict[str, Any]:
    """Processor, memory, devices and versions, as plain JSON values."""
    return {
        "cpu": cpu_model(),
        "instruction_set": native_calls.instruction_set(),
        "cores": usable_cores(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "revision": git_revision(Path(__file__)),
    }


def cpu_model() -> str:
    """The processor's name as the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_revision(source: Path) -> str | None:
    """The commit that tracks `source`, with "-dirty" after it if anything differs; None outside a checkout."""
    git = ("git", "-C", str(source.parent))
    try:
        subprocess.run((*git, "ls-files", "--error-unmatch", source.name), check=True, capture_output=True)
        command = (*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory_gb() -> dict[str, float]:
    """The most memory in use at once since the process began: of the process, and of the device if it keeps count."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        peaks["device"] = stats["peak_bytes_in_use"] / 1e9
    return peaks
