"""The errors numballama raises on purpose. Each message says what was expected, what was found and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike


class Error(Exception):
    """Base of every error that numballama raises on purpose."""


class FormatError(Error):
    """A file is damaged, truncated or not what it claims to be.

    Attributes: `path`, `where` (a byte offset or a tensor's name), `expected`, `found`; any may be None.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | PathLike[str] | None = None,
        where: int | str | None = None,
        expected: object = None,
        found: object = None,
    ) -> None:
        self.path, self.where, self.expected, self.found = path, where, expected, found
        parts = [f"{path}: {message}" if path is not None else message]
        if where is not None:
            parts.append(f"at byte {where:,}" if isinstance(where, int) else f"at {where}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if found is not None:
            parts.append(f"found {found}")
        super().__init__("; ".join(parts))


class UnsupportedError(Error):
    """The request is understood, but this version cannot do it; the message lists what it can."""


class DeviceError(Error):
    """The device asked for cannot be used here; the message says what was looked for."""


class ContextError(Error):
    """A prompt does not fit the context, or the KV cache of a context does not fit the memory."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `generate` or `send`. The model can be used again at once.

    Attributes: `text` is the text generated so far. For a list of prompts, `finished` has the texts of those before.
    """

    def __init__(self, text: str, finished: Sequence[str] = ()) -> None:
        super().__init__(f"interrupted after {len(text)} characters")
        self.text, self.finished = text, list(finished)

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, list[str]]]:
        return Interrupted, (self.text, self.finished)  # what copies and other processes make it of


FORKED = (
    "this process was forked from one whose worker threads had started, and they did not survive that; "
    "use multiprocessing's 'spawn' method and compile the model in the child"
)
"""Message of the `DeviceError` in a forked child."""
DOCTOR = "run `numballama doctor` to see what is missing"
NEXT_STEP = f"{DOCTOR}, or use device='cpu'"
"""End of the message of a `DeviceError` for a GPU that is missing or cannot be used."""
CLOSED = "this model is closed; compile it again"
"""Message of the `Error` for a model that is used after `close`."""
COMPILE_AGAIN = "; the model must be compiled again"
"""End of the message of a `DeviceError` after which a model cannot be used."""
NOT_NUMBERS = "the logits are not numbers: the weights may be damaged"
"""Message of the `Error` for logits with a NaN."""
