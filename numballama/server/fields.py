"""What request models are made of: strict types with limits, and a body of JSON as a request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import PydanticCustomError

from .errors import ApiError, invalid_request

MAX_TEXT = 8 << 20
MAX_INT = 2**31 - 1
MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, MAX_PROMPTS, MAX_TOKENS = 2048, 1024, 128, 256, 1 << 20
MAX_STOPS, MAX_STOP, MAX_SCHEMA, MAX_DEPTH, MAX_CHOICES = 16, 256, 256 << 10, 64, 1024
MAX_IGNORED = 20
NO_EFFECT: tuple[object, ...] = (None, False, 0, "", [], {})
"""Values of unknown fields that ask for nothing."""
_PLAIN = (str, int, float)
"""Types of most fields."""
T = TypeVar("T", bound="Request")


class RequestPart(BaseModel):
    """An object in a request. Types are strict: "1" is no number and 1 no text."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=(), populate_by_name=True
    )

    def as_dict(self) -> dict[str, Any]:
        """What has a value of the declared fields, which must have no models inside, by the client's names."""
        named = ((field.alias or name, getattr(self, name)) for name, field in type(self).model_fields.items())
        return {name: value for name, value in named if value is not None}


class Request(RequestPart):
    """A whole request."""

    refused: ClassVar[dict[str, str]] = {}
    """Field that is not supported → what to do instead."""

    _ignored: list[str] = PrivateAttr(default_factory=list)

    @property
    def ignored(self) -> list[str]:
        """Places of the first fields of the request that no model declares."""
        return self._ignored


def parse(kind: type[T], body: bytes) -> T:
    """The request in a body of JSON. Raises `ApiError` 400 that names the field that is wrong or not supported."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error) from None
    for name, value in (request.model_extra or {}).items():
        if name in kind.refused and value not in NO_EFFECT:
            raise ApiError(f"{name} is not supported: {kind.refused[name]}", param=name, code="unsupported_parameter")
    request._ignored = [*(request.model_extra or {}), *_unknown(request)][:MAX_IGNORED]
    return request


def _unknown(value: object, place: str = "") -> Iterator[str]:
    """Places of fields inside the fields of a request that no model declares, and that have a value."""
    if isinstance(value, list):
        for number, each in enumerate(value if value and isinstance(value[0], RequestPart) else ()):
            yield from _unknown(each, f"{place}{number}.")
    elif isinstance(value, RequestPart):
        if place:
            yield from (place + name for name, own in (value.model_extra or {}).items() if own not in NO_EFFECT)
        for name in filter(value.model_fields_set.__contains__, value.__dict__):  # those that are given, in order
            own = value.__dict__[name]
            if not isinstance(own, _PLAIN) and isinstance(own, list | RequestPart):
                yield from _unknown(own, f"{place}{type(value).model_fields[name].alias or name}.")


def _depth(value: object, limit: int) -> int:
    if limit < 0 or not isinstance(value, dict | list):
        return 0
    items = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(item, limit - 1) for item in items), default=0)


def _bounded(value: dict[str, Any]) -> dict[str, Any]:
    if _depth(value, MAX_DEPTH) > MAX_DEPTH:
        raise PydanticCustomError("too_deep", f"Value may be nested {MAX_DEPTH} deep")
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except ValueError:
        raise PydanticCustomError("not_finite", "Numbers must be finite") from None
    if size > MAX_SCHEMA:
        raise PydanticCustomError("too_long", f"Value may have {MAX_SCHEMA:,} characters as JSON")
    return value


def _choices(value: list[str]) -> list[str]:
    if sum(map(len, value)) > MAX_SCHEMA:
        raise PydanticCustomError("too_long", f"Choices may have {MAX_SCHEMA:,} characters together")
    return value


def at_most(count: int) -> BeforeValidator:
    """Refuses a longer object before its items are looked at: each wrong one would be an error, which takes memory."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise PydanticCustomError("too_long", f"Object should have at most {count:,} items, not {len(value):,}")
        return value

    return BeforeValidator(check)


def _text_part(value: str) -> str:
    if value not in ("text", "input_text", "output_text"):
        raise PydanticCustomError("part_type", "Only parts of text are supported")
    return value


Text = Annotated[str, Field(max_length=MAX_TEXT)]
Description = Annotated[str, Field(max_length=MAX_SCHEMA)]
Name = Annotated[str, Field(max_length=512)]
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]
Object = Annotated[dict[str, Any], AfterValidator(_bounded)]
Pattern = Annotated[str, Field(min_length=1, max_length=MAX_SCHEMA)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
Stop = StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES), AfterValidator(_choices)
]
FunctionName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\w.:-]+$")]
PartType = Annotated[str, Field(max_length=64), AfterValidator(_text_part)]


class TextPart(RequestPart):
    type: PartType = "text"
    text: Text
