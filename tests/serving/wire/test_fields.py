"""What a body may contain, and what is refused; by reading fields and not by running a model."""

import pytest

from funnel_serving.refusals import Refusal
from funnel_serving.wire import fields
from funnel_serving.wire.labels import ROUTES as LABEL_ROUTES
from funnel_serving.wire.openai import ROUTES as OPENAI_ROUTES
from funnel_serving.wire.tei import ROUTES as TEI_ROUTES

FIELDS = {route.path: route.fields for route in (*OPENAI_ROUTES, *TEI_ROUTES, *LABEL_ROUTES) if route.method == "POST"}


def read(path, body):
    return fields.read_fields(FIELDS[path], "", fields.read_json(body))


def refusal(path, body):
    with pytest.raises(Refusal) as raised:
        read(path, body)
    return raised.value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"input": NaN}',
        b'{"input": Infinity}',
        b'{"input": "a"} {}',
        b'{"input": "\xff"}',
        b'{"input": "\\ud800"}',
        b'{"input": "\xed\xa0\x80"}',  # the same half of a surrogate pair, encoded
        b'\xef\xbb\xbf{"input": "a"}',
        b"[" * 100_000,
        b'{"input": ' * 100_000,
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_not_json_is_refused(body):
    assert "the body is not JSON" in refusal("/v1/embeddings", body).message


@pytest.mark.parametrize("body", [b"1", b"null", b'"input"', b"[]", b'["input"]'])
def test_a_body_is_an_object(body):
    assert "the body is" in refusal("/v1/embeddings", body).message


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        (b"{}", "validation", "input"),
        (b'{"input": null}', "validation", "input"),
        (b'{"input": ""}', "empty", "input"),
        (b'{"input": []}', "empty", "input"),
        (b'{"input": ["a", ""]}', "empty", "input[1]"),
        (b'{"input": [[1], []]}', "empty", "input[1]"),
        (b'{"input": 1}', "validation", "input"),
        (b'{"input": true}', "validation", "input"),
        (b'{"input": {"text": "a"}}', "validation", "input"),
        (b'{"input": ["a", null]}', "validation", "input[1]"),
        (b'{"input": ["a", [1]]}', "validation", "input[1]"),
        (b'{"input": [[1], "a"]}', "validation", "input[1]"),
        (b'{"input": [1, "a"]}', "validation", "input[1]"),
        (b'{"input": [1, 2.5]}', "validation", "input[1]"),
        (b'{"input": [true]}', "validation", "input[0]"),
        (b'{"input": [[true]]}', "validation", "input[0][0]"),
        (b'{"input": [[[1]]]}', "validation", "input[0][0]"),
        (b'{"input": "a", "dimensions": 0}', "validation", "dimensions"),
        (b'{"input": "a", "dimensions": "3"}', "validation", "dimensions"),
        (b'{"input": "a", "dimensions": 1.5}', "validation", "dimensions"),
        (b'{"input": "a", "dimensions": true}', "validation", "dimensions"),
        (b'{"input": "a", "dimensions": 1e400}', "validation", None),
        (b'{"input": "a", "truncate_prompt_tokens": -2}', "validation", "truncate_prompt_tokens"),
        (b'{"input": "a", "encoding_format": "int8"}', "validation", "encoding_format"),
        (b'{"input": "a", "encoding_format": {}}', "validation", "encoding_format"),
        (b'{"input": "a", "model": 3}', "validation", "model"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "validation", "messages"),
    ],
    ids=repr,
)
def test_wrong_fields_are_refused_by_name(body, kind, param):
    refused = refusal("/v1/embeddings", body)
    assert (refused.kind, refused.param) == (kind, param)


def test_a_long_wrong_value_is_cut_in_the_message():
    assert len(refusal("/v1/embeddings", b'{"input": "a", "dimensions": "%s"}' % (b"9" * 10_000)).message) < 200


def test_unknown_fields_are_ignored_and_null_is_left_out_and_the_last_of_two_counts():
    body = b'{"input": "a", "user": {"deep": [1]}, "dimensions": null, "model": "a", "model": "b"}'
    assert read("/v1/embeddings", body) == {
        "messages": None,
        "input": ["a"],
        "model": "b",
        "encoding_format": "float",
        "dimensions": None,
        "truncate_prompt_tokens": None,
    }


@pytest.mark.parametrize(
    ("given", "read_as"),
    [
        (b'"a"', ["a"]),
        (b'["a", "b"]', ["a", "b"]),
        (b"[1, 2]", [[1, 2]]),
        (b"[[1, 2], [3]]", [[1, 2], [3]]),
        (b"[1.0, 2e2]", [[1, 200]]),  # integers, says JSON Schema
        (b'"\\u0000\\ud83d\\ude00"', ["\0\N{GRINNING FACE}"]),
    ],
)
def test_one_input_is_a_batch_of_one(given, read_as):
    assert read("/v1/embeddings", b'{"input": %s}' % given)["input"] == read_as


@pytest.mark.parametrize(
    ("given", "read_as"),
    [
        (b'"a"', (False, ["a"])),
        (b'["a"]', (False, ["a"])),
        (b'["a", "b"]', (False, [("a", "b")])),
        (b'[["a"]]', (True, ["a"])),
        (b'[["a"], ["b", "c"]]', (True, ["a", ("b", "c")])),
    ],
)
def test_predict_reads_two_texts_as_a_pair(given, read_as):
    assert read("/predict", b'{"inputs": %s}' % given)["inputs"] == read_as


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/predict", b'{"inputs": ["a", "b", "c"]}', "inputs"),
        ("/predict", b'{"inputs": [["a", "b", "c"]]}', "inputs[0]"),
        ("/predict", b'{"inputs": [["a"], "b"]}', "inputs[1]"),
        ("/predict", b'{"inputs": {}}', "inputs"),
        ("/embed", b'{"inputs": "a", "truncation_direction": "up"}', "truncation_direction"),
        ("/embed", b'{"inputs": "a", "normalize": 1}', "normalize"),
        ("/embed", b'{"inputs": "a", "prompt_name": ["query"]}', "prompt_name"),
        ("/similarity", b'{"inputs": "a"}', "inputs"),
        ("/similarity", b'{"inputs": {"source_sentence": "a"}}', "inputs.sentences"),
        ("/similarity", b'{"inputs": {"source_sentence": "a", "sentences": "b"}}', "inputs.sentences"),
        ("/similarity", b'{"inputs": {"source_sentence": "a", "sentences": ["b"]}, "parameters": 1}', "parameters"),
        ("/rerank", b'{"query": "a", "texts": ["b", 1]}', "texts[1]"),
        ("/tokenize", b'{"inputs": [1]}', "inputs[0]"),
        ("/decode", b'{"ids": ["a"]}', "ids[0]"),
        ("/decode", b'{"ids": []}', "ids"),
        ("/classify", b'{"inputs": "a", "parameters": {"top_k": 0}}', "parameters.top_k"),
        ("/classify", b'{"inputs": "a", "parameters": {"function_to_apply": "none"}}', "parameters.function_to_apply"),
        ("/tag", b'{"inputs": "a", "parameters": {"stride": 3}}', "parameters.stride"),
    ],
    ids=repr,
)
def test_wrong_fields_of_the_other_routes_are_refused_by_name(path, body, param):
    assert refusal(path, body).param == param
