"""An op: one definition, and an implementation for each backend. Which of them serves a call is decided here."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

from funnel_kernels import native_calls, pallas_calls, triton_calls
from funnel_kernels.errors import BackendUnavailable
from funnel_kernels.target import KNOWN, Served, Target, Unsupported

Result = TypeVar("Result")

MODULES = {"triton": "triton_gpu", "tpu": "pallas_tpu", "cpu": "native_cpu", "xla": "xla"}
# Raises `Unsupported` where no kernel of a backend can run, whatever the op.
CHECKS: dict[str, Callable[[Target], object]] = {
    "triton": triton_calls.check,
    "tpu": pallas_calls.check,
    "cpu": native_calls.check,
}


class Op(Generic[Result]):
    """An op and its implementations.

    The implementation of a backend is the function with the op's name in a module of the op's folder: `reference.py`,
    `xla.py`, `native_cpu.py`, `triton_gpu.py` or `pallas_tpu.py`. It is imported by the first call, since some need
    packages that are not everywhere, and it raises `Unsupported` for calls that it does not serve. Every one but the
    reference gets the target besides the call's own arguments.

    Attributes:
        name: of the op.
        folder: the package that holds it.
        kernels: the backends that have a module of their own. Without "xla", XLA compiles the reference.
    """

    def __init__(self, name: str, folder: str, *kernels: str):
        self.name, self.folder, self.kernels = name, folder, kernels

    def __call__(self, *arrays: Any, target: Target, **options: Any) -> Result:
        """Runs the op by the best candidate that serves this call, and notes in the target's record which it was.

        Raises:
            BackendUnavailable: none does; the message has each one's reason.
        """
        refusals: dict[str, str] = {}
        for backend in target.candidates:
            try:
                server, implementation = self.implementation(backend, target)
                result: Result = implementation(*arrays, **options)
            except Unsupported as refusal:
                refusals[backend] = str(refusal)
                continue
            if target.record is not None:
                target.record.add(self.name, Served(server, tuple(refusals.items())))
            return result
        reasons = "; ".join(f"{backend}: {reason}" for backend, reason in refusals.items())
        raise BackendUnavailable(
            f"{self.name} is not served by backend {target.backend!r}: {reasons}; choose one of {', '.join(KNOWN)}"
        )

    def implementation(self, backend: str, target: Target) -> tuple[str, Callable[..., Any]]:
        """The function that a backend runs, and whose it is: an op that a backend has no kernel for is XLA's.

        Raises:
            Unsupported: no kernel of the backend can run on the target.
        """
        if check := CHECKS.get(backend):
            check(target)
        server = backend if backend in (*self.kernels, "reference") else "xla"
        if server not in self.kernels:
            return server, getattr(importlib.import_module(f"{self.folder}.reference"), self.name)
        function = getattr(importlib.import_module(f"{self.folder}.{MODULES[server]}"), self.name)
        return server, partial(function, target=target)
