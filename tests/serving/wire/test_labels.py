"""`/classify` and `/tag`: labels of texts and of their tokens."""

import numpy as np
import pytest

from funnel_engine import Engine
from served_models import LABELS

TEXTS = ["a", "the small funnel pools pairs of tokens", "émile keeps memory", "of"]


def post(client, path, **body):
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def softmax(logits):
    powers = np.exp(logits)
    return powers / powers.sum(axis=-1, keepdims=True)


def test_classify_gives_a_list_of_labels_for_each_input(classifier, classifier_path):
    labels = LABELS["Gemma2ForSequenceClassification"]
    logits = Engine.load(classifier_path, max_batch_tokens=512).classify(TEXTS)
    for raw, expected in ((False, softmax(logits)), (True, logits)):
        found = post(classifier, "/classify", inputs=TEXTS, raw_scores=raw)
        for items, scores in zip(found, expected, strict=True):
            assert [item["label"] for item in items] == [labels[index] for index in np.argsort(-scores)]
            np.testing.assert_allclose([item["score"] for item in items], np.sort(scores)[::-1], atol=1e-5)
    (alone,) = post(classifier, "/classify", inputs=TEXTS[0])
    assert [item["label"] for item in alone] == [labels[index] for index in np.argsort(-logits[0])]


def test_two_texts_are_a_batch_and_top_k_leaves_labels_out(classifier):
    found = post(classifier, "/classify", inputs=TEXTS[:2], parameters={"top_k": 1})
    assert [len(items) for items in found] == [1, 1]
    assert found[0][0] == post(classifier, "/classify", inputs=TEXTS[:2])[0][0]


def test_tag_gives_the_span_and_the_best_label_of_each_token(tagger, tagger_path):
    labels = LABELS["Gemma2ForTokenClassification"]
    engine = Engine.load(tagger_path, max_batch_tokens=512)
    found = post(tagger, "/tag", inputs=TEXTS)
    for text, spans, logits in zip(TEXTS, found, engine.tag(TEXTS), strict=True):
        logits = logits[1:]  # without BOS
        assert [list(span) for span in spans] == [["token", "start", "end", "label", "score"]] * len(logits)
        assert [span["label"] for span in spans] == [labels[index] for index in logits.argmax(axis=-1)]
        np.testing.assert_allclose([span["score"] for span in spans], softmax(logits).max(axis=-1), atol=1e-5)
        covered = {position for span in spans for position in range(span["start"], span["end"])}
        assert covered == set(range(len(text)))
    raw = post(tagger, "/tag", inputs=TEXTS[1], raw_scores=True)
    assert [span["score"] for span in raw[0]] != [span["score"] for span in found[1]]
    assert [span["label"] for span in raw[0]] == [span["label"] for span in found[1]]


def test_tag_of_token_ids_has_labels_without_spans(tagger):
    (of_text,) = post(tagger, "/tag", inputs="small funnel")
    ids = [token["id"] for token in post(tagger, "/tokenize", inputs="small funnel")[0]]
    (of_ids,) = post(tagger, "/tag", inputs=ids)
    assert [span["label"] for span in of_ids[1:]] == [span["label"] for span in of_text]
    assert {(span["start"], span["end"]) for span in of_ids} == {(None, None)}


def test_the_root_is_the_route_of_the_models_task(classifier, tagger):
    assert post(classifier, "/", inputs="a") == post(classifier, "/predict", inputs="a")
    assert post(tagger, "/", inputs="a") == post(tagger, "/tag", inputs="a")


@pytest.mark.parametrize(
    "parameters", [{"aggregation_strategy": "simple"}, {"ignore_labels": ["O"]}, {"stride": 3}], ids=str
)
def test_what_the_clients_of_hugging_face_may_ask_and_we_do_not_do_is_refused(tagger, parameters):
    reply = tagger.post("/tag", json={"inputs": "a", "parameters": parameters})
    assert reply.status_code == 422
    assert f"parameters.{next(iter(parameters))} is not supported" in reply.json()["error"]
