"""The OpenAPI 3.1 description of all routes, made from their declarations."""

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from funnel_engine import Engine
from funnel_serving.service import Service
from funnel_serving.settings import Settings
from funnel_serving.wire.fields import Schema, document_object
from funnel_serving.wire.model import engine_version, model_name
from funnel_serving.wire.route import Family, Route

# What any route may refuse, and what only those refuse that read a body.
EVERYWHERE = ("unauthorized", "unhealthy")
WITH_A_BODY = (
    "empty", "validation", "unsupported", "slow_body", "too_large", "tokenization", "overloaded", "inference", "timeout"
)  # fmt: skip

# The routes of the server itself, which need no model: summary, type of the reply, and the statuses.
OF_THE_SERVER = {
    "/health": ("Whether the server is live and ready", "application/json", (200, 503)),
    "/health/live": ("Whether the process is of use, or must be started again", "application/json", (200, 503)),
    "/health/ready": ("Whether requests may come; while it compiles, how far it is", "application/json", (200, 503)),
    "/ping": ("The same as /health", "application/json", (200, 503)),
    "/metrics": ("Counters for Prometheus", "text/plain", (200, 401)),
    "/openapi.json": ("This description", "application/json", (200, 401, 503)),
}


def describe(routes: Iterable[Route], service: Service) -> dict[str, Any]:
    """The description of a running server, with the limits of its model."""
    paths = {path: {"get": server_operation(path, *facts)} for path, facts in OF_THE_SERVER.items()}
    for route in routes:
        path = re.sub(r"{(\w+):\w+}", r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Funnel engine",
            "version": engine_version(),
            "description": "Vectors and labels of texts, in the wire formats of OpenAI and text-embeddings-inference.",
        },
        "paths": paths,
        "components": {
            "schemas": limits(service.engine, service.settings),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if service.settings.api_keys else [],
    }


def operation(route: Route) -> dict[str, Any]:
    named = re.findall(r"{(\w+)", route.path)
    body = {"required": True, "content": as_json(document_object(route.fields))}
    return {
        "tags": [route.family.name],
        "operationId": f"{route.method.lower()} {route.path}",
        "summary": route.summary,
        **({"requestBody": body} if route.method == "POST" else {}),
        **({"parameters": [path_parameter(name) for name in named]} if named else {}),
        "responses": {"200": {"description": route.summary, "content": as_json(route.reply)}} | refusals(route),
    }


def server_operation(path: str, summary: str, media_type: str, statuses: tuple[int, ...]) -> dict[str, Any]:
    responses = {
        str(status): {"description": HTTPStatus(status).phrase, "content": {media_type: {}}} for status in statuses
    }
    return {"tags": ["Server"], "operationId": f"get {path}", "summary": summary, "responses": responses}


def refusals(route: Route) -> dict[str, Any]:
    kinds = [*EVERYWHERE, *(WITH_A_BODY if route.method == "POST" else ()), *route.refuses]
    statuses = sorted({route.family.statuses[kind] for kind in kinds})
    return {str(status): refusal(route.family, status) for status in statuses}


def refusal(family: Family, status: int) -> dict[str, Any]:
    response = {"description": HTTPStatus(status).phrase, "content": as_json(family.schema)}
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        response["headers"] = {"retry-after": {"description": "in seconds", "schema": {"type": "integer"}}}
    return response


def path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def limits(engine: Engine, settings: Settings) -> dict[str, Schema]:
    """What the fields refer to by name, see `fields.reference`: values whose limits are those of the model."""
    return {
        "TokenId": {"type": "integer", "minimum": 0, "maximum": engine.config.vocab_size - 1},
        "Dimensions": {"type": "integer", "minimum": 1, "maximum": engine.embedding_size},
        "TokenLimit": {"type": "integer", "minimum": -1, "maximum": engine.max_length, "not": {"const": 0}},
        "TopK": {"type": "integer", "minimum": 1},
        "PromptName": {"enum": sorted(engine.text.prompts)} if engine.text.prompts else {"not": {}},
        "ModelName": {"const": model_name(settings)},
    }


def as_json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
