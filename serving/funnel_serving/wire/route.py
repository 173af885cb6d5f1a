"""A route is declared once. The server's router and the OpenAPI description are both made from the declarations."""

import dataclasses
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from funnel_serving.answers import Answer
from funnel_serving.refusals import Refusal
from funnel_serving.service import Service
from funnel_serving.wire.fields import Field, Schema, Values, read_fields, read_json


@dataclasses.dataclass(frozen=True)
class Family:
    """What the routes of one wire format share: how they refuse a request.

    Attributes:
        name: heading of its routes in the description.
        statuses: the HTTP status of each kind of refusal.
        error: the body of a refusal.
        schema: the JSON Schema of such a body.
    """

    name: str
    statuses: Mapping[str, int]
    error: Callable[[Refusal], dict[str, Any]]
    schema: Schema

    def refuse(self, refusal: Refusal) -> Response:
        headers = {}
        if (
            refusal.retry_after is not None
        ):  # whole seconds for everybody, and milliseconds, which OpenAI's clients read
            headers["retry-after"] = str(math.ceil(refusal.retry_after))
            headers["retry-after-ms"] = str(math.ceil(1000 * refusal.retry_after))
        return json_response(self.error(refusal), self.statuses[refusal.kind], headers)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a handler gives.

    Attributes:
        content: JSON, in which arrays may be NumPy's.
        answer: the answer of the service, if it was asked.
        texts: the texts that were run.
    """

    content: Any
    answer: Answer | None = None
    texts: Iterable[Any] = ()


Handler = Callable[[Service, Values], Awaitable[Reply]]


@dataclasses.dataclass(frozen=True)
class Route:
    """One method of one path.

    Attributes:
        family: its wire format.
        method: "GET" or "POST". A POST has a body of JSON.
        path: as Starlette and OpenAPI write it.
        handler: gets the values of `fields`, and of the parameters of the path.
        summary: what it does, in a line.
        reply: the JSON Schema of its reply.
        fields: the fields of its body.
        refuses: the kinds of refusals that not every route has, see `openapi.EVERYWHERE`.
    """

    family: Family
    method: str
    path: str
    handler: Handler
    summary: str
    reply: Schema
    fields: tuple[Field, ...] = ()
    refuses: tuple[str, ...] = ()

    def served_by(self, service: Service) -> StarletteRoute:
        """The route in the form of the web framework. It raises `Refusal`, which the server turns into a reply."""

        async def endpoint(request: Request) -> Response:
            return await self.respond(service, request)

        return StarletteRoute(self.path, endpoint, methods=[self.method])

    async def respond(self, service: Service, request: Request) -> Response:
        started = time.perf_counter()
        values = dict(request.path_params)
        if self.method == "POST":
            values |= read_fields(self.fields, "", read_json(await request.body()))
        reply = await self.handler(service, values)
        headers = {} if reply.answer is None else compute_headers(service, reply, started)
        return json_response(reply.content, 200, headers)


def compute_headers(service: Service, reply: Reply, started: float) -> dict[str, str]:
    """TEI's headers, and how many inputs were cut. Times are in milliseconds."""
    answer, total = reply.answer, time.perf_counter() - started
    assert answer is not None
    times = {
        "x-compute-time": total,
        "x-total-time": total,
        "x-tokenization-time": answer.timing.tokenization,
        "x-queue-time": answer.timing.queue,
        "x-inference-time": answer.timing.inference,
    }
    return {
        "x-compute-type": service.engine.devices.target.platform,
        "x-compute-characters": str(sum(len(text) for text in reply.texts if isinstance(text, str))),
        "x-compute-tokens": str(sum(answer.token_counts)),
        "x-truncated-inputs": str(answer.truncated),
        **{name: str(round(1000 * seconds)) for name, seconds in times.items()},
    }


def json_response(content: Any, status: int, headers: Mapping[str, str]) -> Response:
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, headers, media_type="application/json")
