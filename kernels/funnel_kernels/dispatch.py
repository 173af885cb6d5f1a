"""Which backend serves an op here, and why.

An op is a table from backend name to function. A function that does not support what it is asked raises
`NotImplementedError` with the reason. `backend="auto"` tries the backends of `AUTO` in order and takes the first that
does not refuse; a backend that is named is taken or refused, never replaced.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from funnel_kernels.errors import BackendUnavailable

BACKENDS = {
    "triton": "NVIDIA GPUs of compute capability 8.0 and newer: kernels in Triton",
    "tpu": "TPUs v4, v5e, v5p, v6e and 7x: kernels in Pallas",
    "cpu": "x86-64 CPUs with AVX2 and newer: kernels in C++; float32 products need AVX-512, bfloat16 ones AVX-512-BF16",
    "xla": "anywhere: portable jax.numpy, block by block",
    "reference": "anywhere: the specification, dense and slow; served only when asked for by name",
}
AUTO = ("triton", "tpu", "cpu", "xla")  # best first

Implementations = Mapping[str, Callable[..., Any]]


def check_backend(backend: str) -> None:
    """Raises `BackendUnavailable` unless `backend` is "auto" or one of `BACKENDS`."""
    known = ("auto", *BACKENDS)
    if backend not in known:
        raise BackendUnavailable(f"backend {backend!r} does not exist in this build; choose one of {', '.join(known)}")


def candidates(backend: str) -> tuple[str, ...]:
    """The backends that `backend` stands for, best first."""
    check_backend(backend)
    return AUTO if backend == "auto" else (backend,)


def serve(op: str, implementations: Implementations, backend: str, *arrays: Any, **options: Any) -> Any:
    """Runs `op` on the first candidate backend that supports these arrays and options.

    Raises:
        BackendUnavailable: no candidate does; the message has each one's reason.
    """
    name, result, refusals = attempt(implementations, backend, *arrays, **options)
    if name is None:
        reasons = "; ".join(f"{refuser}: {reason}" for refuser, reason in refusals.items())
        known = ", ".join(("auto", *BACKENDS))
        raise BackendUnavailable(f"{op} is not served by backend {backend!r}: {reasons}; choose one of {known}")
    return result


def attempt(
    implementations: Implementations, backend: str, *arrays: Any, **options: Any
) -> tuple[str | None, Any, dict[str, str]]:
    """Tries the candidates in order: the one that served (or None), its result, and why those before it refused."""
    refusals = {}
    for name in candidates(backend):
        if name not in implementations:
            refusals[name] = "it has no implementation"
            continue
        try:
            return name, implementations[name](*arrays, **options), refusals
        except NotImplementedError as refusal:
            refusals[name] = str(refusal)
    return None, None, refusals


def explain(
    implementations: Implementations, backend: str, *shapes: Any, **options: Any
) -> tuple[str | None, dict[str, str]]:
    """Which backend would serve arrays of these shapes (or None), and why those before it would not. Runs nothing.

    Args:
        shapes: `jax.ShapeDtypeStruct`, trees of them, or None where there is no array.
    """
    answers = []

    def traced(*arrays: jax.Array) -> Any:
        name, result, refusals = attempt(implementations, backend, *arrays, **options)
        answers.append((name, refusals))
        return result

    jax.eval_shape(traced, *shapes)
    return answers[0]
