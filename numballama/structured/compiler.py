"""From `SamplingParams` to the engine's `Constraint`: checks, compiles and keeps grammars."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ..engine.sequence import Constraint
from ..errors import Error, UnsupportedError
from ..sampling import SamplingParams
from ..tokenizers.base import Tokenizer
from .blame import place_of
from .checker import Checker, NotFollowedError
from .constraint import COPIES, Grammar, GrammarConstraint, MaskBlocks
from .forced import ForcedTokens
from .lark import MAX_GRAMMAR, check_grammar, regex_grammar, schema_grammar, to_lark
from .schema import check_schema
from .vocabulary import INSTALL, VocabularyView, make_tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_GRAMMARS = 256
"""Compiled grammars that are kept for a tokenizer; the least recently used one goes first."""
MAX_USES = 1000
"""Texts after which a grammar is compiled anew, because its automata grow."""
DEEP_STACK = 64 << 20
"""Stack of the threads that compile, in bytes: 16 times that of the trial."""

T = TypeVar("T")


def compile_constraint(
    params: SamplingParams,
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    stop_token_ids: Collection[int] | None = None,
) -> Callable[[], Constraint] | None:
    """What makes the constraints that `params` ask for, one for each text: `Engine.submit(constraint=…)`. None: none.

    `vocab_size` is the model's number of logits (default: the tokenizer's tokens), `stop_token_ids` are all tokens that
    end the text (default: the tokenizer's, and those of `params`).

    Takes 2 to 20 ms for a usual grammar and at most some seconds; the first one of a tokenizer takes longer, about
    1.5 s for 128,000 tokens. Compiled grammars are kept, so calling it again costs microseconds. May be called from any
    thread, but not from an event loop's.

    Raises `Error` for a grammar that is invalid, too large, too slow or not enforced as a whole; `UnsupportedError`
    without llguidance.
    """
    source = next((n for n in ("json_schema", "regex", "grammar") if getattr(params, n) is not None), None)
    if source is None:
        return None
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise UnsupportedError(f"{source}: {INSTALL}") from None
    if stop_token_ids is None:
        stop_token_ids = tokenizer.eog_ids | frozenset(params.stop_token_ids)
    compiler = _compiler_of(tokenizer)
    texts = _sources(source, getattr(params, source))
    try:
        grammar = compiler.compile(*texts, source)
    except NotFollowedError as error:
        if source != "json_schema":
            raise
        raise place_of(error, check_schema(params.json_schema), _checker.check) from None
    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    forced = compiler.forced if params.logprobs is None else None  # a token that is not sampled has none
    return partial(GrammarConstraint, grammar, compiler.blocks, size, stop_token_ids, compiler.special, forced)


def _sources(source: str, value: object) -> tuple[str, str]:
    """(Lark grammar, the same for a vocabulary of bytes) of a field of `SamplingParams`."""
    if source == "json_schema":
        text = schema_grammar(check_schema(value))
        return text, text
    assert isinstance(value, str)
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise Error(f"{source} is not valid Unicode: character {error.start} is a lone surrogate") from None
    if size > MAX_GRAMMAR:
        raise Error(f"{source} has {size:,} bytes; the limit is {MAX_GRAMMAR:,}")
    if source == "regex":
        text = regex_grammar(value)
        return text, text
    return check_grammar(to_lark(value))


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps them. Its methods may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        view = VocabularyView(tokenizer)
        self._vocabulary: LLTokenizer = make_tokenizer(view)
        self.forced = ForcedTokens(view)
        self.blocks = MaskBlocks(-(-self._vocabulary.vocab_size // 32))
        self.special = frozenset(tokenizer.special_tokens.values())
        self._kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, text: str, trial: str, what: str) -> Grammar:
        """The compiled grammar of a Lark text. `trial` is the text for the trial, `what` its name in messages."""
        key = what, text
        with self._lock:
            grammar = self._kept.pop(key, None)
            if grammar is not None and (grammar.failed or grammar.uses >= MAX_USES):
                tried, grammar = not grammar.failed, None
            else:
                tried = False
            if grammar is not None:
                self._kept[key] = grammar
                grammar.uses += 1
        if grammar is not None:
            if grammar.uses < COPIES:
                _with_deep_stack(grammar.add_copy)
            return grammar
        if not tried:
            _checker.check(trial, what)
        forces = text == trial  # no special token is named, so bytes can spell all of its texts
        grammar = _with_deep_stack(lambda: Grammar(self._vocabulary, text, what, forces))
        with self._lock:
            self._kept[key] = grammar
            while len(self._kept) > MAX_GRAMMARS:
                self._kept.popitem(last=False)
        return grammar


_checker = Checker()
_compilers: weakref.WeakKeyDictionary[Tokenizer, GrammarCompiler] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_stack_lock = threading.Lock()


def _forked() -> None:
    """In a forked child: threads that held a lock, or were checking a grammar, do not exist in it."""
    global _checker, _compilers, _lock, _stack_lock
    _checker, _compilers = Checker(), weakref.WeakKeyDictionary()
    _lock, _stack_lock = threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _compiler_of(tokenizer: Tokenizer) -> GrammarCompiler:
    with _lock:  # the second who wants it waits
        if (found := _compilers.get(tokenizer)) is None:
            found = _compilers[tokenizer] = GrammarCompiler(tokenizer)
        return found


def _with_deep_stack(function: Callable[[], T]) -> T:
    """Call a function in a thread with a large stack."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    with _stack_lock:
        before = threading.stack_size(DEEP_STACK)
        try:
            thread = threading.Thread(target=run, name="numballama grammar")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
