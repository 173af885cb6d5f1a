"""The fields of JSON requests: the JSON Schema of each, and beside it the function that reads it.

A body is untrusted. orjson refuses what is not JSON: NaN, invalid UTF-8, half of a surrogate pair, 1024 nested arrays.
Of two fields with one name the last one counts. A field that no route knows is ignored, as vLLM and TEI do, and null
means that the field is left out.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import orjson

from funnel_serving.refusals import Refusal

Schema = dict[str, Any]
Values = dict[str, Any]
REQUIRED = object()
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a request.

    Attributes:
        name: its name.
        schema: the JSON Schema of its values other than null.
        read: returns the value for the handler, or raises `Refusal`; its arguments are the field's path and the value.
        default: what the handler gets if the field is left out or null; REQUIRED if it must be there.
        about: its purpose, in a sentence.
    """

    name: str
    schema: Schema
    read: Callable[[str, Any], Any]
    default: Any = REQUIRED
    about: str = ""

    def document(self) -> Schema:
        """The schema of all its values."""
        schema = self.schema if self.default is REQUIRED else {"anyOf": [self.schema, {"type": "null"}]}
        if self.default is not None and self.default is not REQUIRED:
            schema = schema | {"default": self.default}
        return schema | ({"description": self.about} if self.about else {})


def read_json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal.invalid(f"the body is not JSON: {error}") from None


def read_fields(fields: Iterable[Field], path: str, value: Any) -> Values:
    """The values of all fields of an object, by name. `path` leads to the object; it is empty for a body."""
    if not isinstance(value, dict):
        raise wrong(path or "the body", value, "an object")
    values = {}
    for field in fields:
        where = f"{path}.{field.name}" if path else field.name
        item = value.get(field.name)
        if item is not None:
            values[field.name] = field.read(where, item)
        elif field.default is REQUIRED:
            raise Refusal.invalid(f"{where} is missing", param=where)
        else:
            values[field.name] = field.default
    return values


def document_object(fields: Sequence[Field]) -> Schema:
    """The schema of an object with these fields."""
    required = [field.name for field in fields if field.default is REQUIRED]
    properties = {field.name: field.document() for field in fields}
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})


def flag(name: str, default: bool | None, about: str) -> Field:
    def read(path: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise wrong(path, value, "true or false")
        return value

    return Field(name, {"type": "boolean"}, read, default, about)


def integer(name: str, least: int, about: str, *, limit: str) -> Field:
    """An integer of at least `least`. The model has the upper limit, under this name in the description."""

    def read(path: str, value: Any) -> int:
        if not is_whole(value) or value < least:
            raise wrong(path, value, f"an integer of at least {least}")
        return int(value)

    return Field(name, reference(limit), read, None, about)


def choice(name: str, options: Sequence[str], default: str | None, about: str) -> Field:
    def read(path: str, value: Any) -> str:
        if value not in options:
            raise wrong(path, value, f"one of {', '.join(options)}")
        return value

    return Field(name, {"type": "string", "enum": list(options)}, read, default, about)


def refused(name: str, about: str) -> Field:
    """A field that other servers have. Ignoring it would give a result that the client does not mean."""

    def read(path: str, value: Any) -> None:
        raise Refusal.invalid(f"{path} is not supported: {about}", param=path)

    return Field(name, {"not": {}}, read, None, f"Not supported: {about}.")


def text(name: str, about: str, *, default: Any = REQUIRED, limit: str | None = None) -> Field:
    """A text. If only some can be given, the model has them, under the name `limit` in the description."""
    return Field(name, reference(limit) if limit else TEXT, read_text, default, about)


def texts(name: str, about: str) -> Field:
    """An array of texts."""
    return Field(name, array(TEXT), lambda path, value: read_array(read_text, path, value), REQUIRED, about)


def text_or_texts(name: str, about: str) -> Field:
    def read(path: str, value: Any) -> list[str]:
        return read_array(read_text, path, value) if isinstance(value, list) else [read_text(path, value)]

    return Field(name, {"anyOf": [TEXT, array(TEXT)]}, read, REQUIRED, about)


def ids_or_batch(name: str, about: str) -> Field:
    """The token ids of one sequence, or of several."""
    ids = array(reference("TokenId"))

    def read(path: str, value: Any) -> list[list[int]]:
        if isinstance(value, list) and value and not isinstance(value[0], list):
            return [read_ids(path, value)]
        return read_array(read_ids, path, value)

    return Field(name, {"anyOf": [ids, array(ids)]}, read, REQUIRED, about)


def inputs(name: str, about: str) -> Field:
    """One text, the token ids of one sequence, or several of either; never texts and ids together."""
    of_texts, of_ids = text_or_texts(name, about), ids_or_batch(name, about)

    def read(path: str, value: Any) -> list[str] | list[list[int]]:
        is_ids = isinstance(value, list) and len(value) > 0 and isinstance(value[0], int | float | list)
        return (of_ids if is_ids else of_texts).read(path, value)

    return Field(name, {"anyOf": of_texts.schema["anyOf"] + of_ids.schema["anyOf"]}, read, REQUIRED, about)


def nested(name: str, fields: Sequence[Field], about: str, *, required: bool = True) -> Field:
    """An object with fields of its own. If it may be left out, its fields then have their defaults."""
    default = REQUIRED if required else read_fields(fields, name, {})
    return Field(name, document_object(fields), lambda path, value: read_fields(fields, path, value), default, about)


TEXT: Schema = {"type": "string", "minLength": 1}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def reference(name: str) -> Schema:
    """A schema that depends on the model; `openapi.limits` has it."""
    return {"$ref": f"#/components/schemas/{name}"}


def read_text(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(path, value, "a text")
    if not value:
        raise empty(path)
    return value


def read_ids(path: str, value: Any) -> list[int]:
    """The engine checks that the model's vocabulary has them."""
    if not isinstance(value, list):
        raise wrong(path, value, "an array of token ids")
    if not value:
        raise empty(path)
    if set(map(type, value)) == {int}:  # fast, as there may be very many
        return value
    for index, item in enumerate(value):
        if not is_whole(item):
            raise wrong(f"{path}[{index}]", item, "a token id, which is an integer")
    return [int(item) for item in value]


def is_whole(value: Any) -> bool:
    """Whether it is an integer of JSON: 2.0 is one, and true is not."""
    return type(value) is int or (isinstance(value, float) and value.is_integer())


def read_array(read: Callable[[str, Any], Item], path: str, value: Any) -> list[Item]:
    if not isinstance(value, list):
        raise wrong(path, value, "an array")
    if not value:
        raise empty(path)
    return [read(f"{path}[{index}]", item) for index, item in enumerate(value)]


def wrong(path: str, value: Any, must: str) -> Refusal:
    """A value of another type, or out of range."""
    if isinstance(value, list | dict):
        shown = "an array" if isinstance(value, list) else "an object"
    else:
        shown = orjson.dumps(value).decode()
        shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
    return Refusal.invalid(f"{path} is {shown}; it must be {must}", param=path)


def empty(path: str) -> Refusal:
    return Refusal("empty", f"{path} is empty; leave it out", param=path)
