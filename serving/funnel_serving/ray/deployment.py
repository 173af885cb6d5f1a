"""A deployment of Ray Serve: the application of `funnel serve` in each replica, and as many replicas as rows need.

from ray import serve
from funnel_serving.ray.deployment import deploy
from funnel_serving.settings import Settings

serve.run(deploy(Settings(checkpoint="/shared/my-gemma"), max_replicas=4, cpus_per_replica=8))
"""

import dataclasses
import math
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from starlette.types import Receive, Scope, Send

from funnel_serving.app import App
from funnel_serving.health import Health
from funnel_serving.loading import load_model
from funnel_serving.metrics import Metrics
from funnel_serving.ray.embed_batches import use_assigned_devices
from funnel_serving.service import Service
from funnel_serving.settings import Settings

WAITING_ROWS = "waiting_rows"  # the metric by which Ray Serve scales


class Replica:
    """An engine with its queue and its batcher. Ray sends requests only once the model is loaded and warm."""

    def __init__(self, settings: Settings):
        threads = use_assigned_devices()
        if settings.threads is None:
            settings = dataclasses.replace(settings, threads=threads)
        self.service = Service(settings, Metrics(), Health())
        load_model(self.service)

    def __serve_build_asgi_app__(self) -> "WithLifespan":
        return WithLifespan(self.service)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `RowsPolicy` reads; Ray Serve calls this every few seconds."""
        (metric,) = self.service.metrics.waiting_rows.collect()
        return {WAITING_ROWS: metric.samples[0].value}

    def check_health(self) -> None:
        """Raises where /health/live fails; Ray Serve then replaces the replica."""
        if not self.service.is_live:
            raise RuntimeError(f"no batch has ended for {self.service.settings.stall_seconds:g} s, though work waits")


class WithLifespan:
    """The application, with the beginning and the end that Ray Serve tells it."""

    def __init__(self, service: Service):
        self.service, self.app = service, App(service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.service.close(self.service.settings.drain_seconds)
        await send({"type": "lifespan.shutdown.complete"})


class RowsPolicy:
    """Wants a replica for each `rows_per_replica` rows that wait in the queues of all replicas.

    Rows say how much work there is: a request may be one short query or a thousand documents. Ray Serve applies the
    limits and delays of its autoscaling config.
    """

    def __init__(self, rows_per_replica: int):
        self.rows_per_replica = rows_per_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        by_replica = (context.aggregated_metrics or {}).get(WAITING_ROWS, {})
        return math.ceil(sum(by_replica.values()) / self.rows_per_replica), {}


def deploy(
    settings: Settings,
    *,
    min_replicas: int = 1,
    max_replicas: int = 1,
    rows_per_replica: int | None = None,
    cpus_per_replica: float = 1,
    gpus_per_replica: float = 0,
    **autoscaling: Any,
) -> Any:
    """The application for `serve.run`.

    Args:
        settings: those of `funnel serve`. Host and port are those of Ray Serve's proxies, see `serve.start`.
        min_replicas, max_replicas: limits of the number of replicas.
        rows_per_replica: waiting rows for each replica that is wanted. Default: two of the largest batches.
        cpus_per_replica, gpus_per_replica: what Ray reserves for a replica. The engine uses as many threads as CPUs.
        autoscaling: further fields of Ray Serve's `AutoscalingConfig`, e.g. `upscale_delay_s`.
    """
    rows = rows_per_replica or 2 * settings.max_batch_tokens
    config = AutoscalingConfig(
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        policy=AutoscalingPolicy(policy_function=RowsPolicy, policy_kwargs={"rows_per_replica": rows}),
        **autoscaling,
    )
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="funnel",
        autoscaling_config=config,
        max_ongoing_requests=settings.max_waiting_requests,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": cpus_per_replica, "num_gpus": gpus_per_replica},
    )
    return deployment.bind(settings)
