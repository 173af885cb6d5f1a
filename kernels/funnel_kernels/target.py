"""Where a program runs and whose kernels run it: one frozen value that every op gets."""

import dataclasses
from collections import defaultdict
from typing import Any, NamedTuple

import jax

from funnel_kernels.errors import BackendUnavailable

BACKENDS = {
    "triton": "NVIDIA GPUs of compute capability 8.0 and newer: kernels in Triton; products are XLA's",
    "tpu": "TPUs v4, v5e, v5p, v6e and 7x: kernels in Pallas; products are XLA's",
    "cpu": "x86-64 CPUs with AVX2 and newer: kernels in C++; float32 products need AVX-512, bfloat16 ones AVX-512-BF16",
    "xla": "anywhere: portable jax.numpy, block by block",
    "reference": "anywhere: the specification, dense and slow; served only when asked for by name",
}
AUTO = ("triton", "tpu", "cpu", "xla")  # best first
KNOWN = ("auto", *BACKENDS)


def check_backend(backend: str) -> None:
    """Raises `BackendUnavailable` unless `backend` is one of `KNOWN`."""
    if backend not in KNOWN:
        raise BackendUnavailable(f"backend {backend!r} does not exist in this build; choose one of {', '.join(KNOWN)}")


class Unsupported(Exception):
    """An implementation does not serve a call; the message is the reason. Users see `BackendUnavailable` instead."""


class Served(NamedTuple):
    """The backend that served a call of an op, and why those that were tried before it did not."""

    backend: str
    refusals: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "; ".join([self.backend, *(f"not {name}: {reason}" for name, reason in self.refusals)])


class Record:
    """What served the ops of a program. An op writes here while the program is traced, see `Target.record`.

    Attributes:
        served: for every op by its name, each answer once.
    """

    def __init__(self) -> None:
        self.served: dict[str, list[Served]] = defaultdict(list)

    def add(self, op: str, served: Served) -> None:
        if served not in self.served[op]:
            self.served[op].append(served)

    def facts(self) -> dict[str, str]:
        """For people: the answers for each op, e.g. {"attention": "cpu"}."""
        return {op: "; also ".join(map(str, answers)) for op, answers in self.served.items()}

    def backends(self) -> list[str]:
        """The backends that serve anything, in alphabetical order."""
        return sorted({answer.backend for answers in self.served.values() for answer in answers})


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a program runs and whose kernels run it.

    Attributes:
        backend: "auto", which takes the best of `AUTO` that serves a call, or one of `BACKENDS`, which is taken or
            refused; an op that it has no kernel for is XLA's.
        platform: of JAX, "cpu", "gpu" or "tpu".
        kind: of the device, as JAX names it, e.g. "NVIDIA H200" or "TPU v5 lite".
        architecture: of a GPU, e.g. "9.0", the compute capability of Hopper; empty elsewhere.
        threads: the most that a kernel for CPUs uses; 0 is one for each core of the process.
        interpret: run Pallas's and Triton's kernels in their interpreters, on a host without the device: what
            `pl.pallas_call` takes, True or `InterpretParams`. Triton needs TRITON_INTERPRET=1 in the environment too.
        record: where ops write what served them; None writes nothing.

    Raises:
        BackendUnavailable: no such backend.
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
        """The target of programs that run on a device, which may be one of `jax.experimental.topologies`."""
        architecture = getattr(device, "compute_capability", "") if device.platform == "gpu" else ""
        return cls(backend, device.platform, device.device_kind, str(architecture), threads)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The backends that may serve, best first."""
        return AUTO if self.backend == "auto" else (self.backend,)
