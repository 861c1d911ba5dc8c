"""Talk to `numballama serve` with OpenAI's client: an answer as it is generated, and what it cost.

pip install openai
numballama serve SmolLM2-135M-Instruct.Q4_1.gguf
python examples/openai_client.py "Why is the sky blue?" [http://127.0.0.1:8000/v1]
"""

import sys

from openai import OpenAI


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"
    base_url = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000/v1"
    client = OpenAI(base_url=base_url, api_key="not needed")
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            usage = chunk.usage
            print(f"\n[{usage.prompt_tokens} tokens read, {usage.completion_tokens} written]", file=sys.stderr)


if __name__ == "__main__":
    main()
