"""Checks a JSON Schema: every keyword is one that llguidance enforces, and its value has the right form.

What passes is written again without annotations, so that llguidance sees nothing that was not checked here. All else is
an `Error` that names keyword and place: a schema is followed to the letter or not at all.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, NoReturn, TypeGuard
from urllib.parse import unquote

from ..errors import Error
from .disjoint import Options
from .patterns import unclear_class, without_control
from .rewrite import all_of, conditional, dependent, exactly_one, negated, size_of

MAX_SCHEMA = 256 * 1024
"""Largest schema in bytes of JSON."""
MAX_DEPTH = 64
"""Most levels of schemas inside schemas, and of a value of `enum` or `const`."""
MAX_REWRITTEN = 20_000
"""Most values, as `rewrite.size_of` counts them, of the schemas that stand for `REWRITTEN` keywords and `oneOf`."""
ANY_OBJECT = "json_object"
"""As a `json_schema`: any JSON object, like {"type": "object"}."""
TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Values of `format` that are enforced."""
_WHOLE = ["null", "boolean", "object", "array", "string", "integer"]
NUMBER_FORMATS: Mapping[str, Mapping[str, Any]] = {
    "int32": {"type": _WHOLE, "minimum": -(2**31), "maximum": 2**31 - 1},
    "int64": {"type": _WHOLE, "minimum": -(2**53), "maximum": 2**53},
    "float": {},
    "double": {},
    "password": {},
}
"""OpenAPI's values of `format` → a schema that says the same. Integers that a float64 does not hold are left out."""
OLD_FORMATS = {"ip-address": "ipv4", "host-name": "hostname"}
"""Values of `format` in draft 3 → their names today."""
ANNOTATIONS = frozenset(
    ["title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id",
     "id", "$anchor", "discriminator"]
)  # fmt: skip
"""Keywords that restrict nothing."""
UNENFORCED = frozenset(
    ["uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems",
     "unevaluatedProperties", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary",
     "contentEncoding", "contentMediaType", "contentSchema", "nullable", "extends", "disallow", "divisibleBy",
     "x-guidance"]
)  # fmt: skip
"""Keywords that would restrict something, and are refused."""
REWRITTEN = ("not", "if", "then", "else", "dependencies", "dependentRequired", "dependentSchemas")
"""Keywords that are enforced by others, where these can say it: see `rewrite`."""
VALUES = ("const", "enum", "default", "examples")
"""Keywords that have values, in which nothing is a schema."""
HARMLESS: Mapping[str, object] = {"uniqueItems": False, "nullable": False}
"""Values with which a keyword of `UNENFORCED` restricts nothing."""
ESCAPED_CONTROLS = "\b\f\n\r\t"
"""Control characters that have a short escape in JSON. Others are never generated."""


def check_schema(schema: object) -> str:
    """A schema, given as a mapping or as JSON, as the JSON text that may be given to llguidance.

    Raises `Error`, which names keyword and place, for what would not be enforced, is no JSON Schema or is too large.
    """
    if isinstance(schema, str):
        if schema == ANY_OBJECT:
            return '{"type":"object"}'
        schema = parse_json(schema, "json_schema")
    try:
        checked = _Checker().schema(schema, "#", 0)
    except RecursionError:  # the text of a value, in a message
        raise Error(f"json_schema is nested too deeply; the limit is {MAX_DEPTH} levels") from None
    if checked is False:
        raise Error("json_schema is false, which allows no value")
    text = json.dumps({} if checked is True else checked, separators=(",", ":"), allow_nan=False)
    if len(text) > MAX_SCHEMA:
        raise Error(f"json_schema has {len(text):,} bytes; the limit is {MAX_SCHEMA:,}")
    return text


