"""Tell a story, printing each piece of text as soon as it is there.

python examples/story.py stories15M.bin tokenizer.model "Once upon a time"
"""

import sys

import numballama


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    model_path, tokenizer, *opening = sys.argv[1:]
    prompt = " ".join(opening) or None
    with numballama.compile(model_path, tokenizer=tokenizer) as model:
        print(prompt or "", end="")
        piece = None
        for piece in model.stream(prompt, temperature=0.8, max_tokens=256):
            print(piece.text, end="", flush=True)
        print()
        if piece is not None:
            print(f"[{piece.finish_reason}; {piece.tokens_per_second:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    main()
