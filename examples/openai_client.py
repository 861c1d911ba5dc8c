"""OpenAI's client with a numballama server: a whole answer, a stream, and log probabilities.

    numballama serve                     # in another terminal
    pip install openai && python examples/openai_client.py

`--url` is the server's address, `--key` its API key.
"""

from __future__ import annotations

import argparse
import sys

import openai


def talk(client: openai.OpenAI) -> None:
    (model,) = [found.id for found in client.models.list()]

    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Tell me of a dog."}], max_tokens=60, seed=1
    )
    print(answer.choices[0].message.content)
    if answer.usage is not None:
        print(f"[{answer.usage.prompt_tokens} tokens read, {answer.usage.completion_tokens} written]\n")

    stream = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=60, temperature=0.7, seed=1, stream=True
    )
    for chunk in stream:
        sys.stdout.write(chunk.choices[0].text)
        sys.stdout.flush()

    sure = client.completions.create(model=model, prompt="Once upon a", max_tokens=1, temperature=0, logprobs=3)
    logprobs = sure.choices[0].logprobs
    print(f"\n\nafter 'Once upon a': {logprobs and logprobs.top_logprobs}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="none")
    arguments = parser.parse_args()
    try:
        with openai.OpenAI(base_url=f"{arguments.url}/v1", api_key=arguments.key) as client:
            talk(client)
    except openai.APIConnectionError:
        raise SystemExit(f"nothing answers at {arguments.url}; start it: numballama serve") from None
    except openai.OpenAIError as error:
        raise SystemExit(f"{arguments.url}: {error}") from None


if __name__ == "__main__":
    main()
