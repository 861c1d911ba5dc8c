"""What clients may send to /v1/responses."""

from __future__ import annotations

import pytest

from numballama.server.errors import ApiError
from numballama.server.fields import parse
from numballama.server.http import dumps
from numballama.server.responses_protocol import (
    LOGPROBS,
    FlatCustomTool,
    FunctionTool,
    NamedCustomTool,
    ResponsesRequest,
)


def test_tools_of_both_kinds() -> None:
    tools = [{"type": "function", "name": "f", "parameters": {}}, {"type": "custom", "name": "c"}]
    found = parse(ResponsesRequest, dumps({"input": "a", "tools": tools, "tool_choice": tools[1]}))
    assert found.tools is not None and [type(tool) for tool in found.tools] == [FunctionTool, FlatCustomTool]
    assert isinstance(found.tool_choice, NamedCustomTool)


def test_what_is_asked_to_be_included() -> None:
    assert parse(ResponsesRequest, dumps({"input": "a", "include": [LOGPROBS]})).wants_logprobs
    assert not parse(ResponsesRequest, dumps({"input": "a"})).wants_logprobs


def test_nothing_is_stored() -> None:
    with pytest.raises(ApiError, match="previous_response_id is not supported: nothing is stored"):
        parse(ResponsesRequest, dumps({"input": "a", "previous_response_id": "r"}))
