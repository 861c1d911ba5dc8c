"""`ApiError`: what a client is told when its request cannot be answered, in OpenAI's shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import COMPILE_AGAIN, ContextError, DeviceError, Error, UnsupportedError

MAX_MESSAGE = 1000
"""Characters of a message. Longer ones are cut: they may quote the request."""

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}
"""Status → `type` of an error; for any other "invalid_request_error"."""


class ApiError(Exception):
    """An answer with an error status.

    `param` is the field of the request that is wrong, or None. `code` is a word for programs, or None. `retry_after`:
    seconds after which the client may try again. `scheme`: with status 401, how HTTP asks for the key.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        scheme: str = "Bearer",
    ) -> None:
        super().__init__(message)
        self.message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}…"
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after
        self._scheme = scheme

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """The same for a request that was converted. `names`: field → the client's name for it."""
        if self.param is None or (name := names.get(self.param)) is None:
            return self
        message = name + self.message[len(self.param) :] if self.message.startswith(self.param) else self.message
        return ApiError(message, self.status, param=name, code=self.code, retry_after=self.retry_after)

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer. `type` beside `error` is Anthropic's; OpenAI's clients do not read it."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"type": "error", "error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer besides those of every answer."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": self._scheme} if self.status == 401 else {})


_BRANCH = re.compile(r"(constrained-)?(str|int|float|bool|none|model-fields)|[A-Z]\w+|.*[\[({].*", re.DOTALL)


def invalid_request(error: ValidationError) -> ApiError:
    """A 400 that names the first wrong field.

    Where a value may have several types, pydantic reports an error for each: the one that came furthest is meant. That
    is a list that is too long, since it was right up to there.
    """
    details = error.errors(include_url=False, include_context=False, include_input=False)
    first_field = details[0]["loc"][:1]
    of_field = [each for each in details if each["loc"][:1] == first_field]
    places = [_place(each["loc"]) for each in of_field]
    deepest = max(range(len(places)), key=lambda n: (of_field[n]["type"] == "too_long", len(places[n]), -n))
    place, found = ".".join(places[deepest]), of_field[deepest]
    same = [each["msg"] for each, where in zip(of_field, places, strict=True) if where == places[deepest]]
    message = " or ".join(dict.fromkeys(same)) if found["type"].endswith("_type") else found["msg"]
    if found["type"] == "json_invalid":
        return ApiError(f"the body is not valid JSON: {message}", code="invalid_json")
    code = "missing_required_parameter" if found["type"] == "missing" else "invalid_value"
    return ApiError(f"{place}: {message}" if place else message, param=place or None, code=code)


def _place(location: tuple[int | str, ...]) -> list[str]:
    """A location without the names of a union's branches, which pydantic adds to it."""
    return [str(step) for step in location if isinstance(step, int) or not _BRANCH.fullmatch(step)]


_FIELD = re.compile(r"^((?:json_schema|regex|grammar)\b|[a-z_]+(?= (?:must|cannot|is not supported)|:))")


def refused(error: Exception, param: str | None = None, fields: Mapping[str, str] | None = None) -> ApiError:
    """What to answer when the engine, a template or the tokenizer refuses a request.

    `param`: the field that the request's text came from. `fields`: name of a sampling option → field of the request.
    """
    message = str(error)
    if isinstance(error, ContextError):
        for name in ("context", "kv_tokens"):
            option = name.replace("_", "-")
            message = message.replace(f"compile with {name}=", f"start the server with a larger --{option}")
        return ApiError(message, param=param, code="context_length_exceeded")
    if isinstance(error, DeviceError) or not isinstance(error, Error):
        return failed(error)
    named = _FIELD.match(message)
    if named is not None and fields is not None and named[1] in fields:
        param = fields[named[1]]
        message = param + message[named.end() :]
    code = "unsupported_value" if isinstance(error, UnsupportedError) else "invalid_value"
    return ApiError(message, param=param, code=code)


def cause(failure: BaseException) -> str:
    """Why a device has failed, without what a user of Python would have to do: the server does it."""
    if isinstance(failure, Error):
        return str(failure).removesuffix(COMPILE_AGAIN)
    return f"{type(failure).__name__}: {failure}"


def engine_failed(error: BaseException) -> ApiError:
    """What to answer when the model's device has failed for good: the model is loaded again, so a client may retry."""
    message = cause(error) if isinstance(error, Error) else "the engine has failed; the server's log says why"
    return ApiError(message, 503, code="engine_failed", retry_after=5)


def failed(error: BaseException) -> ApiError:
    """What to answer when a generation fails that was accepted."""
    if isinstance(error, ApiError):
        return error
    message = str(error) if isinstance(error, Error) else "the server failed; its log says why"
    return ApiError(message, 500, code="server_error")
