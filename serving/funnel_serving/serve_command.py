"""The command `funnel serve`. It imports late what the extra `serve` installs: `funnel --help` loads this file."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from funnel_kernels.errors import ConfigError
from funnel_serving.settings import Settings, option_name, read_flag, variable_name

PACKAGES = ("orjson", "prometheus_client", "starlette", "uvicorn", "httptools", "uvloop")
PATH = click.Path(path_type=Path)


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each setting."""
    for field in reversed(dataclasses.fields(Settings)):
        if "read" not in field.metadata:
            continue
        option, about = option_name(field.name), field.metadata["about"]
        if field.metadata["read"] is read_flag:
            declaration, kind = f"{option}/{option_name('no_' + field.name)}", None
        else:
            declaration, kind = option, str
            about += f"  [default: {field.default}]" if field.default not in (None, ()) else ""
        command = click.option(declaration, field.name, type=kind, default=None, help=about)(command)
    return command


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--config", type=PATH, envvar=variable_name("config"), help="TOML file with any of these settings.")
@setting_options
def serve(checkpoint: Path, config: Path | None, **options: Any) -> None:
    """Serve a CHECKPOINT over HTTP, to clients of OpenAI and of text-embeddings-inference.

    Every option is a key of the TOML file too (max_body_bytes = 1000000), and a variable of the environment
    (FUNNEL_SERVE_MAX_BODY_BYTES). An option counts before a variable, and a variable before the file.

    Example: funnel serve my-gemma --funnel 6:2/mean --port 8000
    """
    require_packages()
    from funnel_serving.server import run

    given = {option_name(name): value for name, value in options.items() if value is not None}
    raise SystemExit(run(Settings.read(checkpoint, given, os.environ, config)))


def require_packages() -> None:
    """Raises `ConfigError` if the packages of the extra `serve` are not installed."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{package} is not installed; run: pip install 'funnel-engine[serve]'")
