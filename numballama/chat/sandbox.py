"""jinja2's sandbox with limits on time and memory, because a chat template is a program from a downloaded file.

jinja2's own `ImmutableSandboxedEnvironment` keeps a template away from Python's internals, from files and from the
program's objects. It does not stop a template that runs forever or fills the memory, and a server that loads a hostile
model file must survive it. So `Budget` limits processor time, output, the size of a value and the size of all values
together. The limits are checked where a template can repeat or enlarge something:

* literals, slices, operators, calls and filters: the size of the result, and of the inputs where a result can be as
  large as the product of two of them (`"x" * n`, `replace`, `join`, `indent`);
* loops: at each step. They run over a list that is made and checked beforehand;
* output: at each print, and for the constant text of a loop's body at each step.

Not limited: the time of a single call into jinja2 or Python. Calls that are slow for their size are refused instead
(`_REMOVED_FILTERS`, wide format fields, large powers). docs/sandbox.md says what this means for a user.

This uses these internals of jinja2, which a later version may change (hence `jinja2>=3.1.6,<4`; 3.1.6 closed the last
known way out of its sandbox):

* `Environment._parse`, overridden to rewrite the syntax tree (`_InsertChecks`) before code is generated from it;
* the filters' calling convention, when `nodes.Filter` nodes call the checks under names that no template can spell;
* `Environment.call`, `call_binop`, `wrap_str_format` and `finalize`, which generated code calls;
* `Namespace._Namespace__attrs`, where a `namespace()` keeps its values.
"""

from __future__ import annotations

import functools
import json
import re
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from datetime import datetime
from types import MappingProxyType
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
"""Limit of the processor time of one rendering. Real templates take about a thousandth of it. Grows with the messages.
"""
SECONDS_PER_SIZE = 2e-6
"""What the limit grows by, for each character of the messages and `ITEM_SIZE` of each of their parts."""
MAX_SIZE = 1 << 22
"""Limit of the size of a value, roughly in characters (see `size_of`). Grows with the messages."""
MAX_PRODUCT = 1 << 23
"""Limit of the product of the sizes of a call's two largest inputs. Grows with the messages."""
ITEM_SIZE = 16
"""Size of an item of a list or mapping, besides the size of its value."""

