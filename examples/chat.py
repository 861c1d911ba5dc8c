"""Talk with a model: each turn reads only what is new, and says how much that was.

python examples/chat.py SmolLM2-135M-Instruct.Q4_1.gguf "You are a pirate."
"""

import sys

import numballama


def main() -> None:
    model_path, system = [*sys.argv[1:], None, None][:2]
    with numballama.compile(model_path) as model:
        chat = model.chat(system)
        print("> ", end="", file=sys.stderr, flush=True)
        for line in sys.stdin:
            try:
                for response in chat.stream(line.rstrip("\n")):
                    print(response.text, end="", flush=True)
            except KeyboardInterrupt:  # the answer ends here and stays in the conversation
                pass
            except numballama.ContextError as error:
                print(error, file=sys.stderr)
                chat.reset()
            if chat.turn:
                figures = f"[{chat.turn.prefilled_tokens} tokens read, {chat.turn.reused_tokens} from the cache]"
                print(f"\n{figures}", file=sys.stderr)
            print("> ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
