"""OpenAI's wire format: `/v1/embeddings` and `/v1/models`, for its clients and all that imitate them."""

import base64
import time
from typing import Any

import numpy as np

from funnel_serving.refusals import KINDS, Refusal
from funnel_serving.service import Service
from funnel_serving.wire import fields, replies
from funnel_serving.wire.fields import Values
from funnel_serving.wire.model import model_name
from funnel_serving.wire.route import Family, Reply, Route

STARTED = int(time.time())

# What openai-python shows as `type`; a kind that is not here is "invalid_request_error".
TYPES = {
    "unauthorized": "authentication_error",
    "overloaded": "rate_limit_error",
    "inference": "server_error",
    "unhealthy": "server_error",
    "timeout": "server_error",
}


def error(refusal: Refusal) -> dict[str, Any]:
    kind = TYPES.get(refusal.kind, "invalid_request_error")
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.kind}}


OPENAI = Family("OpenAI", statuses=KINDS, error=error, schema=replies.OPENAI_ERROR)


async def embeddings(service: Service, values: Values) -> Reply:
    check_model(service, values["model"])
    if not isinstance(values["input"][0], str) and not service.settings.allow_token_ids:
        raise Refusal.invalid(
            "input has token ids, which this server does not take: clients such as LangChain send ids of OpenAI's "
            "vocabulary, of which this model would make a wrong vector. Send texts; with LangChain's OpenAIEmbeddings "
            "set check_embedding_ctx_length=False. If the ids are of this model, start the server with "
            "--allow-token-ids",
            param="input",
        )
    limit = values["truncate_prompt_tokens"]
    most = service.engine.max_length
    if limit == 0 or (limit is not None and limit > most):
        raise fields.wrong("truncate_prompt_tokens", limit, f"from 1 to {most}, or -1 for the limit of the model")
    answer = await service.embed(
        values["input"],
        dimensions=values["dimensions"],
        truncate=None if limit is None else True,
        max_tokens=None if limit == -1 else limit,
    )
    encode = encode_base64 if values["encoding_format"] == "base64" else np.asarray
    tokens = sum(answer.token_counts)
    return Reply(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": encode(vector)}
                for index, vector in enumerate(answer.results)
            ],
            "model": model_name(service.settings),
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        },
        answer,
        values["input"],
    )


async def models(service: Service, values: Values) -> Reply:
    return Reply({"object": "list", "data": [model_card(service)]})


async def model(service: Service, values: Values) -> Reply:
    check_model(service, values["model"])
    return Reply(model_card(service))


def model_card(service: Service) -> dict[str, Any]:
    return {
        "id": model_name(service.settings),
        "object": "model",
        "created": STARTED,
        "owned_by": "funnel-engine",
        "max_model_len": service.engine.max_length,
    }


def check_model(service: Service, asked: str | None) -> None:
    """Another model's name is a mistake of the client: its vectors would be compared with those of this model."""
    name = model_name(service.settings)
    if asked not in (None, name):
        raise Refusal(
            "not_found",
            f"the model {asked!r:.100} is not here; this server has {name!r}. Ask for this one, leave the model out, "
            "or start the server with --model-name",
            param="model",
        )


def encode_base64(vector: np.ndarray) -> str:
    """Little-endian float32, as OpenAI's clients decode it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


EMBEDDINGS = (
    fields.refused(
        "messages", "this model has no chat template; send texts as input. MTEB needs use_chat_template=False"
    ),
    fields.inputs("input", "one text, the token ids of one sequence, or an array of several of either"),
    fields.text("model", "the name of the model, or nothing", default=None, limit="ModelName"),
    fields.choice("encoding_format", ("float", "base64"), "float", "an array of numbers, or base64 of float32"),
    fields.integer("dimensions", 1, "keep only the first dimensions of each vector", limit="Dimensions"),
    fields.integer(
        "truncate_prompt_tokens",
        -1,
        "cut longer inputs to this number of tokens; -1 is the model's",
        limit="TokenLimit",
    ),
)

ROUTES = (
    *(
        Route(
            OPENAI,
            "POST",
            path,
            embeddings,
            "One vector per input",
            reply=replies.EMBEDDINGS,
            fields=EMBEDDINGS,
            refuses=("not_found",),
        )
        for path in ("/v1/embeddings", "/embeddings")  # the second is TEI's
    ),
    Route(OPENAI, "GET", "/v1/models", models, "The model that is served", reply=replies.MODELS),
    Route(
        OPENAI,
        "GET",
        "/v1/models/{model:path}",
        model,
        "The model, if this is its name",
        reply=replies.MODEL,
        refuses=("not_found",),
    ),
)
