"""jinja2's sandbox with a budget: a template that nobody vouches for ends soon and stays small.

jinja2's own sandbox keeps a template from the program around it, but lets it run for ever and fill the memory. Here no
value heavier than a budget comes into being, and time is looked at wherever a template can repeat something:

* what makes values (literals, operators, calls, filters) is weighed, by its parts before and by its result after;
* a loop runs over a list made beforehand, a step at a time, and what a template prints is counted;
* methods and filters whose result can be the product of two inputs are refused when that product is too large.
"""

from __future__ import annotations

import functools
import json
import re
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 0.5
"""Processor time of a rendering. Real templates take a thousandth of that."""
WEIGHT, PRODUCT = 1 << 22, 1 << 23
"""Characters, about, that a value may hold; and that a method may make of two inputs. Both grow with the messages."""
CONTAINER = 16
"""What an item of a list or mapping weighs, besides its own weight."""

_WIDE = re.compile(r"%(\([^()]*\))?[-+ #0]*\d*\.?(\*|\d{3})")
"""A %-field of 100 characters and more, or of as many as an argument says."""
_WITHOUT_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters whose time grows faster than their input, and that no chat template uses."""


class Budget:
    """What one rendering may still use."""

    def __init__(self, inputs: int = 0) -> None:
        self.weight, self.product = max(WEIGHT, 8 * inputs), max(PRODUCT, 64 * inputs)
        self._output, self._values = self.weight, 8 * self.weight
        self._deadline = time.thread_time() + SECONDS

    def check(self) -> None:
        """Raise `SecurityError` once the time is over."""
        if time.thread_time() > self._deadline:
            raise SecurityError(f"it takes longer than {SECONDS:g} s")

    def write(self, characters: int) -> None:
        self._output -= characters
        if self._output < 0:
            raise SecurityError("it writes too much")

    def weigh(self, value: Any) -> Any:
        """`value`, new, if it is not too heavy."""
        if weight_of(value, self.weight) > self.weight:
            raise SecurityError(f"it makes a value of more than {self.weight:,} characters")
        self._values -= CONTAINER * len(value) if isinstance(value, list | tuple | dict) else _length(value)
        if self._values < 0:
            raise SecurityError("it makes too many values")
        return value


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else 0


def weight_of(value: Any, most: int) -> int:
    """Characters in a value and all that it holds, each item counted wherever it stands; stops beyond `most`."""
    total, rest = 0, [value]
    while rest and total <= most:
        item = rest.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, Mapping):
            total += CONTAINER * len(item)
            rest += [*item.keys(), *item.values()] if total <= most else []
        elif isinstance(item, list | tuple | set | frozenset):
            total += CONTAINER * len(item)
            rest += item if total <= most else []
        elif isinstance(item, Namespace):
            total += CONTAINER
            rest.append(object.__getattribute__(item, "_Namespace__attrs"))
        elif isinstance(item, int):
            total += item.bit_length() // 8 if item.bit_length() <= 64 else most + 1
        elif isinstance(item, Sized):  # a range, a mapping's views
            total += CONTAINER * len(item)
    return total


class _Steps(list[Any]):
    """What a loop runs over, looking at the budget at every step."""

    def __init__(self, items: Iterable[Any], budget: Budget, printed: int) -> None:
        super().__init__(items)
        self._budget, self._printed = budget, printed

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self._budget.check()
            self._budget.write(self._printed)
            yield item


class _Guarded(NodeTransformer):
    """Sends what a template makes and repeats through the environment's private filters."""

    def _filter(self, node: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise jinja2.TemplateSyntaxError("recursive loops are not supported", node.lineno)
        printed = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
        printed += sum(len(part.data) for part in node.body if isinstance(part, nodes.TemplateData))
        self.generic_visit(node)
        node.iter = self._filter(node.iter, _EACH, nodes.Const(printed, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._filter(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def _literal(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._filter(node, _WEIGH)

    visit_List = visit_Tuple = visit_Dict = _literal  # noqa: N815  (jinja2's names)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return self._filter(node, _WEIGH) if isinstance(node.arg, nodes.Slice) else node

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("filter blocks are not supported", node.lineno)


_EACH, _CONCAT, _WEIGH = "numballama each", "numballama concat", "numballama weigh"  # no template can spell these


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks for training what an assistant says, and prints it."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template; `budget` is that of the rendering under way."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        self.budget = Budget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=self._finalize,
            optimized=False,
        )
        del self.globals["lipsum"]
        for name in _WITHOUT_FILTERS:
            del self.filters[name]
        self.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        self.filters["tojson"] = _to_json
        self.filters = {name: self._guard(name, function) for name, function in self.filters.items()}
        self.filters |= {_EACH: self._each, _CONCAT: self._concat, _WEIGH: self._weigh}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Guarded().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    # What the generated code calls

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.budget.check()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes):
            __self._require_product([owner, *args, *kwargs.values()])
        made = __self._made(super().call(__context, __obj, *args, **kwargs))
        if isinstance(__obj, Macro):  # a call block prints what it makes as it is
            __self.budget.write(len(made))
        return made

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.check()
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            self._require_product([left, right])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and abs(right) > 64:
            raise SecurityError("it raises a number to a power above 64")
        elif operator == "%" and isinstance(left, str):
            _require_narrow(left, _WIDE.search(left) is not None)
        return self.budget.weigh(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)  # None but for the methods that format
        if wrapped is not None:
            specs = [spec or "" for _, _, spec, _ in string.Formatter().parse(value.__self__)]
            _require_narrow(value.__self__, any("{" in spec or re.search(r"\d{3}", spec) for spec in specs))
        return wrapped

    def _finalize(self, value: Any) -> Any:
        self.budget.check()
        self.budget.write(weight_of(value, self.budget.weight))
        return value

    def _each(self, items: Iterable[Any], printed: int) -> list[Any]:
        made = items if isinstance(items, list | tuple) else self._made(iter(items))
        return _Steps(made, self.budget, printed)

    def _concat(self, parts: list[Any]) -> str:
        self.budget.check()
        return self._made("".join(map(str, self.budget.weigh(parts))))

    def _weigh(self, value: Any) -> Any:
        self.budget.check()
        return self.budget.weigh(value)

    def _guard(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is charged for. A generator that it returns becomes a list, as far as the budget goes."""

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.check()
            if name == "format":
                _require_narrow(str(args[0]), _WIDE.search(str(args[0])) is not None)
            if name == "sum" and not isinstance(kwargs.get("start", args[3] if len(args) > 3 else 0), int | float):
                raise SecurityError("it sums what are no numbers")
            self._require_product([*args, *kwargs.values()])
            return self._made(function(*args, **kwargs))

        return guarded

    # What they have in common

    def _made(self, value: Any) -> Any:
        if not isinstance(value, Iterator):
            return self.budget.weigh(value)
        found: list[Any] = []
        left = self.budget.weight
        for item in value:
            self.budget.check()
            found.append(item)
            if (left := left - CONTAINER - weight_of(item, left)) < 0:
                raise SecurityError(f"it makes a value of more than {self.budget.weight:,} characters")
        return found

    def _require_product(self, inputs: list[Any]) -> None:
        """Refuse inputs the heaviest two of which could make too much of each other. A number weighs itself."""
        weights = [
            abs(int(item))
            if isinstance(item, int | float) and abs(item) < 1e18
            else weight_of(item, self.budget.weight)
            for item in inputs
            if isinstance(item, Sized | int | float) and not isinstance(item, Context)
        ]
        largest = sorted(weights)[-2:]
        if len(largest) == 2 and largest[0] * largest[1] > self.budget.product:
            raise SecurityError(f"it may make a value of {largest[0] * largest[1]:,} characters")


def _require_narrow(form: str, wide: bool) -> None:
    if wide:
        raise SecurityError(f"its format {form[:40]!r} asks for a wide field")


class Refusal(jinja2.TemplateError):
    """The template itself refuses the messages."""


def _raise(message: str) -> None:
    raise Refusal(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: without HTML's escapes, which jinja2's own would write."""
    if isinstance(value, Undefined):
        raise jinja2.UndefinedError("a value that is written as JSON is undefined")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
