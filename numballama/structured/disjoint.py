"""Whether schemas have no value in common, so that `oneOf` of them is `anyOf`.

llguidance does not look behind `$ref`, nor at which names a closed object may have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from .rewrite import KINDS, size_of

MAX_OPTIONS = 64
"""Most options of a `oneOf` that are compared with each other."""
MAX_PARTS = 32
"""Most schemas behind `$ref` and `allOf` that are read for one."""
MAX_READ = 200_000
"""Most properties, and values in constants, that are read for all `oneOf`s of a schema; the rest stays as it is."""
MAX_LEVELS = 3
"""Most levels of properties in properties that are compared."""


SIZES = {"string": ("minLength", "maxLength"), "array": ("minItems", "maxItems"), "number": ("minimum", "maximum")}
"""Type → the keywords of its least and greatest size, or value."""
FORMATS = frozenset({"date", "time", "date-time", "duration", "email", "ipv4", "ipv6", "uuid"})
"""Formats of which no text has two."""


@dataclass(frozen=True)
class _Range:
    """Where a size or a number lies. `open_low`, `open_high`: not at that end itself."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __and__(self, other: _Range) -> _Range:
        low = max((self.low, self.open_low), (other.low, other.open_low))
        high = min((self.high, not self.open_high), (other.high, not other.open_high))
        return _Range(low[0], high[0], low[1], not high[1])

    @property
    def is_empty(self) -> bool:
        return self.low > self.high or (self.low == self.high and (self.open_low or self.open_high))


@dataclass
class _Facts:
    """What a value of a schema is known to have. There may be more."""

    kinds: set[str] = field(default_factory=lambda: set(KINDS))
    constants: set[str] | None = None
    """JSON of the values that are possible; None: any."""
    required: set[str] = field(default_factory=set)
    properties: dict[str, list[Any]] = field(default_factory=dict)
    """Name → schemas that its value must fit if it is there."""
    names: set[str] | None = None
    """Names of the properties that are possible; None: any."""
    ranges: dict[str, _Range] = field(default_factory=lambda: dict.fromkeys(SIZES, _Range()))
    formats: set[str] = field(default_factory=set)
    first: list[Any] = field(default_factory=list)
    """Schemas that the first element of an array must fit if it has one."""


