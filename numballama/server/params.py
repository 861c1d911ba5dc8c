"""`SamplingParams` of a request."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import Error
from ..sampling import SamplingParams
from .errors import ApiError, refused
from .protocol import ChatRequest, CompletionRequest, GenerationRequest, ResponseFormat, choice_pattern

GREEDY_TOP_P = 1e-9
"""`SamplingParams` takes no top_p of 0, which means the likeliest token alone."""
_SAME_NAME = (
    "temperature", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "stop",
    "stop_token_ids", "ignore_eos", "min_tokens", "n",
)  # fmt: skip


class Restriction(NamedTuple):
    """What an answer must match."""

    name: str
    """The field of `SamplingParams`."""
    value: str | dict[str, Any]
    place: str
    """The request's field that asks for it."""


def token_limit(request: ChatRequest | CompletionRequest) -> tuple[str, int | None]:
    """(the request's field that limits the tokens of an answer, its value)."""
    if request.max_completion_tokens is None:
        return "max_tokens", request.max_tokens
    return "max_completion_tokens", request.max_completion_tokens


def sampling_params(
    request: GenerationRequest,
    max_tokens: int | None,
    logprobs: int | None,
    limit_field: str = "max_tokens",
    **more: str,
) -> SamplingParams:
    """The settings that a request asks for. What it leaves out is OpenAI's default: temperature 1, nothing cut off.

    `limit_field` is the request's name for `max_tokens`; `more` are further fields of `SamplingParams`. Raises
    `ApiError` 400.
    """
    options: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": logprobs, "temperature": 1.0, "top_k": 0}
    options["top_p"] = 1.0 if request.top_p is None else max(request.top_p, GREEDY_TOP_P)
    options |= {name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None}
    if request.top_k is not None:
        options["top_k"] = max(request.top_k, 0)
    if request.logit_bias:
        options["logit_bias"] = {int(token): bias for token, bias in request.logit_bias.items()}
    restriction = _restriction(request)
    if restriction is not None:
        if more:
            message = f"{restriction.place} cannot be used with a tool_choice that asks for a call"
            raise ApiError(message, param=restriction.place)
        options[restriction.name] = restriction.value
    fields = {name: name for name in options} | {"max_tokens": limit_field}
    if restriction is not None:
        fields[restriction.name] = restriction.place
    try:
        return SamplingParams(**(options | more))
    except Error as error:
        raise refused(error, fields=fields | dict.fromkeys(more, "tool_choice")) from None


def restriction_fields(request: GenerationRequest) -> dict[str, str]:
    """Field of `SamplingParams` that restricts the answer → the request's field that asks for it."""
    found = _restriction(request)
    return {} if found is None else {found.name: found.place}


def _restriction(request: GenerationRequest) -> Restriction | None:
    """What the answer must match. None: nothing. Raises `ApiError` 400 for two restrictions."""
    found: list[Restriction] = []
    if request.response_format is not None and (schema := _schema(request.response_format)) is not None:
        found.append(Restriction("json_schema", schema, "response_format"))
    for name in ("regex", "grammar", "json_schema"):
        if (value := getattr(request, name)) is not None:
            found.append(Restriction(name, value, name))
    structured = request.structured_outputs
    if structured is not None:
        place = "structured_outputs"
        if structured.json_ is not None:
            found.append(Restriction("json_schema", structured.json_, place))
        if structured.json_object:
            found.append(Restriction("json_schema", {"type": "object"}, place))
        if structured.choice is not None:
            found.append(Restriction("regex", choice_pattern(structured.choice), place))
        for name in ("regex", "grammar"):
            if (value := getattr(structured, name)) is not None:
                found.append(Restriction(name, value, place))
    if len(found) > 1:
        names = " and ".join(dict.fromkeys(each.place for each in found))
        raise ApiError(f"an answer can be restricted in one way: {names} are given", param=found[1].place)
    return found[0] if found else None


def _schema(form: ResponseFormat) -> dict[str, Any] | None:
    """The schema of a `response_format`; None where any text is right. Raises `ApiError` 400."""
    nested = None if form.json_schema is None else form.json_schema.schema_
    if form.schema_ is not None and (form.type == "text" or nested is not None):
        place = "response_format.schema"
        raise ApiError(f"{place} cannot be used beside another schema, or with the type text", param=place)
    if nested is not None and form.type != "json_schema":
        place = "response_format.json_schema"
        raise ApiError(f"{place} needs the type json_schema, found {form.type}", param=place)
    if form.type == "json_object":
        return {"type": "object"} if form.schema_ is None else form.schema_
    if form.type == "text":
        return None
    if (schema := form.schema_ if nested is None else nested) is None:
        place = "response_format.json_schema" + ("" if form.json_schema is None else ".schema")
        raise ApiError(f"{place}: Field required", param=place, code="missing_required_parameter")
    return schema
