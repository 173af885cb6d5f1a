"""The settings of the server. Each is declared once; options, environment variables and keys of a file follow from it.

The setting `max_body_bytes` is the option `--max-body-bytes`, the variable `FUNNEL_SERVE_MAX_BODY_BYTES` and the key
`max_body_bytes` of the file of `--config`. An option counts before a variable, and a variable before the file.
"""

import dataclasses
import math
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from funnel_engine.config import ATTENTIONS, Funnel, parse_funnel, read_funnel
from funnel_engine.engine import MAX_BATCH_TOKENS
from funnel_engine.heads import POOLINGS
from funnel_engine.messages import abbreviate, shorten
from funnel_engine.threads import MOST_THREADS
from funnel_engine.weights import DTYPES
from funnel_kernels import BACKENDS
from funnel_kernels.errors import ConfigError, FunnelError

ENVIRONMENT = "FUNNEL_SERVE_"
LONGEST = 24 * 3600.0  # seconds, of a time limit
Reader = Callable[[str, Any], Any]  # of the name for messages and a value: text, or what TOML gives


def read_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ConfigError(f"{name}={shorten(value)} must be a text of printable characters, and not empty")
    return value


def read_choice(name: str, value: Any, *, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{name}={shorten(value)} is unknown; choose one of {', '.join(choices)}")
    return str(value)


def read_integer(name: str, value: Any, *, least: int, most: int) -> int:
    text = value if isinstance(value, str) else str(value) if type(value) is int else ""
    if not text.isascii() or not text.isdecimal() or len(text) > 20 or not least <= int(text) <= most:
        raise ConfigError(f"{name}={shorten(value)} must be an integer from {least} to {most}")
    return int(text)


def read_seconds(name: str, value: Any, *, least: float = 0.0) -> float:
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not least <= seconds <= LONGEST:
        raise ConfigError(f"{name}={shorten(value)} must be a number of seconds from {least:g} to {LONGEST:g}")
    return seconds


def read_flag(name: str, value: Any) -> bool:
    flags = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    found = value if isinstance(value, bool) else flags.get(value.lower()) if isinstance(value, str) else None
    if found is None:
        raise ConfigError(f"{name}={shorten(value)} must be true or false")
    return found


def read_funnel_setting(name: str, value: Any) -> Funnel:
    try:
        return parse_funnel(value) if isinstance(value, str) else read_funnel(value)
    except FunnelError as error:
        raise ConfigError(f"{name}: {error}") from error


def read_keys(name: str, value: Any) -> tuple[str, ...]:
    """Several keys are a list, or a text with commas. A key is never shown."""
    keys = value.split(",") if isinstance(value, str) else value
    if not isinstance(keys, (list, tuple)) or not keys or not all(map(is_key, keys)):
        raise ConfigError(
            f"{name} must be keys of at least 8 visible ASCII characters each, without commas; several are a list, or "
            "a text with commas between them"
        )
    return tuple(keys)


def is_key(key: Any) -> bool:
    return isinstance(key, str) and len(key) >= 8 and all("!" <= letter <= "~" and letter != "," for letter in key)


def setting(default: Any, read: Reader, about: str) -> Any:
    """A field of `Settings`: its default, how its value is read, and what it is, for people."""
    return dataclasses.field(default=default, repr=read is not read_keys, metadata={"read": read, "about": about})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that an operator can choose."""

    checkpoint: Path

    host: str = setting("127.0.0.1", read_text, "Address to listen on. The default is reached from this machine only.")
    port: int = setting(8000, partial(read_integer, least=0, most=65535), "Port to listen on; 0 takes a free one.")
    model_name: str | None = setting(None, read_text, "Name of the model for clients. Default: the folder's name.")

    funnel: Funnel | None = setting(
        None, read_funnel_setting, "Funnel, e.g. 6:2/mean, see `funnel embed --help`. Default: the checkpoint's."
    )
    dtype: str | None = setting(
        None, partial(read_choice, choices=tuple(DTYPES)), "Dtype of the weights. Default: the checkpoint's."
    )
    backend: str = setting("auto", partial(read_choice, choices=("auto", *BACKENDS)), "What computes.")
    attention: str | None = setting(
        None, partial(read_choice, choices=ATTENTIONS), "Kind of attention. Default: the checkpoint's."
    )
    pooling: str | None = setting(
        None, partial(read_choice, choices=POOLINGS), "How rows become a vector. Default: the checkpoint's."
    )
    threads: int | None = setting(
        None, partial(read_integer, least=1, most=MOST_THREADS), "Threads of the kernels for CPUs. Default: all cores."
    )
    warmup: str = setting(
        "all",
        partial(read_choice, choices=("none", "small", "all")),
        "What is compiled before the server is ready: nothing, what short texts need, or everything.",
    )

    truncate: bool = setting(
        False, read_flag, "Cut inputs that are too long, if the request does not say; else they are refused."
    )
    allow_token_ids: bool = setting(
        False, read_flag, "Take token ids on OpenAI's route. Many clients send ids of another vocabulary there."
    )

    compare_funnel: bool = setting(
        True, read_flag, "Let the page at / embed texts without the funnel too; that is compiled when it is asked for."
    )

    api_keys: tuple[str, ...] = setting((), read_keys, "Keys, of which a client must send one as Bearer token.")
    metrics_need_key: bool = setting(False, read_flag, "Ask for a key on /metrics too.")

    max_batch_tokens: int = setting(
        16384,
        partial(read_integer, least=1, most=MAX_BATCH_TOKENS),
        "Tokens of the largest batch, and of the longest input.",
    )
    max_waiting_rows: int = setting(
        2**19, partial(read_integer, least=1, most=2**31 - 1), "Rows in the queue, and of the largest request."
    )
    max_waiting_requests: int = setting(1024, partial(read_integer, least=1, most=2**20), "Requests in the queue.")
    max_body_bytes: int = setting(
        32 * 2**20, partial(read_integer, least=1, most=2**31 - 1), "Size of the body of a request."
    )

    request_seconds: float = setting(
        60.0, partial(read_seconds, least=0.001), "Time from the body of a request to its results."
    )
    body_seconds: float = setting(
        20.0, partial(read_seconds, least=0.001), "Time in which a request must arrive, and a reply be read."
    )
    stall_seconds: float = setting(
        120.0, partial(read_seconds, least=0.001), "Time without a finished batch, after which /health/live fails."
    )
    grace_seconds: float = setting(
        5.0, read_seconds, "Time after SIGTERM in which new requests are still served, so that load balancers notice."
    )
    drain_seconds: float = setting(30.0, read_seconds, "Time after that in which requests can end.")

    @classmethod
    def read(
        cls, checkpoint: Path, options: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None
    ) -> "Settings":
        """Settings of options, of variables, and of a TOML file, in this order.

        Raises:
            ConfigError: a value cannot be used, or a name is unknown.
        """
        content = {} if file is None else read_toml(file)
        sources: list[tuple[Callable[[str], str], Mapping[str, Any]]] = [
            (option_name, options),
            (variable_name, environment),
            (lambda name: f"{name} in {file}", {f"{name} in {file}": value for name, value in content.items()}),
        ]
        known = {field.name: field for field in dataclasses.fields(cls) if "read" in field.metadata}
        if unknown := [name for name in content if name not in known]:
            names = ", ".join(abbreviate(unknown))
            raise ConfigError(f"{file} has unknown settings: {names}. Known: {', '.join(known)}")
        ours = {variable_name(name) for name in known} | {variable_name("config")}
        if wrong := [name for name in environment if name.startswith(ENVIRONMENT) and name not in ours]:
            names = ", ".join(abbreviate(wrong))
            raise ConfigError(f"unknown environment variables: {names}; see `funnel serve --help`")
        values = {}
        for name, field in known.items():
            for named, source in sources:
                if named(name) in source:
                    values[name] = field.metadata["read"](named(name), source[named(name)])
                    break
        return cls(checkpoint=checkpoint, **values)


def option_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def variable_name(name: str) -> str:
    return f"{ENVIRONMENT}{name.upper()}"


def read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{file} is not TOML: {error}") from error