class Options:
    """Compares options of the `oneOf`s in `root`, a checked schema. All comparisons together have a limit."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._left = MAX_READ

    def never_two(self, options: Sequence[Any], beside: Mapping[str, Any]) -> bool:
        """Whether no value fits two of the options. False: that is not known.

        `beside` is the schema whose `oneOf` they are, so a value fits it too.
        """
        if len(options) > MAX_OPTIONS:
            return False
        facts = [self._facts([option, beside]) for option in options]
        return all(self._differ(one, other, MAX_LEVELS) for one, other in combinations(facts, 2))

    def _differ(self, one: _Facts, other: _Facts, levels: int) -> bool:
        """Whether no value is as both say."""
        kinds = one.kinds & other.kinds
        if not kinds:
            return True
        if one.constants is not None and other.constants is not None and not one.constants & other.constants:
            return True
        return all(self._differ_as(kind, one, other, levels) for kind in kinds)

    def _differ_as(self, kind: str, one: _Facts, other: _Facts, levels: int) -> bool:
        """Whether no value of this type is as both say."""
        if kind == "object":
            return self._differ_as_objects(one, other, levels)
        if kind not in SIZES:
            return False
        both = one.ranges[kind] & other.ranges[kind]
        if both.is_empty or (kind == "string" and len((one.formats | other.formats) & FORMATS) > 1):
            return True
        if kind == "array" and both.low >= 1 and levels and self._left >= 0:
            return self._differ(self._facts(one.first), self._facts(other.first), levels - 1)
        return False

    def _differ_as_objects(self, one: _Facts, other: _Facts, levels: int) -> bool:
        needed = one.required | other.required
        self._left -= len(needed) + 1
        for names in (one.names, other.names):
            if names is not None and not needed <= names:
                return True
        for name in sorted(needed & one.properties.keys() & other.properties.keys()) if levels else ():
            if self._left < 0:
                return False
            first, second = self._facts(one.properties[name]), self._facts(other.properties[name])
            if self._differ(first, second, levels - 1):
                return True
        return False

    def _facts(self, schemas: Sequence[Any]) -> _Facts:
        """What values that fit all of some schemas have."""
        found = _Facts()
        for part in self._parts(schemas):
            if part is False:
                found.kinds = set()
            if not isinstance(part, Mapping) or "$ref" in part:
                continue  # drafts differ in whether what stands beside $ref counts
            properties, required = part.get("properties", {}), part.get("required", ())
            values = part["enum"] if "enum" in part else [part["const"]] if "const" in part else None
            self._left -= 1 + len(properties) + len(required) + size_of(values or [], MAX_READ)
            if "type" in part:
                names = [part["type"]] if isinstance(part["type"], str) else part["type"]
                found.kinds &= {"number" if name == "integer" else name for name in names}
            if values is not None:
                constants = {json.dumps(_plain(value), sort_keys=True) for value in values}
                found.constants = constants if found.constants is None else found.constants & constants
                found.kinds &= {_kind(value) for value in values}
            found.required |= set(required)
            for name, schema in properties.items():
                found.properties.setdefault(name, []).append(schema)
            for kind, (least, most) in SIZES.items():
                found.ranges[kind] &= _range(part, least, most)
            if isinstance(part.get("format"), str):
                found.formats.add(part["format"])
            found.first += _first(part)
            if part.get("additionalProperties") is False and "patternProperties" not in part:
                found.names = set(properties) if found.names is None else found.names & set(properties)
        return found

    def _parts(self, schemas: Sequence[Any]) -> Iterator[Any]:
        """The schemas, and those that they name with `$ref` and `allOf`, as far as the limits allow."""
        waiting, seen = list(schemas), set[str]()
        for _ in range(MAX_PARTS):
            if not waiting or self._left < 0:
                return
            part = waiting.pop()
            yield part
            if isinstance(part, Mapping) and (ref := part.get("$ref")) is not None:
                if ref not in seen:
                    seen.add(ref)
                    waiting.append(_target(self._root, ref))
            elif isinstance(part, Mapping):
                waiting.extend(part.get("allOf", ())[:MAX_PARTS])


def _range(schema: Mapping[str, Any], least: str, most: str) -> _Range:
    """The range of a pair of keywords. "exclusiveMinimum" is a number, or in draft 4 says how "minimum" is meant."""
    found = _Range(_number(schema.get(least), -math.inf), _number(schema.get(most), math.inf))
    if least != "minimum":
        return found
    low, high = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    found = _Range(found.low, found.high, low is True, high is True)
    low, high = _number(low, -math.inf), _number(high, math.inf)
    return found & _Range(low, high, low > -math.inf, high < math.inf)


def _number(value: object, default: float) -> float:
    """A number, exactly or rounded as a double; `default` for what is none."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def _first(schema: Mapping[str, Any]) -> list[Any]:
    """The schema of an array's first element, if there is one."""
    items, listed = schema.get("items"), schema.get("prefixItems")
    if isinstance(items, list):
        listed = items
    if isinstance(listed, list) and listed:
        return [listed[0]]
    return [items] if isinstance(items, Mapping | bool) else []


def _target(root: Mapping[str, Any], ref: str) -> Any:
    value: Any = root
    for name in ref.split("/")[1:]:
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return True  # nothing is known of it
    return value


def _plain(value: Any) -> Any:
    """A value in which equal numbers are the same: JSON has 1.0 = 1."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return {name: _plain(each) for name, each in value.items()} if isinstance(value, Mapping) else value


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, Mapping) else "number" if isinstance(value, int | float) else "array"
