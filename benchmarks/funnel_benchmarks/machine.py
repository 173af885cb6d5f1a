"""What a result must say about where it was measured. Nothing here names a path or a host."""

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import numpy as np

from funnel_kernels import native_calls
from funnel_kernels.errors import ConfigError

CPUINFO = Path("/proc/cpuinfo")
# The instruction sets of x86-64 that decide how fast products are, by Linux's names, and the least FUNNEL_CPU_ISA that
# allows each of them. The limits are in order.
INSTRUCTION_SETS = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx_vnni": "avx512_vnni",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx",
    "amx_bf16": "amx",
}
BFLOAT16_SETS = {"avx512_bf16", "amx_bf16"}
INT8_SETS = {"avx_vnni", "avx512_vnni", "amx_int8"}


def machine_facts() -> dict[str, Any]:
    """Processor, memory, devices and versions, as plain JSON values."""
    return {
        "cpu": cpu_model(),
        "kernel_instruction_set": native_calls.instruction_set(),
        "cores": usable_cores(),
        "instruction_sets": instruction_sets(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "numpy": np.__version__,
        "triton": version_of("triton"),
        "jax-triton": version_of("jax-triton"),
        "platform_version": jax.devices()[0].client.platform_version,
        "driver": nvidia_driver(),
        "revision": git_revision(Path(__file__)),
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_driver() -> str | None:
    """The driver's version, where NVIDIA's own tool tells it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 and answer.stdout.strip() else None


def cpu_model() -> str:
    """The processor's name as the system tells it, else its architecture."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Which of `INSTRUCTION_SETS` the processor has, whatever a library is told to use."""
    flags = cpuinfo("flags").split()
    return [name for name in INSTRUCTION_SETS if name in flags]


def kernel_limit() -> str | None:
    """What FUNNEL_CPU_ISA limits the engine's kernels to; None without a limit, or without kernels.

    Raises:
        ConfigError: FUNNEL_CPU_ISA is not the name of an instruction set.
    """
    try:
        import funnel_native

        return funnel_native.limit()
    except ImportError:
        return None
    except ValueError as error:
        raise ConfigError(str(error)) from error


def allowed_sets() -> list[str]:
    """Those of `instruction_sets()` that FUNNEL_CPU_ISA allows."""
    limit, levels = kernel_limit(), list(dict.fromkeys(INSTRUCTION_SETS.values()))
    allowed = levels if limit is None else levels[: levels.index(limit) + 1]
    return [name for name in instruction_sets() if INSTRUCTION_SETS[name] in allowed]


def multiplies_bfloat16() -> bool:
    """Whether there are products of bfloat16; otherwise software widens them, which is slower than float32."""
    return not BFLOAT16_SETS.isdisjoint(allowed_sets())


def multiplies_int8() -> bool:
    """Whether there are products of int8 with int32 sums (VNNI, AMX); otherwise sums of two products saturate."""
    return not INT8_SETS.isdisjoint(allowed_sets())


def cpuinfo(field: str) -> str:
    """What Linux says of the first processor; empty if it says nothing."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field)
    return next(values, "")


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