_WIDE_FIELD = re.compile(r"%(\([^()]*\))?[-+ #0]*\d*\.?(\*|\d{3})")
"""A %-format field of 100 or more characters, or whose width is an argument."""
_REMOVED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters whose time grows faster than their input. No known chat template uses them."""


class Budget:
    """Time and memory that one rendering may still use. `inputs` are the messages and other variables.

    Templates ask for the number of messages at every message, so the sizes of the lists and mappings in `inputs` are
    computed once; a template cannot change these. Every other method raises `SecurityError` when a limit is exceeded.
    """

    def __init__(self, *inputs: object) -> None:
        self._inputs = inputs  # keeps alive what `_known` has the ids of
        self._known: dict[int, int] = {}
        size = sum(_measure(each, self._known) for each in inputs)
        self.max_size, self.max_product = max(MAX_SIZE, 8 * size), max(MAX_PRODUCT, 64 * size)
        self._output_left, self._values_left = self.max_size, 8 * self.max_size
        self._seconds = SECONDS + SECONDS_PER_SIZE * size
        self._earliest = time.perf_counter() + self._seconds
        self._deadline = time.thread_time() + self._seconds

    def size_of(self, value: Any, limit: int) -> int:
        """`size_of`, which is quick for the inputs."""
        return size_of(value, limit, self._known)

    def check_time(self) -> None:
        # a thread's time never runs faster than the clock, which costs a twentieth to read
        if time.perf_counter() > self._earliest and time.thread_time() > self._deadline:
            raise SecurityError(f"it takes longer than {self._seconds:.2g} s")

    def write(self, characters: int) -> None:
        """Count output."""
        self._output_left -= characters
        if self._output_left < 0:
            raise SecurityError("it writes too much")

    def check_value(self, value: Any) -> Any:
        """Check and count a new value; returns it."""
        if self.size_of(value, self.max_size) > self.max_size:
            raise SecurityError(f"it makes a value of more than {self.max_size:,} characters")
        self._values_left -= ITEM_SIZE * len(value) if isinstance(value, list | tuple | dict) else _length(value)
        if self._values_left < 0:
            raise SecurityError("it makes too many values")
        return value


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else 0


def _measure(value: object, known: dict[int, int]) -> int:
    """`size_of` of an input, which also enters the sizes of all lists and mappings in it into `known`, by id."""
    if isinstance(value, str):
        return len(value)
    if value is None or not isinstance(value, dict | list | tuple | Mapping):
        return size_of(value, 1 << 40)
    parts = (*value.keys(), *value.values()) if isinstance(value, Mapping) else value
    size = known[id(value)] = ITEM_SIZE * len(value) + sum(_measure(part, known) for part in parts)
    return size


def size_of(value: Any, limit: int, known: Mapping[int, int] = MappingProxyType({})) -> int:
    """Characters in a value and in all it contains, plus `ITEM_SIZE` per item. Stops counting above `limit`.

    An object that is contained twice counts twice. `known` has the sizes of some lists and mappings by their ids.
    """
    if isinstance(value, str):
        return len(value)
    total, rest = 0, [value]
    while rest and total <= limit:
        item = rest.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif (size := known.get(id(item))) is not None:
            total += size
        elif isinstance(item, Mapping):
            total += ITEM_SIZE * len(item)
            rest += [*item.keys(), *item.values()] if total <= limit else []
        elif isinstance(item, list | tuple | set | frozenset):
            total += ITEM_SIZE * len(item)
            rest += item if total <= limit else []
        elif isinstance(item, Namespace):
            total += ITEM_SIZE
            rest.append(object.__getattribute__(item, "_Namespace__attrs"))
        elif isinstance(item, int):
            total += item.bit_length() // 8 if item.bit_length() <= 64 else limit + 1
        elif isinstance(item, Sized):  # a range, the views of a mapping
            total += ITEM_SIZE * len(item)
    return total


class _CheckedList(list[Any]):
    """The list that a loop runs over. Checks the budget at each step; `printed` is the loop's constant text."""

    def __init__(self, items: Iterable[Any], budget: Budget, printed: int) -> None:
        super().__init__(items)
        self._budget, self._printed = budget, printed

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self._budget.check_time()
            self._budget.write(self._printed)
            yield item


