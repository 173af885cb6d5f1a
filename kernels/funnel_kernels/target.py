"""Where a program runs and with which kernels: one frozen value that every op gets."""

import dataclasses
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from funnel_kernels.errors import BackendUnavailable

BACKENDS = {
    "mosaic": "NVIDIA GPUs of compute capability 9.0: attention in bfloat16, in Pallas Mosaic GPU; all else is XLA's",
    "triton": "NVIDIA GPUs of compute capability 8.0 and newer: kernels in Triton; products are XLA's",
    "tpu": "TPUs v4, v5e, v5p, v6e and 7x: kernels in Pallas; products are XLA's",
    "cpu": "x86-64 CPUs with AVX2 and newer: kernels in C++; without AVX-512-BF16, bfloat16 is multiplied in float32",
    "xla": "anywhere: portable jax.numpy, block by block",
    "reference": "anywhere: the specification, dense and slow; served only when asked for by name",
}
AUTO = ("mosaic", "triton", "tpu", "cpu", "xla")  # best first
KNOWN = ("auto", *BACKENDS)


def check_backend(backend: str) -> None:
    """Raises `BackendUnavailable` unless `backend` is one of `KNOWN`."""
    if backend not in KNOWN:
        raise BackendUnavailable(f"backend {backend!r} does not exist in this build; choose one of {', '.join(KNOWN)}")


class Unsupported(Exception):
    """An implementation does not support a call; the message is the reason. Users see `BackendUnavailable` instead."""


class Served(NamedTuple):
    """The backend that served a call of an op, and the reasons of the better backends that refused this very call."""

    backend: str
    refusals: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "; ".join([self.backend, *(f"not {name}: {reason}" for name, reason in self.refusals)])


class Record:
    """Which backends serve the ops of a program. Ops write into it while the program is traced, see `Target.record`.

    Several threads may trace programs while another one reads.
    """

    def __init__(self) -> None:
        self._served: dict[str, tuple[Served, ...]] = {}
        self._unavailable: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, op: str, served: Served, unavailable: Mapping[str, str] | None = None) -> None:
        """Adds an answer for an op, unless it is known, and the better backends of which no kernel can run at all."""
        with self._lock:
            known = self._served.get(op, ())
            if served not in known:
                self._served[op] = (*known, served)
            self._unavailable |= unavailable or {}

    @classmethod
    def merged(cls, records: Iterable["Record"]) -> "Record":
        """What all of these records say."""
        merged = cls()
        for record in records:
            merged._unavailable |= record.unavailable
            for op, answers in record.served.items():
                for served in answers:
                    merged.add(op, served)
        return merged

    @property
    def served(self) -> dict[str, tuple[Served, ...]]:
        """For each op by name, the distinct answers so far."""
        with self._lock:
            return dict(self._served)

    @property
    def unavailable(self) -> dict[str, str]:
        """The backends that would be better and cannot run here, with the reason of each."""
        with self._lock:
            return dict(self._unavailable)

    def facts(self) -> dict[str, str]:
        """The answers for each op as text for people, e.g. {"attention": "cpu"}; then why no better backend runs."""
        answers = {op: "; also ".join(map(str, answers)) for op, answers in self.served.items()}
        return answers | {f"not {backend}": reason for backend, reason in self.unavailable.items()}

    def backends(self) -> list[str]:
        """The backends that serve at least one op, in alphabetical order."""
        return sorted({answer.backend for answers in self.served.values() for answer in answers})


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a program runs, and with which kernels.

    Attributes:
        backend: "auto" takes the first backend of `AUTO` that serves a call. One of `BACKENDS` serves the call or it is
            refused; XLA runs the ops for which that backend has no kernel.
        platform: JAX's platform, "cpu", "gpu" or "tpu".
        kind: JAX's name of the kind of device, e.g. "NVIDIA H200" or "TPU v5 lite".
        architecture: the compute capability of a GPU, e.g. "9.0" for Hopper; empty on other platforms.
        threads: the largest number of threads of a CPU kernel; 0 is one per core of the process.
        interpret: run Pallas and Triton kernels in their interpreters, on a machine without the device. The values are
            those of `pl.pallas_call`: True or `InterpretParams`. Triton also needs TRITON_INTERPRET=1.
        record: where ops write which backend served them; None writes nothing.

    Raises:
        BackendUnavailable: the backend does not exist.
    """

    backend: str = "auto"
    platform: str = "cpu"
    kind: str = "cpu"
    architecture: str = ""
    threads: int = 0
    interpret: Any = False
    record: Record | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_backend(self.backend)

    @classmethod
    def of(cls, device: jax.Device, *, backend: str = "auto", threads: int = 0) -> "Target":
        """The target for a device, which may also be one of `jax.experimental.topologies`."""
        architecture = getattr(device, "compute_capability", "") if device.platform == "gpu" else ""
        return cls(backend, device.platform, device.device_kind, str(architecture), threads)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The backends to try, best first."""
        return AUTO if self.backend == "auto" else (self.backend,)
