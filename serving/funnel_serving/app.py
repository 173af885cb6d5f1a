"""The ASGI application: what is the same for all routes. Keys, bodies, clients that leave, refusals, ids, the log."""

import asyncio
import hmac
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import Message, Receive, Scope, Send

from funnel_serving import wire
from funnel_serving.logs import request_id
from funnel_serving.page import page_routes
from funnel_serving.refusals import Refusal
from funnel_serving.service import Service

log = logging.getLogger(__name__)

HEALTH = ("/health", "/health/live", "/health/ready", "/ping")  # no key is asked for
PAGE = {("GET", "/"), ("HEAD", "/")}  # no key either: it contains nothing yet, and asks for the key itself
QUIET = (*HEALTH, "/metrics", "/page.json")  # not in the log: they are asked every few seconds
CLIENT_LEFT = 499  # in the log only, as nginx writes it


class App:
    """Serves the routes of a service."""

    def __init__(self, service: Service, routes: Iterable[BaseRoute] | None = None):
        """`routes` are those that need the model, by default all of `wire`."""
        self.service, settings = service, service.settings
        self.keys = [key.encode() for key in settings.api_keys]
        self.open = {*HEALTH, *(() if settings.metrics_need_key else ("/metrics",))}
        own = [*health_routes(service), Route("/metrics", metrics_endpoint(service))]
        given = wire.routes(service) if routes is None else routes
        self.router = Router([*own, *given, *page_routes(service)], redirect_slashes=False, default=self.not_found)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, path = time.perf_counter(), scope["path"]
        headers = dict(scope["headers"])
        number = request_id(headers.get(b"x-request-id"))
        status, kind = CLIENT_LEFT, None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        async def refuse(refusal: Refusal, allowed: Mapping[str, str] | None = None) -> None:
            nonlocal kind
            kind = refusal.kind
            self.service.metrics.observe_refusal(kind)
            response = wire.refusal_response(path, refusal)
            response.headers.update(allowed or {})
            if kind == "unauthorized":
                response.headers["www-authenticate"] = "Bearer"
            if isinstance(refusal, UnreadBody):
                response.headers["connection"] = "close"
            await response(scope, receive, send_with_id)

        try:
            if path not in self.open and (scope["method"], path) not in PAGE:
                self.check_key(headers)
            body = await self.read_body(headers, receive)
            await self.answer(dict(scope, app=self), body, receive, send_with_id)
        except Refusal as refusal:
            await refuse(refusal)
        except ClientLeft:
            pass
        except HTTPException as error:  # of the router: the path is known, and the method is not
            taken = (error.headers or {}).get("Allow", "no method")
            await refuse(Refusal("method", f"{path} does not take {scope['method']}; it takes {taken}"), error.headers)
        except asyncio.CancelledError:  # the server's time to stop is over
            if status == CLIENT_LEFT:
                await refuse(Refusal("unhealthy", "the server stops; send the request again"))
        except Exception:  # a mistake of ours must not end without a reply, nor without a trace
            log.exception("a request failed", extra={"id": number, "path": path})
            if status != CLIENT_LEFT:
                raise
            await refuse(Refusal("inference", f"the server failed; its log says more under the id {number}"))
        finally:
            if status != CLIENT_LEFT:
                self.service.metrics.responses.labels(f"{status // 100}xx").inc()
            if path not in QUIET:
                facts = {
                    "id": number,
                    "method": scope["method"],
                    "path": path,
                    "status": status,
                    "ms": round(1000 * (time.perf_counter() - began), 2),
                } | ({"refused": kind} if kind else {})
                log.info("request", extra=facts)

    def check_key(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises `Refusal` unless the client sent one of the keys. How long that takes does not depend on the key."""
        if not self.keys:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        is_right = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        if scheme.lower() != b"bearer" or not any(is_right):
            raise Refusal("unauthorized", "send a key of this server as header Authorization: Bearer KEY")

    async def read_body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """The body of a request, which must come in time and not be too large.

        What is too large is read to its end, as far as that comes in time, and thrown away: most clients read no reply
        before they have sent everything.
        """
        limit, seconds = self.service.settings.max_body_bytes, self.service.settings.body_seconds
        declared, size, chunks = headers.get(b"content-length", b"0"), 0, []
        if b"expect" in headers and declared.isdigit() and int(declared) > limit:
            raise UnreadBody("too_large", f"the body has {int(declared)} bytes, more than the limit of {limit}")
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    size += len(message.get("body", b""))
                    if size <= limit:
                        chunks.append(message.get("body", b""))
                    else:
                        chunks.clear()
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            if size <= limit:
                raise UnreadBody("slow_body", f"only {size} bytes of the body came within {seconds:g} s") from None
            raise UnreadBody("too_large", f"the body has more than the limit of {limit} bytes") from None
        if size > limit:
            raise Refusal("too_large", f"the body has {size} bytes, more than the limit of {limit}; send fewer inputs")
        return b"".join(chunks)

    async def answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Calls the route, which is cancelled when the client leaves."""
        task = asyncio.current_task()
        assert task is not None
        has_left = False

        async def receive_body() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def watch() -> None:
            nonlocal has_left
            await receive()  # nothing but the end of the connection comes after the body
            has_left = True
            task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            await self.router(scope, receive_body, send)
        except asyncio.CancelledError:
            if has_left:
                raise ClientLeft from None
            raise
        finally:
            watcher.cancel()

    async def not_found(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise Refusal("not_found", f"there is no path {scope['path']!r:.200} here; GET /openapi.json lists them")


class UnreadBody(Refusal):
    """The body is not read to its end, so nothing can follow it on this connection."""


class ClientLeft(Exception):
    """Nobody waits for the reply."""


def health_routes(service: Service) -> Sequence[Route]:
    """/health/live: is the process of any use? /health/ready: may requests come? /health and /ping: both."""

    def reply(is_good: bool, facts: Mapping[str, Any]) -> Response:
        return Response(orjson.dumps(facts), 200 if is_good else 503, media_type="application/json")

    async def live(request: Request) -> Response:
        return reply(service.is_live, {"status": "live" if service.is_live else "stalled"})

    async def ready(request: Request) -> Response:
        return reply(service.health.state == "ready", service.health.facts())

    async def health(request: Request) -> Response:
        return await ready(request) if service.is_live else await live(request)

    return [Route(path, endpoint) for path, endpoint in zip(HEALTH, (health, live, ready, health), strict=True)]


def metrics_endpoint(service: Service) -> Any:
    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return metrics
