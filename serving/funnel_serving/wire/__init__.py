"""The wire formats of the server: OpenAI's, text-embeddings-inference's, and routes for labels in the same style.

A handler raises `Refusal`. The server gives it to `refusal_response`, with the refusals of HTTP itself.
"""

import dataclasses

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from funnel_serving.refusals import Refusal
from funnel_serving.service import Service
from funnel_serving.wire import labels, openai, tei
from funnel_serving.wire.model import kind_of
from funnel_serving.wire.openapi import describe
from funnel_serving.wire.route import Route, json_response

ROUTES = (*openai.ROUTES, *tei.ROUTES, *labels.ROUTES)
PATH_BY_KIND = {"embedding": "/embed", "classifier": "/predict", "reranker": "/rerank", "tagger": "/tag"}


def routes(service: Service) -> list[StarletteRoute]:
    """All routes that need the model, and /openapi.json, in the form of the web framework."""

    async def post_root(request: Request) -> Response:
        return await root(service).respond(service, request)

    async def get_description(request: Request) -> Response:
        return json_response(describe([*ROUTES, root(service)], service), 200, {})

    return [
        *(route.served_by(service) for route in ROUTES),
        StarletteRoute("/", post_root, methods=["POST"]),
        StarletteRoute("/openapi.json", get_description, methods=["GET"]),
    ]


def root(service: Service) -> Route:
    """POST / is another name of the route for which the model is made, as in text-embeddings-inference."""
    path = PATH_BY_KIND[kind_of(service.engine.head)]
    (route,) = (route for route in ROUTES if route.path == path)
    return dataclasses.replace(route, path="/")


def refusal_response(path: str, refusal: Refusal) -> Response:
    """The reply to a request that is refused, in the wire format that the client of this path reads."""
    is_openai = path.startswith("/v1/") or path == "/embeddings"
    return (openai.OPENAI if is_openai else tei.TEI).refuse(refusal)
