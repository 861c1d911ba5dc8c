"""Constants of the decode pipeline that depend on each other."""

import pytest

pytest.importorskip("cuda.bindings", reason="NVIDIA's Python packages are not installed")

from numballama.cuda.decode_pipeline import LOOKAHEAD, N_SLOTS


def test_there_are_more_slots_than_steps_in_flight() -> None:
    """A step must not overwrite the slot of one whose token the host has not read; slots are found by a mask."""
    assert N_SLOTS > LOOKAHEAD + 1
    assert N_SLOTS & (N_SLOTS - 1) == 0
