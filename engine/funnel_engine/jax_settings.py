"""Protects an engine from the process around it: JAX's settings, its default device, and forks.

JAX's settings belong to the process, or to a thread inside a `with`, and a user may change any of them. An engine
compiles and runs its programs under JAX's defaults, so that user settings do not change its results or make it fail.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax

from funnel_kernels.errors import BackendUnavailable, ConfigError

# The settings that change results or make work fail: the context manager that sets each of them, and JAX's default.
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
# Experimental settings under which JAX does not trace the kernels, with the value that they must have. They can only
# be set for the whole process.
REFUSED = {"jax_scan3": False, "jax_error_checking_behavior_divide": "ignore"}

Method = TypeVar("Method", bound=Callable[..., Any])

_process: int | None = None  # the id of the process in which the first engine was made


def default_settings() -> AbstractContextManager[Any]:
    """A context in which JAX has its default settings.

    Raises:
        ConfigError: one of the settings `REFUSED` is changed.
    """
    for name, default in REFUSED.items():
        if (value := getattr(jax.config, name, default)) != default:
            raise ConfigError(
                f"JAX cannot run the engine with {name}={value!r}; set jax.config.update({name!r}, {default!r})"
            )
    changed = [name for name, (_, default) in SETTINGS.items() if getattr(jax.config, name) not in (None, default)]
    has_mesh = not jax.sharding.get_abstract_mesh().empty
    return restore_defaults(changed, has_mesh) if changed or has_mesh else contextlib.nullcontext()


@contextlib.contextmanager
def restore_defaults(changed: list[str], has_mesh: bool) -> Iterator[None]:
    """A context in which these settings have JAX's defaults, and no mesh is set (`jax.set_mesh`)."""
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
            f"JAX runs in process {_process} and this is a fork of it, {os.getpid()}, which does not have its threads; "
            "load the engine in each process after the fork, or start processes with the method 'spawn'"
        )


def guarded(method: Method) -> Method:
    """Makes a method of an engine raise in a fork, and run under `default_settings`."""

    @functools.wraps(method)
    def run(*arguments: Any, **options: Any) -> Any:
        check_process()
        with default_settings():
            return method(*arguments, **options)

    return run  # type: ignore[return-value]


def default_device() -> jax.Device:
    """The device on which JAX puts arrays by default.

    Raises:
        BackendUnavailable: JAX does not start.
        ConfigError: the device is on another platform than the one that JAX runs on, or JAX traces a function.
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
    with default_settings():
        array = jax.device_put(0)
    if isinstance(array, jax.core.Tracer):
        raise ConfigError(
            "an engine cannot be made inside jax.jit or another transformation of JAX; make it outside, and call it "
            "outside too"
        )
    (device,) = array.devices()
    if device.platform != jax.default_backend():
        raise ConfigError(
            f"JAX's default device is {device_name(device)}, but JAX runs on {jax.default_backend()}; "
            f"set JAX_PLATFORMS={device.platform} to run there"
        )
    return device


def device_name(device: jax.Device) -> str:
    """The name of a device in messages, e.g. "cpu:0"."""
    return f"{device.platform}:{device.id}"