class _InsertChecks(NodeTransformer):
    """Wraps expressions that enlarge or repeat a value in calls of the environment's private filters."""

    def __init__(self) -> None:
        self._blocks = 0

    def _filter(self, node: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise jinja2.TemplateSyntaxError("recursive loops are not supported", node.lineno)
        printed = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
        printed += sum(len(part.data) for part in node.body if isinstance(part, nodes.TemplateData))
        self.generic_visit(node)
        node.iter = self._filter(node.iter, _LOOP, nodes.Const(printed, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._filter(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def _literal(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._filter(node, _CHECK)

    visit_List = visit_Tuple = visit_Dict = _literal  # noqa: N815  (jinja2's names)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return self._filter(node, _CHECK) if isinstance(node.arg, nodes.Slice) else node

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> list[nodes.Node]:
        """A variable for the block's text, and the filters' result of it: the same, in parts that are checked."""
        self.generic_visit(node)
        self._blocks += 1
        name, innermost = f"numballama_block_{self._blocks}", node.filter
        while isinstance(innermost.node, nodes.Filter):
            innermost = innermost.node
        innermost.node = nodes.Name(name, "load", lineno=node.lineno)
        text = nodes.AssignBlock(nodes.Name(name, "store", lineno=node.lineno), None, node.body, lineno=node.lineno)
        return [text, nodes.Output([node.filter], lineno=node.lineno)]


_LOOP, _CONCAT, _CHECK = "numballama loop", "numballama concat", "numballama check"
"""Names of the private filters. A filter's name in a template has no spaces."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: prints its body. Training uses it to find what an assistant wrote."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. `budget` is the budget of the current rendering."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        self.budget = Budget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=self._finalize,
            optimized=False,  # constant folding would compute before a budget applies
        )
        del self.globals["lipsum"]
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        self.filters["tojson"] = _to_json
        self.filters = {name: self._checked_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {_LOOP: self._loop, _CONCAT: self._concat, _CHECK: self._check}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _InsertChecks().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    # Called by the generated code

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.budget.check_time()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes):
            __self._require_product([owner, *args, *kwargs.values()])
        result = __self._checked(super().call(__context, __obj, *args, **kwargs))
        if isinstance(__obj, Macro):  # a call block prints the result without `finalize`
            __self.budget.write(len(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.check_time()
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            self._require_product([left, right])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and abs(right) > 64:
            raise SecurityError("it raises a number to a power above 64")
        elif operator == "%" and isinstance(left, str):
            _require_narrow(left, _WIDE_FIELD.search(left) is not None)
        return self.budget.check_value(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)  # None unless `value` is str.format or format_map
        if wrapped is not None:
            specs = [spec or "" for _, _, spec, _ in string.Formatter().parse(value.__self__)]
            _require_narrow(value.__self__, any("{" in spec or re.search(r"\d{3}", spec) for spec in specs))
        return wrapped

    def _finalize(self, value: Any) -> Any:
        """Count a value that is printed."""
        self.budget.check_time()
        self.budget.write(self.budget.size_of(value, self.budget.max_size))
        return value

    def _loop(self, items: Iterable[Any], printed: int) -> list[Any]:
        checked = items if isinstance(items, list | tuple) else self._checked(iter(items))
        return _CheckedList(checked, self.budget, printed)

    def _concat(self, parts: list[Any]) -> str:
        self.budget.check_time()
        return self._checked("".join(map(str, self.budget.check_value(parts))))

    def _check(self, value: Any) -> Any:
        self.budget.check_time()
        return self.budget.check_value(value)

    def _checked_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter with checks of its inputs and its result. If it returns a generator, the result is a list."""

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.budget.check_time()
            if name == "format":
                _require_narrow(str(args[0]), _WIDE_FIELD.search(str(args[0])) is not None)
            if name == "sum" and not isinstance(kwargs.get("start", args[3] if len(args) > 3 else 0), int | float):
                raise SecurityError("it sums values that are not numbers")
            self._require_product([*args, *kwargs.values()])
            return self._checked(function(*args, **kwargs))

        return checked

    # Checks of values

    def _checked(self, value: Any) -> Any:
        """`value`, checked. An iterator becomes a list; reading it stops when the budget is exceeded."""
        if not isinstance(value, Iterator):
            return self.budget.check_value(value)
        items: list[Any] = []
        left = self.budget.max_size
        for item in value:
            self.budget.check_time()
            items.append(item)
            if (left := left - ITEM_SIZE - self.budget.size_of(item, left)) < 0:
                raise SecurityError(f"it makes a value of more than {self.budget.max_size:,} characters")
        return items

    def _require_product(self, inputs: list[Any]) -> None:
        """Refuse inputs if the product of their two largest sizes is too large. The size of a number is its value."""
        sizes = [
            abs(int(item))
            if isinstance(item, int | float) and abs(item) < 1e18
            else self.budget.size_of(item, self.budget.max_size)
            for item in inputs
            if isinstance(item, Sized | int | float) and not isinstance(item, Context)
        ]
        largest = sorted(sizes)[-2:]
        if len(largest) == 2 and largest[0] * largest[1] > self.budget.max_product:
            raise SecurityError(f"it may make a value of {largest[0] * largest[1]:,} characters")


def _require_narrow(form: str, wide: bool) -> None:
    if wide:
        raise SecurityError(f"its format {form[:40]!r} asks for a wide field")


class Refusal(jinja2.TemplateError):
    """The template called `raise_exception`: it refuses the messages."""


def _raise(message: str) -> None:
    raise Refusal(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson` as in transformers: without the HTML escapes of jinja2's own."""
    if isinstance(value, Undefined):
        raise jinja2.UndefinedError("a value that is written as JSON is undefined")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
