"""Compiles grammars for a trial in processes of their own, which can be ended and may crash.

A few lines of a grammar can take llguidance's compiler hours, or all of its stack. So each new grammar is compiled for
a vocabulary of single bytes first, in a child process with little stack and a limit of time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from typing import IO, TYPE_CHECKING

from ..errors import Error

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILE_S = 2.0
"""Longest time for the trial of a grammar, in seconds."""
START_S = 30.0
"""Longest time until a child process has started."""
PROCESSES = 2
"""Most child processes that are kept, and that run at a time."""
STACK_BYTES = 4 << 20
MEMORY_BYTES = 3 << 30
TRIAL_BYTES = 16
"""Bytes of a text that the child generates, so that a slow grammar shows."""

LEXER_STATES = 30_000
"""Most states of a grammar's automata, which all its texts share: 1 to 2 kB each."""

_CODE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from numballama.structured import checker
checker.serve()
"""


def make_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """llguidance's matcher of a Lark grammar. It does not raise; ask it for `is_error()`."""
    from llguidance import LLMatcher, LLParserLimits

    # as a list of one: text that begins with "{" would be taken for such a list itself
    listed = json.dumps({"grammars": [{"lark_grammar": grammar}]})
    limits = LLParserLimits(verbose_errors=False, max_lexer_states=LEXER_STATES)
    return LLMatcher(tokenizer, listed, log_level=0, limits=limits)


def first_lines(error: str) -> str:
    """The message of llguidance's error, without its excerpt of the grammar and its state."""
    if error.startswith("NoExtension"):
        return "no text fits it"
    message = error.partition("\n<state>")[0].partition("<non-verbose/>")[0]
    return " ".join(re.split(r"\n +\d+ \|", message)[0].split())[:400]


class NotFollowedError(Error):
    """llguidance refuses a grammar. `reason` is what it says."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what} cannot be followed: {reason}")
        self.reason = reason


class Checker:
    """A pool of child processes."""

    def __init__(self) -> None:
        self._idle: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._running = threading.BoundedSemaphore(PROCESSES)
        self._pid = os.getpid()

    def check(self, grammar: str, what: str) -> None:
        """Raise `Error` unless the grammar compiles in time. `what` is what the caller calls it.

        `NotFollowedError`: the compiler says what is wrong.
        """
        with self._running:
            process = self._take()
            done = False
            try:
                answer = self._ask(process, json.dumps(grammar).encode() + b"\n", COMPILE_S)
                done = True
            except TimeoutError:
                raise Error(f"{what} takes longer than {COMPILE_S:g} s to compile: make it simpler") from None
            except (OSError, ValueError):
                raise Error(
                    f"{what} is too large or nested too deeply: its compiler ended ({process.poll()})"
                ) from None
            finally:
                self._give(process, done)
        if answer:
            raise NotFollowedError(what, answer)

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._pid != os.getpid():  # the parent's children
                self._idle, self._pid = [], os.getpid()
            while self._idle:
                process = self._idle.pop()
                if process.poll() is None:
                    return process
                _close(process)
        arguments = [sys.executable, "-I", "-c", _CODE, json.dumps(sys.path)]
        process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            ready = self._ask(process, b"", START_S)
        except (OSError, ValueError, TimeoutError):
            ready = "no answer"
        if ready:
            _close(process)
            raise Error(f"the process that checks grammars does not start: {ready}")
        return process

    def _give(self, process: subprocess.Popen[bytes], usable: bool) -> None:
        if usable:
            with self._lock:
                self._idle.append(process)
        else:
            _close(process)

    @staticmethod
    def _ask(process: subprocess.Popen[bytes], request: bytes, limit_s: float) -> str:
        """Send a line and return the answer. Raises `TimeoutError`; `OSError`, `ValueError` if the child ended."""
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit_s, end)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            answer = process.stdout.readline()
            return str(json.loads(answer))
        except (OSError, ValueError):
            if late.is_set():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        """End the children that wait."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()


# ---- in the child ----


def serve() -> None:
    """Read grammars from standard input, a JSON string a line, and answer each with what is wrong, "" for nothing."""
    _limit()
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(sys.stdin.buffer, sys.stdout.buffer))
    thread.start()
    thread.join()


def _limit() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _serve(source: IO[bytes], sink: IO[bytes]) -> None:
    from llguidance import LLTokenizer

    tokenizer = LLTokenizer("byte")
    _answer(sink, "")
    for line in source:
        try:
            _answer(sink, _try_out(tokenizer, json.loads(line)))
        except Exception as error:
            _answer(sink, f"{error!s:.300}")


def _answer(sink: IO[bytes], text: str) -> None:
    sink.write(json.dumps(text).encode() + b"\n")
    sink.flush()


def _try_out(tokenizer: LLTokenizer, grammar: str) -> str:
    """What is wrong with a grammar; "" for nothing. Generates a few bytes, too."""
    matcher = make_matcher(tokenizer, grammar)
    if matcher.is_error():
        return first_lines(matcher.get_error())
    text = matcher.deep_copy()
    for number in range(TRIAL_BYTES):
        bits = int.from_bytes(text.compute_bitmask(), "little") & ((1 << 256) - 1)
        if text.is_error() or text.is_stopped() or not bits:
            break
        allowed = [byte for byte in range(256) if bits >> byte & 1]
        text.consume_token(allowed[(7 * number) % len(allowed)])
    return first_lines(text.get_error()) if text.is_error() else ""
