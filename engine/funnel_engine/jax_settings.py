"""JAX as an engine needs it, whatever the process does with it: its settings, its device, and forks.

JAX's settings belong to the process, or to a thread inside a `with`, and a user may run with any of them. An engine
makes, places and runs its programs under JAX's own defaults, so that they neither change its results nor refuse its
work.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax

from funnel_kernels.errors import BackendUnavailable, ConfigError

# The settings that change results or refuse work: what sets each of them for a block of code, and the value that JAX
# has by itself.
SETTINGS: dict[str, tuple[Callable[[Any], AbstractContextManager[Any]], Any]] = {
    "jax_enable_x64": (jax.enable_x64, False),
    "jax_disable_jit": (jax.disable_jit, False),
    "jax_numpy_rank_promotion": (jax.numpy_rank_promotion, "allow"),
    "jax_numpy_dtype_promotion": (jax.numpy_dtype_promotion, "standard"),
    "jax_default_matmul_precision": (jax.default_matmul_precision, None),
    "jax_debug_nans": (jax.debug_nans, False),
    "jax_debug_infs": (jax.debug_infs, False),
    "jax_check_tracer_leaks": (jax.check_tracer_leaks, False),
    "jax_no_tracing": (jax.no_tracing, False),
    "jax_no_execution": (jax.no_execution, False),
    "jax_transfer_guard_host_to_device": (jax.transfer_guard_host_to_device, "allow"),
    "jax_transfer_guard_device_to_device": (jax.transfer_guard_device_to_device, "allow"),
    "jax_transfer_guard_device_to_host": (jax.transfer_guard_device_to_host, "allow"),
}
# Experimental settings that JAX sets for the process only, and with which it does not trace the kernels.
REFUSED = {"jax_scan3": False, "jax_error_checking_behavior_divide": "ignore"}

Method = TypeVar("Method", bound=Callable[..., Any])

_process: int | None = None  # the id of the process in which the first engine was made


def own_settings() -> AbstractContextManager[Any]:
    """JAX runs what is inside under its own defaults.

    Raises:
        ConfigError: the process has one of the settings `REFUSED`.
    """
    for name, default in REFUSED.items():
        if (value := getattr(jax.config, name, default)) != default:
            raise ConfigError(
                f"JAX cannot run the engine with {name}={value!r}; set jax.config.update({name!r}, {default!r})"
            )
    changed = [name for name, (_, default) in SETTINGS.items() if getattr(jax.config, name) not in (None, default)]
    has_mesh = not jax.sharding.get_abstract_mesh().empty
    return changed_back(changed, has_mesh) if changed or has_mesh else contextlib.nullcontext()


@contextlib.contextmanager
def changed_back(changed: list[str], has_mesh: bool) -> Iterator[None]:
    """Inside, these settings have JAX's defaults, and there is no mesh (`jax.set_mesh`)."""
    with contextlib.ExitStack() as stack:
        for name in changed:
            manager, default = SETTINGS[name]
            stack.enter_context(manager(default))
        if has_mesh:
            stack.enter_context(jax.set_mesh(None))
        yield


def check_process() -> None:
    """Raises `BackendUnavailable` in a fork of the process that made the first engine."""
    global _process
    if _process is None:
        _process = os.getpid()
    elif _process != os.getpid():
        raise BackendUnavailable(
            f"JAX runs in process {_process} and this is a fork of it, {os.getpid()}, which has none of its threads; "
            "load the engine in each process after the fork only, or start processes with the method 'spawn'"
        )


def guarded(method: Method) -> Method:
    """A method of an engine, which is refused in a fork and runs under `own_settings`."""

    @functools.wraps(method)
    def run(*arguments: Any, **options: Any) -> Any:
        check_process()
        with own_settings():
            return method(*arguments, **options)

    return run  # type: ignore[return-value]


def default_device() -> jax.Device:
    """The device on which JAX puts an array that is not told where to go.

    Raises:
        BackendUnavailable: JAX does not start.
        ConfigError: the device is not of the platform that JAX runs on.
    """
    try:
        jax.devices()
    except Exception as error:  # a RuntimeError or an AssertionError, with or without a message
        platforms = jax.config.values["jax_platforms"] or ""
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise BackendUnavailable(
            f"JAX does not start with JAX_PLATFORMS={platforms} ({reason:.300}); install JAX for that platform, or set "
            "JAX_PLATFORMS=cpu"
        ) from error
    with own_settings():
        (device,) = jax.device_put(0).devices()
    if device.platform != jax.default_backend():
        raise ConfigError(
            f"JAX's default device is {device_name(device)}, but JAX runs on {jax.default_backend()}; "
            f"set JAX_PLATFORMS={device.platform} to run there"
        )
    return device


def device_name(device: jax.Device) -> str:
    """E.g. "cpu:0"."""
    return f"{device.platform}:{device.id}"
