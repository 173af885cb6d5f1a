"""`/classify` and `/tag`: labels of texts and of their tokens, refused as by the routes of `tei.py`.

TEI has no route for labels of tokens, and its `/predict` reads an array of two texts as a pair. Here every array is a
batch, as for `/embed`, and a reply has one array per input; so `InferenceClient.text_classification` reads it too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from funnel_serving.answers import Token
from funnel_serving.service import Service
from funnel_serving.wire import fields, replies
from funnel_serving.wire.fields import Values, array
from funnel_serving.wire.route import Reply, Route
from funnel_serving.wire.scores import best_first, scores_of
from funnel_serving.wire.tei import INPUTS, RAW_SCORES, TEI, TRUNCATION, truncation

# Hugging Face's clients put the options of a task there.
OTHER_SCORES = fields.refused("function_to_apply", "raw_scores=true gives logits")
CLASSIFY_PARAMETERS = (
    fields.integer("top_k", 1, "only the best labels, at most this number", limit="TopK"),
    OTHER_SCORES,
)
TAG_PARAMETERS = (
    fields.refused("aggregation_strategy", "every token has a label of its own; join them in the client"),
    fields.refused("ignore_labels", "every token is in the reply; leave labels out in the client"),
    fields.refused("stride", "a text is not cut into pieces"),
)
UNKNOWN = Token(id=-1, text="", special=False, start=None, stop=None)  # of inputs that are token ids


async def classify(service: Service, values: Values) -> Reply:
    answer = await service.classify(values["inputs"], **truncation(values))
    scores = scores_of(answer.results, raw=values["raw_scores"])
    top_k = values["parameters"]["top_k"]
    return Reply([best_first(service.labels, row)[:top_k] for row in scores], answer, values["inputs"])


async def tag(service: Service, values: Values) -> Reply:
    answer = await service.tag(values["inputs"], **truncation(values))
    scores = [scores_of(logits, raw=values["raw_scores"]) for logits in answer.results]
    tokens = answer.tokens or [[UNKNOWN] * len(rows) for rows in scores]
    return Reply([spans(service.labels, *pair) for pair in zip(tokens, scores, strict=True)], answer, values["inputs"])


def spans(labels: Sequence[str], tokens: Sequence[Token], scores: np.ndarray) -> list[dict[str, Any]]:
    """The best label of each token of a text; tokens that the checkpoint adds are left out."""
    return [
        {"token": token.text, "start": token.start, "end": token.stop, "label": labels[best], "score": row[best]}
        for token, row, best in zip(tokens, scores, scores.argmax(axis=-1), strict=True)
        if not token.special
    ]


ROUTES = (
    Route(
        TEI,
        "POST",
        "/classify",
        classify,
        "Labels of each input with their scores, the best first",
        reply=array(replies.LABELS),
        fields=(
            INPUTS,
            *TRUNCATION,
            RAW_SCORES,
            fields.nested("parameters", CLASSIFY_PARAMETERS, "as Hugging Face's clients send them", required=False),
        ),
    ),
    Route(
        TEI,
        "POST",
        "/tag",
        tag,
        "The best label of each token, with the characters that the token covers",
        reply=replies.SPANS,
        fields=(
            INPUTS,
            *TRUNCATION,
            RAW_SCORES,
            fields.nested("parameters", TAG_PARAMETERS, "as Hugging Face's clients send them", required=False),
        ),
    ),
)
