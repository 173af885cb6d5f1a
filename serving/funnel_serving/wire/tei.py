"""The wire format of Hugging Face's text-embeddings-inference (TEI), for its clients and `huggingface_hub`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from anyio.to_thread import run_sync

from funnel_engine.weights import dtype_of
from funnel_serving.refusals import KINDS, Refusal
from funnel_serving.service import TOKENIZERS, Service
from funnel_serving.wire import fields, replies
from funnel_serving.wire.fields import Field, Schema, Values, array
from funnel_serving.wire.model import engine_version, kind_of, model_name
from funnel_serving.wire.route import Family, Reply, Route
from funnel_serving.wire.scores import best_first, scores_of

# Where TEI has another status than we, and its name for each kind; what is not here is "Validation".
STATUSES = {**KINDS, "validation": 422, "unsupported": 424, "inference": 424}
ERROR_TYPES = {
    "empty": "Empty",
    "tokenization": "Tokenizer",
    "overloaded": "Overloaded",
    "unsupported": "Backend",
    "inference": "Backend",
    "timeout": "Backend",
    "unhealthy": "Unhealthy",
}


def error(refusal: Refusal) -> dict[str, Any]:
    return {"error": refusal.message, "error_type": ERROR_TYPES.get(refusal.kind, "Validation")}


TEI = Family(
    "text-embeddings-inference",
    statuses=STATUSES,
    error=error,
    schema=replies.TEI_ERROR,
)

INPUTS = fields.inputs("inputs", "one text, the token ids of one sequence, or an array of several of either")
TRUNCATION = (
    fields.flag("truncate", None, "cut inputs that are too long, instead of refusing them; else the server's setting"),
    fields.choice("truncation_direction", ("Left", "Right", "left", "right"), "Right", "the side that is cut off"),
)
PROMPT = fields.text("prompt_name", "the checkpoint's prompt to put before each text", default=None, limit="PromptName")
RAW_SCORES = fields.flag("raw_scores", False, "give logits instead of probabilities")
EMBED = (
    INPUTS,
    *TRUNCATION,
    PROMPT,
    fields.flag("normalize", True, "scale each vector to length 1"),
    fields.integer("dimensions", 1, "keep only the first dimensions of each vector", limit="Dimensions"),
)
SIMILARITY = (
    fields.nested(
        "inputs",
        (
            fields.text("source_sentence", "the text that the others are compared with"),
            fields.texts("sentences", "the other texts"),
        ),
        "what is compared",
    ),
    fields.nested("parameters", (*TRUNCATION, PROMPT), "how the texts are read", required=False),
)
RERANK = (
    fields.text("query", "the first text of each pair"),
    fields.texts("texts", "the second texts"),
    *TRUNCATION,
    RAW_SCORES,
    fields.flag("return_text", False, "repeat each text in the reply"),
)
TOKENIZE = (
    fields.text_or_texts("inputs", "one text or several"),
    fields.flag("add_special_tokens", True, "with the tokens that the checkpoint adds"),
    PROMPT,
)
DECODE = (
    fields.ids_or_batch("ids", "the token ids of one text, or of several"),
    fields.flag("skip_special_tokens", True, "leave special tokens out"),
)


def pair_inputs() -> Field:
    """`"a"` is a text and `["a", "b"]` one pair of texts; a batch is an array of arrays, each with one text or two."""
    one_or_two: Schema = array(fields.TEXT) | {"maxItems": 2}

    def read_sequence(path: str, value: Any) -> str | tuple[str, str]:
        sequence = fields.read_array(fields.read_text, path, value)
        if len(sequence) > 2:
            raise fields.wrong(path, value, f"one text or a pair of texts, not {len(sequence)} texts")
        return sequence[0] if len(sequence) == 1 else (sequence[0], sequence[1])

    def read(path: str, value: Any) -> tuple[bool, list[str | tuple[str, str]]]:
        """Whether it is a batch, and its sequences."""
        if isinstance(value, list) and value and isinstance(value[0], list):
            return True, fields.read_array(read_sequence, path, value)
        return False, [read_sequence(path, value) if isinstance(value, list) else fields.read_text(path, value)]

    about = "a text, a pair of texts in an array, or an array of arrays with one text or a pair each"
    return Field("inputs", {"anyOf": [fields.TEXT, one_or_two, array(one_or_two)]}, read, about=about)


def truncation(values: Values) -> dict[str, Any]:
    """The arguments of the service that say what is cut."""
    return {"truncate": values["truncate"], "truncate_left": values["truncation_direction"].lower() == "left"}


async def embed(service: Service, values: Values) -> Reply:
    answer = await service.embed(
        values["inputs"],
        normalize=values["normalize"],
        dimensions=values["dimensions"],
        prompt_name=values["prompt_name"],
        **truncation(values),
    )
    return Reply(answer.results, answer, values["inputs"])


async def embed_all(service: Service, values: Values) -> Reply:
    answer = await service.rows(values["inputs"], prompt_name=values["prompt_name"], **truncation(values))
    return Reply(answer.results, answer, values["inputs"])


async def similarity(service: Service, values: Values) -> Reply:
    texts = [values["inputs"]["source_sentence"], *values["inputs"]["sentences"]]
    parameters = values["parameters"]
    answer = await service.embed(texts, prompt_name=parameters["prompt_name"], **truncation(parameters))
    return Reply(answer.results[1:] @ answer.results[0], answer, texts)


async def predict(service: Service, values: Values) -> Reply:
    is_batch, sequences = values["inputs"]
    answer = await service.classify(sequences, **truncation(values))
    scores = scores_of(answer.results, raw=values["raw_scores"])
    labelled = [best_first(service.labels, row) for row in scores]
    texts = [text for sequence in sequences for text in ([sequence] if isinstance(sequence, str) else sequence)]
    return Reply(labelled if is_batch else labelled[0], answer, texts)


async def rerank(service: Service, values: Values) -> Reply:
    if kind_of(service.engine.head) != "reranker":
        raise Refusal(
            "unsupported",
            f"this model is not a re-ranker, which is a classifier of sequences with one label: its task is "
            f"{service.engine.head.task or 'none'}, with {len(service.labels)} labels",
        )
    texts = values["texts"]
    answer = await service.classify([(values["query"], text) for text in texts], **truncation(values))
    scores = scores_of(answer.results, raw=values["raw_scores"])[:, 0]
    ranks = [
        {"index": int(index), "score": scores[index]} | ({"text": texts[index]} if values["return_text"] else {})
        for index in np.argsort(-scores, kind="stable")
    ]
    return Reply(ranks, answer, [text for pair in texts for text in (values["query"], pair)])


async def tokenize(service: Service, values: Values) -> Reply:
    tokens = await service.tokenize(
        values["inputs"], add_special_tokens=values["add_special_tokens"], prompt_name=values["prompt_name"]
    )
    return Reply([[token._asdict() for token in text] for text in tokens])


async def decode(service: Service, values: Values) -> Reply:
    return Reply(await service.decode(values["ids"], skip_special_tokens=values["skip_special_tokens"]))


async def info(service: Service, values: Values) -> Reply:
    engine, settings = service.engine, service.settings
    name = model_name(settings)
    return Reply(
        {
            "model_id": name,
            "model_sha": None,
            "model_dtype": dtype_of(engine.params),
            "served_model_name": name,
            "model_type": model_type(service),
            "max_concurrent_requests": settings.max_waiting_requests,
            "max_input_length": engine.max_length,
            "max_batch_tokens": settings.max_batch_tokens,
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_waiting_rows,  # more inputs would never fit into the queue
            "auto_truncate": settings.truncate,
            "tokenization_workers": TOKENIZERS,
            "version": engine_version(),
            "sha": None,
            "docker_label": None,
            "funnel": str(engine.funnel),
            "engine": await run_sync(engine.describe),  # traces a program if none has run yet
        }
    )


def model_type(service: Service) -> Mapping[str, Any]:
    kind = kind_of(service.engine.head)
    if kind == "embedding":
        return {kind: {"pooling": service.engine.head.pooling}}
    labels = {str(index): label for index, label in enumerate(service.labels)}
    return {kind: {"id2label": labels, "label2id": {label: int(index) for index, label in labels.items()}}}


ROUTES = (
    Route(TEI, "POST", "/embed", embed, "One vector per input", reply=replies.VECTORS, fields=EMBED),
    Route(
        TEI,
        "POST",
        "/embed_all",
        embed_all,
        "The encoder's rows of each input, not pooled",
        reply=array(replies.VECTORS),
        fields=(INPUTS, *TRUNCATION, PROMPT),
    ),
    Route(
        TEI,
        "POST",
        "/similarity",
        similarity,
        "The cosine of a text with others",
        reply=replies.VECTOR,
        fields=SIMILARITY,
    ),
    Route(
        TEI,
        "POST",
        "/predict",
        predict,
        "Labels of texts or pairs of texts, with scores, the best first",
        reply={"anyOf": [replies.LABELS, array(replies.LABELS)]},
        fields=(pair_inputs(), *TRUNCATION, RAW_SCORES),
    ),
    Route(
        TEI,
        "POST",
        "/rerank",
        rerank,
        "Texts in the order in which they fit a query, for a classifier with one label",
        reply=replies.RANKS,
        fields=RERANK,
    ),
    Route(
        TEI,
        "POST",
        "/tokenize",
        tokenize,
        "The tokens of texts, as the engine would run them",
        reply=replies.TOKENS,
        fields=TOKENIZE,
    ),
    Route(TEI, "POST", "/decode", decode, "The texts of token ids", reply=replies.TEXTS, fields=DECODE),
    Route(
        TEI,
        "GET",
        "/info",
        info,
        "The model, its funnel, what runs it, and the limits of the server",
        reply=replies.INFO,
    ),
)
