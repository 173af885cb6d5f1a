"""The settings of the server: declared once, read from options, the environment and a file."""

import dataclasses
from pathlib import Path

from funnel_engine.config import Funnel


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that an operator can choose."""

    checkpoint: Path
    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    funnel: Funnel | None = None
    dtype: str | None = None
    backend: str = "auto"
    attention: str | None = None
    pooling: str | None = None
    threads: int | None = None
    warmup: str = "all"
    truncate: bool = False
    allow_token_ids: bool = False
    api_keys: tuple[str, ...] = ()
    metrics_need_key: bool = False
    max_batch_tokens: int = 16384
    max_waiting_rows: int = 524288
    max_waiting_requests: int = 1024
    max_body_bytes: int = 32 * 2**20
    request_seconds: float = 60.0
    body_seconds: float = 20.0
    stall_seconds: float = 120.0
    grace_seconds: float = 5.0
    drain_seconds: float = 30.0
