"""Facts of a text as an object: the server lets the model write only JSON of this shape.

    numballama serve SmolLM2-135M-Instruct.Q4_1.gguf        # in another terminal
    pip install openai && python examples/extract.py "Ada Lovelace was born in London in 1815."

`--url` is the server's address, `--key` its API key.
"""

from __future__ import annotations

import argparse

from openai import APIConnectionError, OpenAI, OpenAIError
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=40)
    born: int = Field(ge=0, le=2100)
    places: list[str] = Field(max_length=3)


def extract(client: OpenAI, text: str) -> Person | None:
    completion = client.chat.completions.parse(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": f"Who is this about?\n{text}"}],
        response_format=Person,
        temperature=0,
        max_tokens=200,
    )
    return completion.choices[0].message.parsed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", nargs="?", default="Ada Lovelace was born in London in 1815.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="none")
    arguments = parser.parse_args()
    try:
        with OpenAI(base_url=f"{arguments.url}/v1", api_key=arguments.key) as client:
            print(extract(client, arguments.text))
    except APIConnectionError:
        raise SystemExit(f"nothing answers at {arguments.url}; start it: numballama serve MODEL") from None
    except OpenAIError as error:
        raise SystemExit(f"{arguments.url}: {error}") from None


if __name__ == "__main__":
    main()