def parse_json(text: str, what: str) -> Any:
    """The value of a JSON text. Raises `Error` if it is none, or too large or too deep."""
    if len(text) > MAX_SCHEMA:
        raise Error(f"{what} has {len(text):,} characters; the limit is {MAX_SCHEMA:,}")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise Error(f"{what} is nested too deeply; the limit is {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise Error(f"{what} is not JSON: {error}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _fail(place: str, keyword: str, problem: str) -> NoReturn:
    raise Error(f"json_schema: {keyword!r} at {place} {problem}")


class _Checker:
    """Walks a schema. `places` are the JSON pointers of all schemas in it, `refs` those that $ref points to."""

    def __init__(self) -> None:
        self._places: set[str] = set()
        self._refs: list[tuple[dict[str, Any], str]] = []
        self._one_ofs: list[dict[str, Any]] = []
        self._left = MAX_REWRITTEN
        self._bases: list[tuple[str, str]] = []
        """(keyword, place) of what changes what a $ref below it means."""

    def schema(self, value: object, place: str, depth: int) -> Any:
        """The schema at `place`, checked and without annotations."""
        if isinstance(value, bool):
            self._places.add(place)
            return value
        if not isinstance(value, Mapping):
            raise Error(f"json_schema: a schema must be an object, found {value!r:.100} at {place}")
        if depth > MAX_DEPTH:
            raise Error(f"json_schema is nested too deeply at {place[:100]}; the limit is {MAX_DEPTH} levels")
        self._places.add(place)
        found: dict[str, Any] = {}
        for keyword, argument in value.items():
            if not isinstance(keyword, str):
                raise Error(f"json_schema: a keyword must be a string, found {keyword!r:.100} at {place}")
            if keyword in (*REWRITTEN, "propertyNames") or (
                keyword == "format" and _number_format(argument) is not None
            ):
                continue
            if (check := _CHECKS.get(keyword)) is not None:
                found[keyword] = check(self, argument, place, keyword, depth)
                if keyword == "$ref":
                    self._refs.append((found, place))
            else:
                self._refuse(keyword, argument, place)
        if "propertyNames" in value:
            self._property_names(found, value["propertyNames"], place, depth)
        _check_together(found, place)
        if "oneOf" in found and (one := exactly_one(found["oneOf"])) is not None:
            found.setdefault("allOf", []).append(self._counted(one, place, "oneOf"))
            del found["oneOf"]
        if "oneOf" in found:
            self._one_ofs.append(found)
        if more := [*found.pop("allOf", ()), *self._rewritten(value, place, depth)]:
            found["allOf"] = more
        if place == "#":
            self._check_refs(value, found)
            options = Options(found)
            for each in self._one_ofs:
                if options.never_two(each["oneOf"], each):
                    each.setdefault("allOf", []).append({"anyOf": each.pop("oneOf")})
        return found

    def _rewritten(self, value: Mapping[str, Any], place: str, depth: int) -> list[Any]:
        """Schemas that say what the keywords of `REWRITTEN` in a schema do."""
        given = [keyword for keyword in REWRITTEN if keyword in value]
        found = [dict(form)] if (form := _number_format(value.get("format"))) else []
        if not given:
            return found
        places = set(self._places)  # a $ref cannot point into them: they stand elsewhere afterwards
        for keyword in given:
            argument = value[keyword]
            if keyword == "not":
                schema = negated(self._one(argument, place, keyword, depth))
            elif keyword == "if":
                if "then" not in value and "else" not in value:
                    continue
                parts = (self._one(value.get(name, True), place, name, depth) for name in ("if", "then", "else"))
                schema = conditional(*parts)
            elif keyword in ("then", "else"):
                continue  # without `if` they mean nothing
            else:
                schema = self._dependencies(argument, place, keyword, depth)
            if schema is None:
                _fail(
                    place,
                    keyword,
                    "is not enforced with these keywords; leave it out. docs/structured.md lists what is",
                )
            if schema is False and place == "#":
                _fail(place, keyword, "leaves no value that is valid; leave it out")
            found.append(self._counted(schema, place, keyword))
        self._places = places
        return found

    def _property_names(self, found: dict[str, Any], value: object, place: str, depth: int) -> None:
        """Write `propertyNames` as the names that a closed object may have."""
        places, keyword = set(self._places), "propertyNames"
        names = self._one(value, place, keyword, depth)
        self._places = places
        said = {} if names is True else dict(names or {"enum": []})
        if said.get("type") == "string":  # which names always are
            del said["type"]
        if not said:
            return
        if set(said) not in ({"pattern"}, {"enum"}, {"const"}) or not {"properties", "patternProperties"}.isdisjoint(
            found
        ):
            _fail(place, keyword, "is enforced if it is one pattern, enum or const, without properties beside it")
        rest = found.get("additionalProperties", True)
        if "pattern" in said:
            found["patternProperties"] = {said["pattern"]: rest}
        else:
            words = said.get("enum", [said.get("const")])
            found["properties"] = {word: rest for word in words if isinstance(word, str)}
        found["additionalProperties"] = False

    def _counted(self, schema: Any, place: str, keyword: str) -> Any:
        """A schema that was written for another. A condition in a condition doubles it, so all of them have a limit."""
        self._left -= size_of(schema, self._left + 1)
        if self._left < 0:
            _fail(
                place,
                keyword,
                f"makes the schema too large: more than {MAX_REWRITTEN:,} values to write it with others",
            )
        return schema

    def _dependencies(self, value: object, place: str, keyword: str, depth: int) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            _fail(place, keyword, f"must be an object, found {value!r:.100}")
        found = []
        for name, each in value.items():
            _text(name, place, keyword)
            if _is_list(each) and keyword != "dependentSchemas":
                condition: Any = {"required": self._required(each, place, keyword, depth)}
            elif keyword == "dependentRequired":
                _fail(place, keyword, f"must be an object of lists of names, found {each!r:.100}")
            else:
                condition = self.schema(each, f"{place}/{keyword}/{name}", depth + 1)
            found.append(dependent(name, condition))
        return all_of(found)

    def _refuse(self, keyword: str, argument: object, place: str) -> None:
        """Raise `Error` unless the keyword restricts nothing."""
        if keyword in UNENFORCED:
            if keyword in HARMLESS and argument is HARMLESS[keyword]:
                return
            _fail(place, keyword, "is not enforced; leave it out. docs/structured.md lists what is")
        if keyword in ("$id", "id") and place != "#" and not str(argument).startswith("#"):
            self._bases.append((keyword, place))
        if keyword in ANNOTATIONS or keyword.startswith(("x-", "_")):
            return
        if near := difflib.get_close_matches(keyword, [*_CHECKS, *UNENFORCED], 1, 0.8):
            _fail(place, keyword, f"is no keyword of JSON Schema; did you mean {near[0]!r}?")

    def _check_refs(self, root: Mapping[str, Any], found: dict[str, Any]) -> None:
        """Check that each $ref points to a schema. One where no keyword has it is moved to `$defs` of `found`."""
        moved: dict[str, str] = {}
        numbers = count()
        for schema, place in self._refs:  # which a schema that is moved makes longer
            ref = schema["$ref"]
            if ref in self._places:
                continue
            if (value := _target(root, ref)) is None:
                _fail(place, "$ref", f"points to {ref!r}, where there is no schema")
            defs = found.setdefault("$defs", {})
            name = next(name for number in numbers if (name := f"moved-{number}") not in defs)
            defs[name] = True  # the name is taken
            moved[ref] = f"#/$defs/{name}"
            defs[name] = self.schema(value, ref, 1)
        for schema, _ in self._refs:
            ref = old = schema["$ref"]
            while old and old not in moved:
                old = old.rpartition("/")[0]
            if old:
                schema["$ref"] = moved[old] + ref[len(old) :]
        for keyword, place in self._bases if self._refs else ():
            _fail(place, keyword, "is supported at the top only in a schema with $ref")

    # ---- the values of keywords: each returns what llguidance is given ----

    def _type(self, value: object, place: str, keyword: str, depth: int) -> Any:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, Sequence) or not names or any(name not in TYPES for name in names):
            _fail(place, keyword, f"must be one of {', '.join(TYPES)}, or a list of them; found {value!r:.100}")
        return value if isinstance(value, str) else list(names)

    def _count(self, value: object, place: str, keyword: str, depth: int) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            _fail(place, keyword, f"must be a whole number from 0 up, found {value!r:.100}")
        return value

    def _number(self, value: object, place: str, keyword: str, depth: int) -> int | float:
        return _exact(value, place, keyword)

    def _positive(self, value: object, place: str, keyword: str, depth: int) -> int | float:
        number = _exact(value, place, keyword)
        if number <= 0:
            _fail(place, keyword, f"must be greater than 0, found {number}")
        return number

    def _exclusive(self, value: object, place: str, keyword: str, depth: int) -> bool | int | float:
        return value if isinstance(value, bool) else _exact(value, place, keyword)

    def _pattern(self, value: object, place: str, keyword: str, depth: int) -> str:
        if not isinstance(value, str):
            _fail(place, keyword, f"must be a string, found {value!r:.100}")
        if problem := unclear_class(value):
            _fail(
                place, keyword, f"has {problem} in a character class: write it with a backslash; found {value!r:.100}"
            )
        return without_control(value)

    def _format(self, value: object, place: str, keyword: str, depth: int) -> str:
        name = OLD_FORMATS.get(value, value) if isinstance(value, str) else value
        if name not in FORMATS:
            known = ", ".join([*FORMATS, *NUMBER_FORMATS])
            _fail(place, keyword, f"{value!r:.100} is not enforced; supported are {known}")
        return str(name)

    def _required(self, value: object, place: str, keyword: str, depth: int) -> list[str]:
        if not _is_list(value) or not all(isinstance(name, str) for name in value):
            _fail(place, keyword, f"must be a list of names, found {value!r:.100}")
        return list(value)

    def _const(self, value: object, place: str, keyword: str, depth: int) -> Any:
        return _value(value, place, keyword, 0)

    def _enum(self, value: object, place: str, keyword: str, depth: int) -> list[Any]:
        if not _is_list(value) or not value:
            _fail(place, keyword, f"must be a list of values, found {value!r:.100}")
        return [_value(each, place, keyword, 0) for each in value]

    def _ref(self, value: object, place: str, keyword: str, depth: int) -> str:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            _fail(place, keyword, f'must point into the schema ("#/$defs/name"), found {value!r:.100}')
        if "~" in value or unquote(value) != value:
            _fail(place, keyword, f"must not contain ~ or %, found {value!r:.100}; rename what it points to")
        return "#" if value == "#/" else value

    def _one(self, value: object, place: str, keyword: str, depth: int) -> Any:
        return self.schema(value, f"{place}/{keyword}", depth + 1)

    def _items(self, value: object, place: str, keyword: str, depth: int) -> Any:
        return self._list(value, place, keyword, depth) if _is_list(value) else self._one(value, place, keyword, depth)

    def _list(self, value: object, place: str, keyword: str, depth: int) -> list[Any]:
        if not _is_list(value) or not value:
            _fail(place, keyword, f"must be a list of schemas, found {value!r:.100}")
        return [self.schema(each, f"{place}/{keyword}/{n}", depth + 1) for n, each in enumerate(value)]

    def _named(self, value: object, place: str, keyword: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            _fail(place, keyword, f"must be an object of schemas, found {value!r:.100}")
        found = {}
        for name, schema in value.items():
            text = _text(name, place, keyword)
            key = self._pattern(text, place, keyword, depth) if keyword == "patternProperties" else text
            found[key] = self.schema(schema, f"{place}/{keyword}/{text}", depth + 1)
        return found


_Check = Callable[[_Checker, Any, str, str, int], Any]
_C = _Checker
_CHECKS: Mapping[str, _Check] = {
    "type": _C._type, "enum": _C._enum, "const": _C._const, "$ref": _C._ref,
    "anyOf": _C._list, "oneOf": _C._list, "allOf": _C._list, "$defs": _C._named, "definitions": _C._named,
    "properties": _C._named, "patternProperties": _C._named, "additionalProperties": _C._one, "required": _C._required,
    "minProperties": _C._count, "maxProperties": _C._count,
    "items": _C._items, "prefixItems": _C._list, "additionalItems": _C._one, "minItems": _C._count,
    "maxItems": _C._count,
    "minLength": _C._count, "maxLength": _C._count, "pattern": _C._pattern, "format": _C._format,
    "minimum": _C._number, "maximum": _C._number, "exclusiveMinimum": _C._exclusive,
    "exclusiveMaximum": _C._exclusive, "multipleOf": _C._positive,
}  # fmt: skip
ENFORCED = frozenset(_CHECKS)
"""Keywords that are enforced."""


def _check_together(found: dict[str, Any], place: str) -> None:
    """Check keywords that depend on each other, and write old forms as those of 2020-12."""
    additional = found.pop("additionalItems", None)
    if isinstance(found.get("items"), list):
        if "prefixItems" in found:
            _fail(place, "items", "is a list beside prefixItems; write a schema")
        found["prefixItems"] = found.pop("items")
        if additional is not None:
            found["items"] = additional
    for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if found.get(exclusive) is True:  # draft 4
            if inclusive not in found:
                _fail(place, exclusive, f"is true without {inclusive!r}")
            found[exclusive] = found.pop(inclusive)
        elif found.get(exclusive) is False:
            del found[exclusive]
    least, required = found.get("minProperties", 0), len(set(found.get("required", ())))
    closed = found.get("additionalProperties") is False and "patternProperties" not in found
    most = required + 1 if closed else max(required, 1)  # other names may be repeated in the text, which counts once
    if least > most:
        _fail(place, "minProperties", f"can be enforced up to {most} with {required} required properties")


def _number_format(name: object) -> Mapping[str, Any] | None:
    return NUMBER_FORMATS.get(name) if isinstance(name, str) else None


def _target(root: Mapping[str, Any], ref: str) -> Any:
    """What a $ref points to in a place of which JSON Schema says nothing. None for what cannot be a schema."""
    value: Any = root
    for name in ref.removeprefix("#/").split("/"):
        if not isinstance(value, Mapping) or name in VALUES:
            return None
        value = value.get(name)
    return value if isinstance(value, Mapping | bool) else None


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _exact(value: object, place: str, keyword: str) -> int | float:
    """A number that a float64 holds exactly as JSON writes it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        _fail(place, keyword, f"must be a number, found {value!r:.100}")
    if isinstance(value, int) and abs(value) > 2**53:
        _fail(place, keyword, "is larger than 2^53: it would not be exact")
    if not math.isfinite(value):
        _fail(place, keyword, f"must be finite, found {value}")
    return value


def _text(value: object, place: str, keyword: str) -> str:
    """A string that JSON can hold with short escapes only."""
    if not isinstance(value, str):
        _fail(place, keyword, f"must be a string, found {value!r:.100}")
    for each in value:
        if (each < " " and each not in ESCAPED_CONTROLS) or each == "\x7f" or "\ud800" <= each <= "\udfff":
            _fail(place, keyword, f"has the character U+{ord(each):04X}, which is never generated")
    return value


def _value(value: object, place: str, keyword: str, depth: int) -> Any:
    """A value of `enum` or `const`."""
    if depth > MAX_DEPTH:
        raise Error(f"json_schema is nested too deeply at {place[:100]}; the limit is {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, place, keyword)
    if isinstance(value, int | float):
        return _exact(value, place, keyword)
    if isinstance(value, Mapping):
        return {_text(k, place, keyword): _value(v, place, keyword, depth + 1) for k, v in value.items()}
    if _is_list(value):
        return [_value(each, place, keyword, depth + 1) for each in value]
    _fail(place, keyword, f"must be a JSON value, found {value!r:.100}")
