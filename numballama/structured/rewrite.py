"""Keywords that llguidance does not know, written with those that it does: `not`, `if`, `dependencies` and their kin.

Each schema here allows the same values as what it stands for, or there is none: None. All schemas are checked ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KINDS = ("null", "boolean", "object", "array", "number", "string")
"""Types that exclude each other. "integer" is part of "number"."""
MAX_OPTIONS = 8
"""Most options of a `oneOf` that is rewritten: each gets the negation of all others."""
_BELOW = {"minItems": ("array", "maxItems"), "minLength": ("string", "maxLength")}
_ABOVE = {"maxItems": ("array", "minItems"), "maxLength": ("string", "minLength")}
_OTHER_SIDE = {"minimum": "exclusiveMaximum", "maximum": "exclusiveMinimum",
               "exclusiveMinimum": "maximum", "exclusiveMaximum": "minimum"}  # fmt: skip


def negated(schema: Any) -> Any:
    """What allows the values that a schema does not. None where no other keyword says it."""
    if isinstance(schema, bool):
        return not schema
    options = []
    for keyword, value in schema.items():
        if (option := _negated_keyword(keyword, value)) is None:
            return None
        options.append(option)
    return any_of(options)


def _negated_keyword(keyword: str, value: Any) -> Any:
    """The negation of a schema of one keyword. Only of keywords whose meaning does not depend on others."""
    match keyword:
        case "type":
            return _other_types([value] if isinstance(value, str) else value)
        case "required":
            return any_of(without(name) for name in dict.fromkeys(value))
        case "properties":
            parts = [(name, negated(schema)) for name, schema in value.items()]
            if any(other is None for _, other in parts):
                return None
            return any_of(
                {"type": "object", "properties": {name: other}, "required": [name]}
                for name, other in parts
                if other is not False
            )
        case "anyOf":
            parts = [negated(each) for each in value]
            return None if None in parts else {"allOf": parts}
        case "allOf":
            parts = [negated(each) for each in value]
            return None if None in parts else any_of(parts)
        case "enum":
            return _other_constants(value)
        case "const":
            return _other_constants([value])
        case "minItems" | "minLength":
            kind, other = _BELOW[keyword]
            return {"type": kind, other: value - 1} if value else False
        case "maxItems" | "maxLength":
            kind, other = _ABOVE[keyword]
            return {"type": kind, other: value + 1}
        case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
            return {"type": "number", _OTHER_SIDE[keyword]: value}
    return None


def _other_types(names: Sequence[str]) -> Any:
    if "integer" in names and "number" not in names:
        return None  # numbers that are no integers
    left = [kind for kind in KINDS if kind not in names]
    return {"type": left} if left else False


def _other_constants(values: Sequence[Any]) -> Any:
    """All values but null, true and false as far as they are among `values`."""
    if not all(value is None or isinstance(value, bool) for value in values):
        return None
    left = [kind for kind in KINDS if kind != "boolean" and not (kind == "null" and None in values)]
    flags = [flag for flag in (False, True) if flag not in [each for each in values if each is not None]]
    return any_of([{"type": left}, {"enum": flags} if flags else False])


def without(name: str) -> dict[str, Any]:
    """Objects without a property."""
    return {"type": "object", "properties": {name: False}}


def any_of(options: Iterable[Any]) -> Any:
    """One of some schemas."""
    left = {json.dumps(option, sort_keys=True): option for option in options if option is not False}
    if any(option is True or option == {} for option in left.values()):
        return True
    if len(left) > 1:
        return {"anyOf": list(left.values())}
    return next(iter(left.values()), False)


def all_of(schemas: Sequence[Any]) -> Any:
    """All of some schemas."""
    return {"allOf": list(schemas)}


def dependent(name: str, condition: Any) -> Any:
    """What has a property must fit `condition`; values that are no objects may be anything."""
    return any_of([{"properties": {name: False}}, condition])


def conditional(condition: Any, then: Any, otherwise: Any) -> Any:
    """`if`, `then` and `else`. None where the condition has no negation."""
    other = negated(condition)
    return None if other is None else any_of([all_of([condition, then]), all_of([other, otherwise])])


def exactly_one(options: Sequence[Mapping[str, Any]]) -> Any:
    """`oneOf` of options that only say which properties there are, which llguidance takes for options that may hold at
    once. None for others: it knows itself that constants and types exclude each other.
    """
    if len(options) > MAX_OPTIONS or not any(_says_presence(option) for option in options):
        return None
    others = [negated(option) for option in options]
    if None in others:
        return None
    return any_of(
        all_of([option, *(other for place, other in enumerate(others) if place != number)])
        for number, option in enumerate(options)
    )


def _says_presence(schema: Any) -> bool:
    return isinstance(schema, Mapping) and "required" in schema and not {"properties", "type"} & set(schema)


def size_of(schema: Any, limit: int) -> int:
    """How many values a schema has, itself and all in it; `limit` if it has more."""
    waiting, found = [schema], 0
    while waiting and found < limit:
        value = waiting.pop()
        found += 1
        if isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return found
