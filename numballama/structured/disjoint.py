"""Whether schemas have no value in common, so that `oneOf` of them is `anyOf`.

llguidance does not look behind `$ref`, nor at which names a closed object may have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from .rewrite import KINDS

MAX_OPTIONS = 64
"""Most options of a `oneOf` that are compared with each other."""
MAX_PARTS = 32
"""Most schemas behind `$ref` and `allOf` that are read for one."""
MAX_READ = 200_000
"""Most properties and constants that are read for all `oneOf`s of a schema; the rest stays as it is."""
MAX_LEVELS = 3
"""Most levels of properties in properties that are compared."""


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
        if kinds != {"object"}:
            return False
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
            self._left -= 1 + len(properties) + len(required) + len(values or ())
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
