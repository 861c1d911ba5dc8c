"""Errors in OpenAI's shape."""

from __future__ import annotations

import pytest

from numballama.errors import COMPILE_AGAIN, ContextError, DeviceError, Error, UnsupportedError
from numballama.server.errors import MAX_MESSAGE, ApiError, cause, engine_failed, failed, refused


def test_the_shape() -> None:
    error = ApiError("wrong", param="n", code="invalid_value", retry_after=3)
    assert error.body == {
        "type": "error",
        "error": {"message": "wrong", "type": "invalid_request_error", "param": "n", "code": "invalid_value"},
    }
    assert error.headers == {"Retry-After": "3"}
    assert ApiError("a", 401).headers == {"WWW-Authenticate": "Bearer"}
    assert len(ApiError("x" * 10_000).message) == MAX_MESSAGE + 1


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (ContextError("the prompt is too long"), 400, "prompt", "context_length_exceeded"),
        (UnsupportedError("regex is not supported by this version"), 400, "guided", "unsupported_value"),
        (Error("min_tokens must be at most 3"), 400, "min_tokens", "invalid_value"),
        (Error("the template refuses"), 400, "prompt", "invalid_value"),
        (DeviceError("the card is gone"), 500, None, "server_error"),
        (ValueError("a secret path"), 500, None, "server_error"),
    ],
)
def test_what_the_engine_refuses(error: Exception, status: int, param: str | None, code: str) -> None:
    found = refused(error, "prompt", {"regex": "guided", "min_tokens": "min_tokens"})
    assert (found.status, found.param, found.code) == (status, param, code)
    assert "secret" not in found.message


def test_advice_is_for_those_who_start_a_server() -> None:
    """The engine's errors speak to Python programs."""
    message = refused(ContextError("and the context 512; shorten it, or compile with context=")).message
    assert message == "and the context 512; shorten it, or start the server with a larger --context"
    message = refused(ContextError("shorten it, or compile with kv_tokens=")).message
    assert message == "shorten it, or start the server with a larger --kv-tokens"


def test_failures() -> None:
    assert failed(Error("the logits are not numbers")).message == "the logits are not numbers"
    assert failed(ValueError("x")).status == 500 and failed(own := ApiError("a", 504)) is own


def test_why_a_device_has_failed() -> None:
    """What a server does itself is not asked of its clients. What only its log may say is not told them."""
    failure = DeviceError("rank 1 ended" + COMPILE_AGAIN)
    assert cause(failure) == engine_failed(failure).message == "rank 1 ended"
    assert cause(KeyError("x")) == "KeyError: 'x'" and "x" not in engine_failed(KeyError("x")).message
