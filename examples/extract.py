"""Facts of a text as an object: the server lets the model write only JSON of this shape.

pip install openai
numballama serve SmolLM2-135M-Instruct.Q4_1.gguf
python examples/extract.py "Ada Lovelace was born in London in 1815." [http://127.0.0.1:8000/v1]
"""

import sys

from openai import OpenAI
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
    text = sys.argv[1] if len(sys.argv) > 1 else "Ada Lovelace was born in London in 1815."
    base_url = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000/v1"
    print(extract(OpenAI(base_url=base_url, api_key="not needed"), text))


if __name__ == "__main__":
    main()
