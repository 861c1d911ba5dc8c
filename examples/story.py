"""Tell a story, printing each piece of text as soon as it is there.

python examples/story.py "Once upon a time"                      (the model inside the package)
python examples/story.py "Once upon a time" stories15M.bin tokenizer.model
"""

import sys

import numballama


def main() -> None:
    opening, model_path, tokenizer = [*sys.argv[1:], None, None, None][:3]
    with numballama.compile(model_path, tokenizer=tokenizer) as model:
        print(opening or "", end="")
        response = None
        for response in model.stream(opening, temperature=0.8, max_tokens=400):
            print(response.text, end="", flush=True)
        print()
        if response is not None:
            print(f"[{response.finish_reason}; {response.tokens_per_second:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    main()
