"""Fields of protobuf messages, and damage that ends in an error."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from numballama.errors import FormatError
from numballama.tokenizers.sentencepiece_proto import Double, known_fields, message_bytes, message_fields


def test_fields_of_every_wire_type() -> None:
    message = b"\x08\x96\x01" + b"\x12\x03abc" + b"\x1d" + struct.pack("<f", 1.5) + b"\x21" + struct.pack("<d", -2.0)
    assert list(message_fields(message)) == [(1, 150), (2, b"abc"), (3, 1.5), (4, -2.0)]
    assert list(message_fields(b"")) == []


@pytest.mark.parametrize("message", [b"\x08", b"\x08" + b"\xff" * 11, b"\x12\x05abc", b"\x1d\0\0", b"\x0b\0"])
def test_damage(message: bytes) -> None:
    with pytest.raises(FormatError, match="a damaged protobuf message"):
        list(message_fields(message))


floats = st.floats(width=32, allow_nan=False) | st.floats(allow_nan=False).map(Double)
values = st.integers(0, 2**63) | st.binary(max_size=300) | floats


@given(fields=st.lists(st.tuples(st.integers(1, 2000), values), max_size=5))
@example(fields=[(4, Double(1e300))])
def test_what_is_written_is_read(fields: list[tuple[int, int | float | bytes]]) -> None:
    message = message_bytes(fields)
    found = list(message_fields(message))
    assert found == fields and [type(value) for _, value in found] == [type(value) for _, value in fields]
    assert message_bytes(found) == message


def test_a_number_of_64_bits_is_no_float() -> None:
    message = message_bytes([(2, Double(1.5)), (2, 0.5)])
    assert list(known_fields(message, {2: float})) == [(2, 0.5)]


@given(data=st.binary(max_size=60))
def test_any_bytes_end_in_fields_or_an_error(data: bytes) -> None:
    with contextlib.suppress(FormatError):
        assert all(number >= 0 for number, _ in message_fields(data))
