"""The JSON Schemas of replies."""

from funnel_serving.wire.fields import Schema, array


def an_object(**properties: Schema) -> Schema:
    """An object that has all of these fields."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def list_of(items: Schema) -> Schema:
    """An array that may be empty."""
    return {"type": "array", "items": items}


TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
INTEGER_OR_NULL: Schema = {"type": ["integer", "null"]}

VECTOR = array(NUMBER)
VECTORS = array(VECTOR)
LABELS = array(an_object(label=TEXT, score=NUMBER))
TEXTS = array(TEXT)

# text-embeddings-inference
TEI_ERROR = an_object(
    error=TEXT, error_type={"enum": ["Backend", "Empty", "Overloaded", "Tokenizer", "Unhealthy", "Validation"]}
)
RANK = an_object(index=INTEGER, score=NUMBER)
RANKS = array(RANK | {"properties": RANK["properties"] | {"text": TEXT}})
TOKENS = array(list_of(an_object(id=INTEGER, text=TEXT, special=FLAG, start=INTEGER_OR_NULL, stop=INTEGER_OR_NULL)))
INFO = an_object(
    model_id=TEXT,
    model_sha=TEXT_OR_NULL,
    model_dtype=TEXT,
    served_model_name=TEXT,
    model_type={"type": "object", "minProperties": 1, "maxProperties": 1},
    max_concurrent_requests=INTEGER,
    max_input_length=INTEGER,
    max_batch_tokens=INTEGER,
    max_batch_requests=INTEGER_OR_NULL,
    max_client_batch_size=INTEGER,
    auto_truncate=FLAG,
    tokenization_workers=INTEGER,
    version=TEXT,
    sha=TEXT_OR_NULL,
    docker_label=TEXT_OR_NULL,
    funnel=TEXT,
    engine=TEXT,
)

# Labels of tokens
SPANS = array(list_of(an_object(token=TEXT, start=INTEGER_OR_NULL, end=INTEGER_OR_NULL, label=TEXT, score=NUMBER)))

# OpenAI
OPENAI_ERROR = an_object(error=an_object(message=TEXT, type=TEXT, param=TEXT_OR_NULL, code=TEXT))
EMBEDDING = an_object(
    object={"const": "embedding"},
    index=INTEGER,
    embedding={"anyOf": [VECTOR, {"type": "string", "contentEncoding": "base64"}]},
)
EMBEDDINGS = an_object(
    object={"const": "list"},
    data=array(EMBEDDING),
    model=TEXT,
    usage=an_object(prompt_tokens=INTEGER, total_tokens=INTEGER),
)
MODEL = an_object(id=TEXT, object={"const": "model"}, created=INTEGER, owned_by=TEXT, max_model_len=INTEGER)
MODELS = an_object(object={"const": "list"}, data=array(MODEL))
