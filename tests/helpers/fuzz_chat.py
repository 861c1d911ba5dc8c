"""Random chat templates and request texts: python tests/helpers/fuzz_chat.py CASES [--seed N]

Half of the cases render a template in the sandbox and encode the result: one that is grown from jinja2's grammar, or a
known one with parts cut, moved and exchanged. The messages are of any shape that JSON has, and spell control tokens.
The other half are request texts: prompts with any characters, stop strings, options and their values, as the command
line and a server get them. A case must give ids or a `numballama.Error`, within `SECONDS` of processor time and with
no more memory than `BYTES`. What must hold of ids is asserted. The first case that does otherwise ends the run, and the
same seed makes it again. `tests/unit/chat/test_fuzz.py` runs a sample.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from numballama.chat.builtin_templates import BUILTIN_TEMPLATES
from numballama.chat.encoder import ConversationEncoder, spells_control_tokens
from numballama.cli.args import in_options, template_arguments
from numballama.errors import Error
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.generate import StopStringFilter
from numballama.sampling import SamplingParams
from numballama.tokenizers.base import Tokenizer
from tests.golden.make_templates import OWN, VARIABLES_TEMPLATE
from tests.helpers.bpe import CHAT_CONFIG, save_json, trained
from tests.helpers.fuzz_formats import _status

SECONDS = 4.0
"""Processor time of a case: three renderings of half a second, and what compiling and encoding take."""
BYTES = 200 << 20
HANG = 60
"""Seconds after which a case that does not return is shown and ended."""

SOURCES = [*(source for _, source, _ in BUILTIN_TEMPLATES), *OWN.values(), VARIABLES_TEMPLATE]
NAMES = ("messages", "m", "x", "ns", "loop", "bos_token", "tools", "documents", "add_generation_prompt", "i")
FILTERS = (
    "trim", "upper", "lower", "length", "tojson", "join", "list", "first", "last", "replace('a','b')", "string", "int",
    "safe", "e", "indent", "reverse", "sort", "unique", "map(attribute='role')", "selectattr('role')", "items",
    "dictsort",
    "batch(2)", "slice(3)", "default('d')", "round", "abs", "title", "capitalize", "center(20)", "format(1)", "random",
    "groupby('role')", "sum", "urlencode", "wordcount", "truncate(5)", "min", "max", "tojson(indent=2)", "pprint",
)  # fmt: skip
METHODS = (
    "strip()", "split('<')", "split('>')[-1]", "startswith('<')", "replace('<','')", "upper()", "items()", "keys()",
    "get('role')", "format(1)", "join(['a','b'])", "encode()", "__class__", "append(1)", "pop()", "update()",
    "zfill(9)",
    "rstrip()", "lstrip('<')", "title()", "splitlines()", "partition('|')", "find('|')", "count('|')", "ljust(9,'<')",
    "removeprefix('<|')", "translate({60:91})", "format_map(m)",
)  # fmt: skip
LITERALS = (
    "''", "'a'", "'<|'", "'|>'", "'<|im_end|>'", "'<|im_start|>'", "'\\n'", "' '", "0", "1", "-1", "2", "99999", "1.5",
    "true", "none", "[]", "{}", "[1,2]", "{'a':1}", "'%s'", "'{}'", "'%999d'", "'{:>999}'", "'é'", "range(9)",
    "range(99999)", "namespace(a=1)", "dict(a=1)", "cycler('a')", "joiner(',')", "raise_exception('no')",
    "strftime_now('%Y')", "messages[0]", "messages[-1].content", "messages[0].role", "messages[0].content", "lipsum()",
)  # fmt: skip
TEXTS = (
    "a", " ", "\n", "    ", "<", "|", ">", "im_end", "<|im_end|>", "<|im_start|>", "<|im_", "<think>", "</think>", "é",
    "🙂", "\0", "\ud800", "\ufeff", "\u2028", "\U0001d800", "\u2800", "{{ x }}", "{% if", "system", "user", "assistant",
    '"', "\\", "<|begin_of_text|>", "<|endoftext|>", "/exit", "\x1b[2J", "\u202e", "a\u0301", "\U000e0001", "%s", "%n",
    "word " * 500,
)  # fmt: skip
PRINTED = ("a", " ", "\n", "    ", "<", "|>", "<|im_end|>", "<|im_start|>", "<think>", "é", "im_end", "x " * 500)


@lru_cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(save_json(Path(folder) / "t", trained("llama-bpe", 400), CHAT_CONFIG))


# Templates


def expression(rng: random.Random, depth: int = 3) -> str:
    kind = rng.random()
    if depth == 0 or kind < 0.25:
        return rng.choice(LITERALS if rng.random() < 0.5 else NAMES)
    inner = expression(rng, depth - 1)
    if kind < 0.45:
        return f"{inner} | {rng.choice(FILTERS)}"
    if kind < 0.6:
        return f"({inner}).{rng.choice(METHODS)}"
    if kind < 0.8:
        operator = rng.choice(["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", "in", "and", "or", "is"])
        other = rng.choice(["defined", "string", "none", "mapping"]) if operator == "is" else expression(rng, depth - 1)
        return f"({inner} {operator} {other})"
    if kind < 0.9:
        return f"{inner}[{rng.choice(['0', '-1', '1:', '::-1', '::2', expression(rng, 0)])}]"
    return f"({inner} if {expression(rng, depth - 1)} else {expression(rng, depth - 1)})"


def block(rng: random.Random, depth: int = 3) -> str:
    """A piece of a template."""
    kind = rng.random()
    if depth == 0 or kind < 0.35:
        return rng.choice([f"{{{{ {expression(rng)} }}}}", "{{ messages[0].content }}", rng.choice(PRINTED)])
    body = "".join(block(rng, depth - 1) for _ in range(rng.randrange(3)))
    names = rng.choice(NAMES), expression(rng)
    return rng.choice(
        [
            f"{{% for {names[0]} in {names[1]} %}}{body}{{% endfor %}}",
            f"{{% if {names[1]} %}}{body}{{% else %}}x{{% endif %}}",
            f"{{% set {names[0]} = {names[1]} %}}{body}",
            f"{{% set {names[0]} %}}{body}{{% endset %}}",
            f"{{% macro {names[0]}(x) %}}{body}{{% endmacro %}}{{{{ {names[0]}({names[1]}) }}}}",
            f"{{%- generation -%}}{body}{{% endgeneration %}}",
            f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{body}{{{{ m.content }}}}<|im_end|>{{% endfor %}}",
            f"{{% call(x) {names[0]}({names[1]}) %}}{body}{{% endcall %}}",
            f"{{% for i in [1, 2] %}}{{% break %}}{{# {body} #}}{{% continue %}}{{% endfor %}}",
            f"{{% raw %}}{body}{{% endraw %}}{{% with x = {names[1]} %}}{body}{{% endwith %}}",
        ]
    )


_TOKEN = re.compile(r"\{[{%#]-?|-?[}%#]\}|'[^']*'|\w+|\s+|.", re.DOTALL)


def mutated(rng: random.Random) -> str:
    """A known template with parts cut, doubled, moved, exchanged."""
    parts = _TOKEN.findall(rng.choice(SOURCES))
    for _ in range(rng.choice((1, 1, 2, 4))):
        other = _TOKEN.findall(rng.choice(SOURCES))
        if rng.random() < 0.7:  # what most likely still compiles
            at = rng.choice([n for n, part in enumerate(parts) if part[0] == "'" or part in NAMES] or [0])
            new = [rng.choice([part for part in other if part[0] == "'"] + [f"({expression(rng, 2)})"])]
            parts[at : at + 1] = new if parts[at][0] == "'" else [rng.choice(NAMES)]
            continue
        at = rng.randrange(len(parts) + 1)
        end = at + rng.choice((0, 1, 1, 3, 20))
        start = rng.randrange(len(other))
        parts[at:end] = rng.choice([[], parts[at:end] * 2, other[start : start + 9], [block(rng, 1)]])
        parts = parts or ["x"]
    return "".join(parts)


def text(rng: random.Random) -> str:
    parts = [rng.choice(TEXTS) for _ in range(rng.choice((0, 1, 2, 5, 12)))]
    if rng.random() < 0.2:
        parts += [chr(rng.choice((rng.randrange(0x110000), rng.randrange(0x300)))) for _ in range(rng.randrange(9))]
    return "".join(parts)


def value(rng: random.Random, depth: int = 2) -> Any:
    """What a request's JSON can hold."""
    kind = rng.random()
    if depth and kind < 0.15:
        return {text(rng): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    if depth and kind < 0.3:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind < 0.45:
        return rng.choice([None, True, False, 0, -1, 10**30, 1.5, float("nan"), float("inf"), b"x", (1,), {1}, print])
    return text(rng)


def conversation(rng: random.Random) -> Any:
    if rng.random() < 0.05:
        return value(rng)
    messages = []
    for _ in range(rng.choice((0, 1, 2, 3, 8))):
        message: Any = {"role": rng.choice(["user", "assistant", "system", "tool", text(rng)]), "content": text(rng)}
        if rng.random() < 0.2:
            message[rng.choice(["content", "role", "tool_calls", "name", text(rng)])] = value(rng)
        messages.append(value(rng) if rng.random() < 0.03 else message)
    return messages


# Cases


def examine_template(rng: random.Random) -> str:
    """Render and encode; returns what came of it."""
    source = mutated(rng) if rng.random() < 0.5 else "".join(block(rng) for _ in range(rng.randrange(1, 5)))
    variables = {
        name: value(rng) for name in rng.sample(["tools", "documents", "x", "enable_thinking"], rng.randrange(3))
    }
    try:
        encoder = ConversationEncoder(tokenizer(), source)
    except Error as error:
        return _class("template does not compile", error)
    messages = conversation(rng)
    try:
        random.seed(0)  # the filter `random` draws the same each time
        spans = encoder.render(messages, variables)
        random.seed(0)
        ids = encoder.encode(messages, **variables)
    except Error as error:
        kind = next(
            (k for k in ("refuses", "fails", "messages must", "tool", "Unicode", "deep") if k in str(error)), "other"
        )
        return _class(f"template: {kind}", error)
    rendered = "".join(part for part, _ in spans)
    written = set(tokenizer().special_tokens.values())
    trusted = sum(part.count(token) for part, flag in spans if flag for token in tokenizer().special_tokens)
    random.seed(0)
    if encoder.template.render(messages, **variables) == rendered:  # it prints no address
        assert sum(token in written for token in ids) <= trusted, "a message wrote a control token"
        assert tokenizer().encode_spans(spans) == ids
        assert not rendered or ids
    return "template rendered"


def examine_request(rng: random.Random) -> str:
    """What is done with a prompt, its stop strings, its options."""
    prompt, kind = text(rng), rng.random()
    if kind < 0.5:
        try:
            for special in (False, True):
                ids = tokenizer().encode(prompt, special=special)
                spelled = not special and any(t in tokenizer().special_tokens.values() for t in ids)
                assert not spelled, "control tokens from text"
                decoder, stops = tokenizer().decoder(), StopStringFilter([text(rng) for _ in range(rng.randrange(3))])
                shown = "".join(stops.push(decoder.push(token), decoder.hidden(token)) for token in ids)
                if stops.found is None:
                    whole = shown + stops.push(decoder.flush()) + stops.flush()
                    assert stops.found is not None or whole == tokenizer().decode(ids)
            spells_control_tokens(tokenizer(), prompt)
        except Error as error:
            return _class("prompt", error)
        return "prompt encoded"
    if kind < 0.8:
        names = [*SamplingParams.__dataclass_fields__, "max_new_tokens", "temp", text(rng)]
        try:
            SamplingParams(**{rng.choice(names): value(rng) for _ in range(rng.randrange(3))})
        except Error as error:
            in_options(str(error))
            return _class("options", error)
        return "options accepted"
    try:
        template_arguments(argparse.Namespace(template_arg=[f"{rng.choice(['a', text(rng)])}={prompt}"]))
    except Error as error:
        return _class("--template-arg", error)
    return "--template-arg accepted"


def _class(what: str, error: Error) -> str:
    assert str(error) and "\n" not in str(error)[:200].strip(), f"an error of one line: {error!r}"
    return f"{what} ({type(error).__name__})"


def fuzz(cases: int, seed: int) -> Counter[str]:
    """Run the cases; returns how often each result came. Raises `AssertionError` naming the case for anything else."""
    found: Counter[str] = Counter()
    tokenizer().prepare()
    measured = sys.platform == "linux"
    for case in range(cases):
        if case % 10_000 == 0 and case:
            print(f"  {case:,}", flush=True)
        rng = random.Random(f"{seed} {case}")
        if measured and case % 16 == 0:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            before = _status("VmRSS")[0]
        faulthandler.dump_traceback_later(HANG, exit=True)
        started = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found[examine_template(rng) if case % 2 else examine_request(rng)] += 1
            seconds = time.process_time() - started
            assert seconds <= SECONDS, f"took {seconds:.1f} s"
            if measured and case % 16 == 15:
                grown = _status("VmHWM")[0] - before
                assert grown <= BYTES, f"this or one of the 15 before took {grown:,} bytes of memory"
        except Exception as error:
            raise AssertionError(f"seed {seed}, case {case}: {error!r}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    faulthandler.enable()
    started = time.perf_counter()
    found = fuzz(asked.cases, asked.seed)
    print(f"{asked.cases:,} cases in {time.perf_counter() - started:.0f} s")
    for what, count in found.most_common():
        print(f"  {count:8,}  {what}")


if __name__ == "__main__":
    main()
