"""Which keyword of a schema llguidance refuses, and where it stands: its messages do not say."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import Error
from .checker import NotFollowedError
from .formats import DEFINITIONS, NAMED
from .lark import schema_grammar
from .schema import VALUES

FIND_S = 2.0
"""Time to look for the keyword, in seconds."""
COMMON = ("properties", "required", "items", "additionalProperties", "type")
"""Keywords that are named only if no other is to blame, in this order."""
_AROUND = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: | while processing json-schema:\S+")
"""What llguidance writes around a reason."""


def place_of(error: NotFollowedError, schema: str, check: Callable[[str, str], None]) -> Error:
    """The same error with keyword and place. `schema` is what `check_schema` returned, `check` is `Checker.check`.

    It is the deepest part that is refused for the same reason when it stands alone, and a keyword without which that
    part is not.
    """
    reason = _AROUND.sub("", error.reason)
    whole, deadline = json.loads(schema), time.monotonic() + FIND_S
    definitions = {name: whole[name] for name in DEFINITIONS if name in whole}

    def is_refused(part: Mapping[str, Any]) -> bool:
        if time.monotonic() > deadline:
            return False
        try:
            check(schema_grammar(json.dumps({**definitions, **part})), "json_schema")
        except NotFollowedError as found:
            return _AROUND.sub("", found.reason) == reason
        except Error:  # it takes too long
            return False
        return False

    place, part = "#", whole
    while (found := next((each for each in _parts(part) if is_refused(each[1])), None)) is not None:
        place, part = f"{place}/{found[0]}", found[1]
    keywords = sorted(
        (name for name in part if name not in DEFINITIONS),
        key=lambda name: COMMON.index(name) if name in COMMON else -1,
    )
    keyword = next((name for name in keywords if not is_refused({k: v for k, v in part.items() if k != name})), None)
    if keyword is None or time.monotonic() > deadline:
        return error
    if "coerce_one_of" in reason:  # an option that is not for users
        reason = "more than one of its schemas may hold, as far as the compiler sees; anyOf allows that"
    return Error(f"json_schema: {keyword!r} at {place} cannot be followed: {reason}")


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, schema) of the schemas directly inside a schema: first those that a $ref may point to."""
    for keyword, value in sorted(schema.items(), key=lambda item: item[0] not in DEFINITIONS):
        if keyword in NAMED:
            parts = [(f"{keyword}/{name}", inner) for name, inner in value.items()]
        elif keyword in VALUES:
            continue
        elif isinstance(value, list):
            parts = [(f"{keyword}/{number}", inner) for number, inner in enumerate(value)]
        else:
            parts = [(keyword, value)]
        yield from (part for part in parts if isinstance(part[1], dict))
