"""An op: one definition, and one implementation per backend. This file decides which implementation serves a call."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

from funnel_kernels import mosaic_calls, native_calls, pallas_calls, triton_calls
from funnel_kernels.errors import BackendUnavailable
from funnel_kernels.target import KNOWN, Served, Target, Unsupported

Result = TypeVar("Result")

MODULES = {
    "mosaic": "mosaic_gpu",
    "triton": "triton_gpu",
    "tpu": "pallas_tpu",
    "cpu": "native_cpu",
    "xla": "xla",
}
# For each backend, a function that raises `Unsupported` if none of its kernels can run on a target.
CHECKS: dict[str, Callable[[Target], object]] = {
    "mosaic": mosaic_calls.check,
    "triton": triton_calls.check,
    "tpu": pallas_calls.check,
    "cpu": native_calls.check,
}


class Op(Generic[Result]):
    """An op and its implementations.

    A backend's implementation is the function with the op's name in one module of the op's folder: `reference.py`,
    `xla.py`, `native_cpu.py`, `triton_gpu.py`, `mosaic_gpu.py` or `pallas_tpu.py`. The module is imported at the first
    call, because some modules need optional packages. An implementation raises `Unsupported` for calls that it does not
    serve. Each one gets the arguments of the call, and all but the reference also get the target.

    Attributes:
        name: the name of the op.
        folder: the import name of the op's package.
        kernels: the backends that have a module in the folder. Without "xla", XLA compiles the reference.
    """

    def __init__(self, name: str, folder: str, *kernels: str):
        self.name, self.folder, self.kernels = name, folder, kernels

    def __call__(self, *arrays: Any, target: Target, **options: Any) -> Result:
        """Runs the op with the best backend that serves this call, and writes its name into the target's record.

        Raises:
            BackendUnavailable: no candidate serves it; the message contains the reason of each.
        """
        unavailable: dict[str, str] = {}  # no kernel of these backends can run on the target
        refusals: dict[str, str] = {}  # these backends do not serve this call
        for backend in self.candidates(target):
            if reason := problem(backend, target):
                unavailable[backend] = reason
                continue
            server, implementation = self.implementation(backend, target)
            try:
                result: Result = implementation(*arrays, **options)
            except Unsupported as refusal:
                refusals[backend] = str(refusal)
                continue
            if target.record is not None:
                target.record.add(self.name, Served(server, tuple(refusals.items())), unavailable)
            return result
        reasons = "; ".join(f"{backend}: {reason}" for backend, reason in (unavailable | refusals).items())
        raise BackendUnavailable(
            f"{self.name} is not served by backend {target.backend!r}: {reasons}; choose one of {', '.join(KNOWN)}"
        )

    def candidates(self, target: Target) -> tuple[str, ...]:
        """The backends to try, best first. "auto" tries Mosaic only for its own ops: on its GPUs Triton has others."""
        skipped = {"mosaic"} - {*self.kernels} if target.backend == "auto" else set()
        return tuple(backend for backend in target.candidates if backend not in skipped)

    def implementation(self, backend: str, target: Target) -> tuple[str, Callable[..., Any]]:
        """The function that a backend runs, and before it the backend whose function it is.

        That is "xla" if `backend` has no kernel for the op.
        """
        server = backend if backend in (*self.kernels, "reference") else "xla"
        if server not in self.kernels:
            return server, getattr(importlib.import_module(f"{self.folder}.reference"), self.name)
        function = getattr(importlib.import_module(f"{self.folder}.{MODULES[server]}"), self.name)
        return server, partial(function, target=target)


def problem(backend: str, target: Target) -> str | None:
    """Why no kernel of a backend can run on the target; None if they can."""
    try:
        if check := CHECKS.get(backend):
            check(target)
    except Unsupported as refusal:
        return str(refusal)
    return None
