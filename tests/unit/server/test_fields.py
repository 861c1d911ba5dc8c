"""What request models are made of."""

from __future__ import annotations

from typing import ClassVar

import pytest

from numballama.server.errors import ApiError
from numballama.server.fields import MAX_DEPTH, FunctionName, Object, Request, RequestPart, parse


class Inner(RequestPart):
    name: FunctionName = "a"


class Wanted(Request):
    refused: ClassVar[dict[str, str]] = {"seeds": "use seed"}
    seed: int | None = None
    schema_: Object | None = None
    inner: list[Inner] | None = None


def test_unknown_fields_are_named_and_known_ones_refused() -> None:
    found = parse(Wanted, b'{"seed": 1, "new": 2, "seeds": null, "inner": [{"name": "x", "deep": 1, "off": false}]}')
    assert found.seed == 1 and found.ignored == ["new", "seeds", "inner.0.deep"]
    with pytest.raises(ApiError, match="seeds is not supported: use seed"):
        parse(Wanted, b'{"seeds": 1}')


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"seed": "1"}', "seed: Input should be a valid integer"),
        (b'{"inner": [{"name": "a b"}]}', r"inner\.0\.name: String should match"),
        (b'{"schema_": {"a": 1e999}}', "Numbers must be finite"),
        (b'{"schema_": ' + b'{"a": ' * MAX_DEPTH + b"{}" + b"}" * MAX_DEPTH + b"}", f"may be nested {MAX_DEPTH} deep"),
        (b"[]", "Input should be an object"),
        (b"{", "the body is not valid JSON"),
    ],
)
def test_wrong_values(body: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message):
        parse(Wanted, body)
