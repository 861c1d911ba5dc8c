"""The OpenAPI document."""

from __future__ import annotations

import json
from typing import Any

import pytest

from numballama.server.app import GETS, POSTS
from tests.helpers.http_server import Running


def test_every_path_is_described(server: Running) -> None:
    document = server.get("/openapi.json").json
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {path.replace(":path", "") for path in [*GETS, *POSTS]}


def test_references_lead_somewhere(server: Running) -> None:
    document = server.get("/openapi.json").json

    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [found for item in value.values() for found in references(item)]
        return [found for item in value for found in references(item)] if isinstance(value, list) else []

    schemas = document["components"]["schemas"]
    assert {reference.rpartition("/")[2] for reference in references(document)} <= set(schemas)
    assert "temperature" in schemas["ChatRequest"]["properties"] and "$defs" not in json.dumps(document)


def test_schemas_are_json_schemas(server: Running) -> None:
    """They accept what the server accepts, and refuse what it refuses."""
    jsonschema = pytest.importorskip("jsonschema")
    document = server.get("/openapi.json").json
    for name, body, good in (
        ("ChatRequest", {"messages": [{"role": "user", "content": "a"}], "temperature": 1}, True),
        ("ChatRequest", {"messages": [{"role": "user", "content": "a"}], "temperature": -1}, False),
        ("CompletionRequest", {"prompt": [[1, 2]]}, True),
        ("CompletionRequest", {"prompt": [["a"]]}, False),
    ):
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        assert jsonschema.Draft202012Validator(schema).is_valid(body) is good, (name, body)
