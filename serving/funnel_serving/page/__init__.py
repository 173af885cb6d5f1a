"""The page at / for people with a browser: what runs here, how busy it is, and what the funnel changes.

It is one HTML file without a network: its style and its script are written into it, and its policy lets no other run.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from funnel_serving.page.snapshot import snapshot
from funnel_serving.refusals import Refusal
from funnel_serving.service import Service
from funnel_serving.wire.fields import read_fields, read_json
from funnel_serving.wire.route import json_response
from funnel_serving.wire.tei import SIMILARITY

INPUTS, _ = SIMILARITY  # the parameters have no effect


def read(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")


def source(text: str) -> str:
    """How a policy names a style or a script that is written into the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


STYLE, SCRIPT = read("page.css"), read("page.js")
HTML = read("page.html").replace("/* page.css */", STYLE).replace("/* page.js */", SCRIPT)
HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src {source(STYLE)}; script-src {source(SCRIPT)}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "vary": "accept",
    "x-content-type-options": "nosniff",
}


def page_routes(service: Service) -> Sequence[Route]:
    """GET / is the page. It asks /page.json every two seconds, and /page/similarity for cosines without a funnel."""

    async def page(request: Request) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            raise Refusal("method", "GET / is a page for browsers, which accept text/html; other clients use POST")
        return Response(HTML, headers=HEADERS, media_type="text/html")

    async def numbers(request: Request) -> Response:
        content = await run_sync(snapshot, service)  # traces a program if none has run yet
        return json_response(content, 200, {"cache-control": "no-store"})

    async def similarity(request: Request) -> Response:
        inputs = read_fields([INPUTS], "", read_json(await request.body()))["inputs"]
        vectors = await service.embed_without_funnel([inputs["source_sentence"], *inputs["sentences"]])
        return json_response(vectors[1:] @ vectors[0], 200, {})

    return [Route("/", page), Route("/page.json", numbers), Route("/page/similarity", similarity, methods=["POST"])]
