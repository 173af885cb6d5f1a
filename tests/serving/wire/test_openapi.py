"""The description of the routes is valid, and the server does what it says."""

import openapi_spec_validator
import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from schemathesis import GenerationMode

from c_library import ROOT
from funnel_serving.wire import ROUTES

# The routes that a model of each kind has. An embedder is asked for all that need no classifier.
CLASSIFIERS = {"classifier": ["/", "/predict", "/classify"], "reranker": ["/", "/rerank"], "tagger": ["/", "/tag"]}
OF_ONE_KIND = {
    "embedder": [
        route.path.replace(":path", "")
        for route in ROUTES
        if route.path not in ("/predict", "/classify", "/rerank", "/tag")
    ],
    **CLASSIFIERS,
}


@pytest.fixture(params=["embedder", "classifier", "reranker", "tagger"])
def client(request):
    return request.getfixturevalue(request.param)


def test_the_description_is_valid_and_has_every_route(client):
    description = client.get("/openapi.json").json()
    openapi_spec_validator.validate(description)
    described = {(method.upper(), path) for path, methods in description["paths"].items() for method in methods}
    assert described >= {(route.method, route.path.replace(":path", "")) for route in ROUTES} | {("POST", "/")}


def test_the_description_has_the_limits_of_the_model(embedder):
    schemas = embedder.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["TokenId"]["maximum"] == 511
    assert schemas["Dimensions"]["maximum"] == 36
    assert schemas["TokenLimit"]["maximum"] == 512
    assert schemas["PromptName"]["enum"] == ["document", "query"]


def test_the_document_has_every_route(embedder):
    document = (ROOT / "docs" / "serving-http-api.md").read_text(encoding="utf-8")
    for path in embedder.get("/openapi.json").json()["paths"]:
        assert f"{path}`" in document, path


def has_prompt_before_ids(body):
    """The one rule about two fields, which the schema does not say: a prompt is put before texts only."""
    has_ids = isinstance(body, dict) and isinstance(body.get("inputs"), list) and not isinstance(body["inputs"][0], str)
    return has_ids and body.get("prompt_name") is not None


def check(schema, mode):
    """Sends bodies that the description allows, or others, to every route, and reads the replies by the description."""
    for result in schema.get_all_operations():

        @settings(max_examples=5, deadline=None, database=None, derandomize=True, suppress_health_check=HealthCheck)
        @given(case=result.ok().as_strategy(generation_mode=mode))
        def call(case):
            assume(mode == GenerationMode.NEGATIVE or not has_prompt_before_ids(case.body))
            case.call_and_validate()

        call()


@pytest.mark.parametrize("kind", OF_ONE_KIND)
def test_what_the_description_allows_is_accepted(kind, request):
    schema = schemathesis.openapi.from_asgi("/openapi.json", request.getfixturevalue(kind).app)
    check(schema.include(path=OF_ONE_KIND[kind]), GenerationMode.POSITIVE)


def test_what_the_description_does_not_allow_is_refused(embedder):
    """By any model: fields are read before anything is run."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", embedder.app)
    check(schema.include(method="POST"), GenerationMode.NEGATIVE)
