"""Loads the model and compiles its programs in a thread, while the server already answers."""

import logging
import threading
import time
from collections.abc import Callable

from funnel_engine import Engine
from funnel_serving.service import Service
from funnel_serving.settings import Settings

log = logging.getLogger(__name__)

SMALL_ROWS = 512  # of the largest bucket that `--warmup small` compiles; few single texts need a larger one


def load_in_thread(service: Service, on_failure: Callable[[Exception], None]) -> threading.Thread:
    """Begins to load; `on_failure` gets the exception if that fails."""

    def load() -> None:
        try:
            load_model(service)
        except Exception as error:  # the server must not go on without a model, whatever the reason
            service.health.state = "failed"
            on_failure(error)

    thread = threading.Thread(target=load, name="loading", daemon=True)
    thread.start()
    return thread


def load_model(service: Service) -> None:
    """Loads, warms up, and makes the service ready."""
    settings, health, began = service.settings, service.health, time.perf_counter()
    engine = load_engine(settings)
    log.info("the model is loaded", extra={"seconds": round(time.perf_counter() - began, 3)})

    def progress(compiled: int, programs: int) -> None:
        health.compiled, health.programs = compiled, programs

    if settings.warmup != "none":
        if health.state == "loading":
            health.state = "compiling"
        engine.warmup(progress=progress, buckets=small_buckets(engine) if settings.warmup == "small" else None)
    service.attach(engine)
    log.info("ready", extra={"seconds": round(time.perf_counter() - began, 3)})


def load_engine(settings: Settings) -> Engine:
    return Engine.load(
        settings.checkpoint,
        funnel=settings.funnel,
        backend=settings.backend,
        dtype=settings.dtype,
        attention=settings.attention,
        pooling=settings.pooling,
        max_batch_tokens=settings.max_batch_tokens,
        threads=settings.threads,
    )


def small_buckets(engine: Engine) -> list[int]:
    buckets = sorted({rows for programs in engine.programs for rows in programs.buckets})
    return [rows for rows in buckets if rows <= SMALL_ROWS] or buckets[:1]
