"""Checks of single values: the arguments of a user, and the fields of a file.

Each check returns a plain Python value, so that NumPy values are accepted too.
"""

import sys
from typing import Any

import numpy as np

from funnel_engine.messages import shorten
from funnel_kernels.errors import ConfigError, FunnelError


def check_integer(
    name: str, value: Any, *, least: int, most: int | None = None, error: type[FunnelError] = ConfigError
) -> int:
    """Raises `error` unless `value` is an integer within the limits. A bool is not an integer here."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise error(f"{name}={shorten(value)} must be an integer {limits}")
    return int(value)


def check_positive(name: str, value: Any) -> int:
    """Raises `ConfigError` unless `value` is an integer of at least 1."""
    return check_integer(name, value, least=1)


def check_number(name: str, value: Any) -> float:
    """Raises `ConfigError` unless `value` is a finite number above 0."""
    plain = value.item() if isinstance(value, (np.integer, np.floating)) else value
    is_number = isinstance(plain, (int, float)) and not isinstance(plain, bool)
    if not is_number or not 0 < plain <= sys.float_info.max:
        raise ConfigError(f"{name}={shorten(value)} must be a finite number above 0")
    return float(plain)


def check_flag(name: str, value: Any, *, error: type[FunnelError] = ConfigError) -> bool:
    """Raises `error` unless `value` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise error(f"{name}={shorten(value)} must be True or False")
    return bool(value)


def check_option(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises `ConfigError` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}={shorten(value)} is unknown; choose one of {', '.join(choices)}")
