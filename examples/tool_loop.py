"""A model that calls functions: it asks, the program answers, until the model writes its own answer.

pip install openai
numballama serve Qwen2.5-0.5B-Instruct-Q8_0.gguf
python examples/tool_loop.py "What is 17 times 23?" [http://127.0.0.1:8000/v1]
"""

import json
import sys
from typing import Any

from openai import OpenAI


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
            "parameters": {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]},
        },
    }
]


def answer(client: OpenAI, question: str, turns: int = 4) -> str:
    messages: list[Any] = [{"role": "user", "content": question}]
    model = client.models.list().data[0].id
    for turn in range(turns):
        choice = "required" if turn == 0 else "auto"  # the first answer must be a call
        completion = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, tool_choice=choice, temperature=0, max_tokens=100
        )
        message = completion.choices[0].message
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
    question = sys.argv[1] if len(sys.argv) > 1 else "What is 17 times 23?"
    base_url = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000/v1"
    print(answer(OpenAI(base_url=base_url, api_key="not needed"), question))


if __name__ == "__main__":
    main()
