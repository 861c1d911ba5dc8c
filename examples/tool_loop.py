"""A model that calls functions: it asks, the program answers, until the model writes its own answer.

    numballama serve Qwen2.5-0.5B-Instruct-Q8_0.gguf        # in another terminal
    pip install openai && python examples/tool_loop.py "What is 17 times 23?"

`--url` is the server's address, `--key` its API key.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from openai import APIConnectionError, OpenAI, OpenAIError


def multiply(a: int, b: int) -> int:
    return a * b


FUNCTIONS = {"multiply": multiply}
NUMBER = {"type": "integer", "minimum": -1_000_000, "maximum": 1_000_000}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "multiply",
            "description": "Multiply two whole numbers",
            "parameters": {
                "type": "object",
                "properties": {"a": NUMBER, "b": NUMBER},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
]


def answer(client: OpenAI, question: str, turns: int = 4) -> str:
    messages: list[Any] = [{"role": "user", "content": question}]
    model = client.models.list().data[0].id
    for turn in range(turns):
        choice = "required" if turn == 0 else "auto"  # the first answer must be a call
        completion = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=0,
            max_tokens=200,
        )
        message = completion.choices[0].message
        if completion.choices[0].finish_reason == "length":  # a call may be cut in its arguments
            return message.content or "the answer was cut off"
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            try:
                result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
            except (KeyError, TypeError, ValueError) as error:  # the model reads what was wrong
                result = f"error: {error}"
            print(f"{call.function.name}({call.function.arguments}) = {result}", file=sys.stderr)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
    return "no answer within the turns"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question", nargs="?", default="What is 17 times 23?")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="none")
    arguments = parser.parse_args()
    try:
        with OpenAI(base_url=f"{arguments.url}/v1", api_key=arguments.key) as client:
            print(answer(client, arguments.question))
    except APIConnectionError:
        raise SystemExit(f"nothing answers at {arguments.url}; start it: numballama serve MODEL") from None
    except OpenAIError as error:
        raise SystemExit(f"{arguments.url}: {error}") from None


if __name__ == "__main__":
    main()
