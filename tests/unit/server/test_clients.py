"""OpenAI's own client parses every answer."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, Field

from numballama.model import Model
from numballama.server.settings import Settings
from tests.helpers.http_server import LONG, Running, eventually, serving

openai = pytest.importorskip("openai")

MESSAGES: Any = [{"role": "user", "content": "Tell me of a dog."}]


@pytest.fixture(params=["server", "linked"])
def client(request: pytest.FixtureRequest) -> Any:
    """Of the engine in this process, and of one that is behind a link."""
    server: Running = request.getfixturevalue(request.param)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=LONG) as client:
        yield client


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["story.gguf"]
    assert client.models.retrieve("story.gguf").owned_by == "numballama"


def test_chat(client: Any) -> None:
    options: dict[str, Any] = {"model": "m", "messages": MESSAGES, "max_tokens": 10, "temperature": 0}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=1)
    assert whole.choices[0].finish_reason == "length" and len(whole.choices[0].logprobs.content) == 10
    assert whole.usage.prompt_tokens_details.cached_tokens >= 0
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage.completion_tokens == 10


def test_the_stream_helper(client: Any) -> None:
    with client.chat.completions.stream(
        model="m", messages=MESSAGES, max_completion_tokens=200, temperature=1, seed=2, n=2, stop=["e"]
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds and len(final.choices) == 2
    assert all(choice.finish_reason == "stop" for choice in final.choices)


def test_completions(client: Any) -> None:
    options: dict[str, Any] = {"model": "m", "prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}
    whole = client.completions.create(**options, logprobs=1, echo=True)
    assert whole.choices[0].logprobs.tokens[0] == "<s>" and whole.choices[0].text.startswith("Once upon a time")
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))


def test_responses(client: Any) -> None:
    options: dict[str, Any] = {"model": "m", "input": "Tell me of a dog.", "max_output_tokens": 10, "temperature": 0}
    whole = client.responses.create(**options, instructions="Be brief.")
    assert whole.output_text and whole.status == "incomplete" and whole.usage.output_tokens == 10
    assert whole.incomplete_details.reason == "max_output_tokens"
    more: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    part = client.responses.create(**options, **more).output[0].content[0]
    assert len(part.logprobs) == 10 and len(part.logprobs[0].top_logprobs) == 1
    with client.responses.stream(**options, instructions="Be brief.") as stream:
        events = list(stream)
    final = events[-1].response  # "incomplete": get_final_response() wants a whole one
    assert final.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text


class Person(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=99)


def test_the_parse_helpers(client: Any) -> None:
    """Pydantic models are the shape of answers and of a tool's arguments."""
    options: dict[str, Any] = {"model": "m", "temperature": 0}
    chat = client.chat.completions.parse(**options, messages=MESSAGES, response_format=Person, max_tokens=100)
    assert isinstance(chat.choices[0].message.parsed, Person)
    response = client.responses.parse(**options, input="Who is it?", text_format=Person, max_output_tokens=100)
    assert isinstance(response.output_parsed, Person)
    tools = [openai.pydantic_function_tool(Person, name="greet")]
    called = client.chat.completions.parse(
        **options, messages=MESSAGES, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=100
    )
    (call,) = called.choices[0].message.tool_calls
    assert call.function.name == "greet" and isinstance(call.function.parsed_arguments, Person)


def test_the_stream_helpers_parse(client: Any) -> None:
    options: dict[str, Any] = {"model": "m", "temperature": 0}
    with client.chat.completions.stream(
        **options, messages=MESSAGES, response_format=Person, max_tokens=100, stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds and isinstance(final.choices[0].message.parsed, Person)
    assert final.usage.completion_tokens > 5
    tools: list[Any] = [openai.pydantic_function_tool(Person, name="greet")]
    with client.chat.completions.stream(
        **options, messages=MESSAGES, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=100
    ) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.done" in kinds and isinstance(call.function.parsed_arguments, Person)
    with client.responses.stream(**options, input="Who?", text_format=Person, max_output_tokens=100) as stream:
        assert "response.output_text.delta" in {event.type for event in stream}
        assert isinstance(stream.get_final_response().output_parsed, Person)


def test_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="m", messages=MESSAGES, temperature=-1)
    assert wrong.value.param == "temperature" and wrong.value.code == "invalid_value" and wrong.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="m", input="x")


def test_keys_and_limits(model: Model) -> None:
    with serving(model, Settings(api_keys=("secret",), queue_sequences=0)) as server:

        def client(key: str) -> Any:
            return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=LONG)

        with client("wrong") as wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        with client("secret") as right:
            assert right.models.list().data
            options: dict[str, Any] = {"model": "m", "messages": MESSAGES, "max_tokens": 400}
            stream = right.chat.completions.create(**options, stream=True, n=4)
            with pytest.raises(openai.RateLimitError):
                right.chat.completions.create(**options)
            stream.close()
        eventually(lambda: server.idle, "the end of all requests")
