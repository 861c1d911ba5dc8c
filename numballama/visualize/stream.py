"""Shows the responses of a stream while they come: in a notebook's cell as HTML, in IPython's terminal as text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .html import escape, frame

if TYPE_CHECKING:
    from ..generate import GenerationResponse

INTERVAL_S = 0.05
"""Least time between two updates of a cell."""


def display_stream(responses: Iterable[GenerationResponse], prompt: str) -> None:
    """Read all responses and show them where IPython runs."""
    from IPython import get_ipython
    from IPython.display import display

    if getattr(get_ipython(), "kernel", None) is None:
        print(prompt, end="")
        for response in responses:
            print(response.text, end="")
            sys.stdout.flush()
        print()
        return
    handle = display({"text/plain": prompt}, raw=True, display_id=True)
    update_cell(responses, prompt, lambda text, page: handle.update({"text/plain": text, "text/html": page}, raw=True))


def update_cell(
    responses: Iterable[GenerationResponse],
    prompt: str,
    update: Callable[[str, str], None],
    interval_s: float = INTERVAL_S,
) -> None:
    """Read all responses. `update` gets the text so far, plain and as HTML: at most every `interval_s` seconds, and at
    the end.

    An error and Ctrl-C leave the text so far in the cell, and are raised again.
    """
    texts: dict[int, str] = {}
    last: dict[int, GenerationResponse] = {}
    count, shown_at, state = 0, float("-inf"), "generating …"
    try:
        for response in responses:
            count += 1
            texts[response.index] = texts.get(response.index, "") + response.text
            last[response.index] = response
            now = time.monotonic()
            if now - shown_at >= interval_s:
                update(_text(prompt, texts), _html(prompt, texts, f"{state} {_tokens(count)}"))
                shown_at = now
        state = "; ".join(map(_ending, last.values())) or "nothing is left to read"
    except BaseException as error:
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}"
        raise
    finally:
        speed = max((response.tokens_per_second for response in last.values()), default=0.0)
        rest = f"; {speed:,.0f} tokens/s" if speed else ""
        state = f"{state}; {_tokens(count)}{rest}"
        update(_text(prompt, texts), _html(prompt, texts, state))


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def _ending(response: GenerationResponse) -> str:
    reason = response.stop_reason
    return f"{response.finish_reason} at {reason!r}" if isinstance(reason, str) else str(response.finish_reason)


def _text(prompt: str, texts: dict[int, str]) -> str:
    return "\n\n".join(prompt + text for _, text in sorted(texts.items()))


def _html(prompt: str, texts: dict[int, str], state: str) -> str:
    opening = f'<span class="muted">{_broken(prompt)}</span>' if prompt else ""
    parts = [f'<div class="text">{opening}{_broken(text)}</div>' for _, text in sorted(texts.items())]
    return frame(f'{"<hr>".join(parts)}<div class="muted">{escape(state)}</div>')


def _broken(text: str) -> str:
    """Text whose lines end where they must, also in a viewer that drops style sheets."""
    return escape(text, lines=True).replace("\n", "<br>")
