"""The copy of a `SamplerTable` in device memory: what is sent, what is kept, and where it lies; on a fake device."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from tests.helpers.cuda_host import HostDevice, HostMemory, HostPinned, missing_packages

if reason := missing_packages():
    pytest.skip(f"the backend cannot be imported: {reason}", allow_module_level=True)

from numballama.cuda import sampler_table
from numballama.cuda.kernels.params import RECORD_BYTES, ROW_BIAS, ROW_COUNTS, ROW_LOGITS, ROW_MASK
from numballama.cuda.sampler_table import FIELDS, DeviceSampled, DeviceSamplerTable, Staging
from numballama.ir import DTYPES
from numballama.sampling import HAS_COUNTS, HAS_MASK, INFO, MAX_LOGPROBS, SETTINGS, SamplerTable, SamplingParams
from tests.helpers.sampling import mask_of

TYPES = DTYPES | {"f64": np.dtype(np.float64), "i64": np.dtype(np.int64), "u64": np.dtype(np.uint64)}


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_table, "Memory", HostMemory)
    monkeypatch.setattr(sampler_table, "Pinned", HostPinned)


class CountingDevice(HostDevice):
    """Counts bytes sent and waits; copies read pinned memory only."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []
        self.waits = 0

    def write(self, address: int, source: int, nbytes: int) -> None:
        assert any(start <= source and source + nbytes <= start + size and what == "pinned memory"
                   for start, size, what in HostMemory.live)  # fmt: skip
        self.sent.append(nbytes)
        super().write(address, source, nbytes)

    def synchronize(self) -> None:
        self.waits += 1


def make(slots: int, vocab: int) -> tuple[Any, SamplerTable, DeviceSamplerTable]:
    device: Any = CountingDevice()
    return device, SamplerTable(slots, vocab), DeviceSamplerTable(device, slots, vocab)


def field(device_table: DeviceSamplerTable, name: str, slot: int, count: int) -> np.ndarray:
    """`count` elements of a field of a slot's record, as kernels address them."""
    array, (_, dtype) = device_table.arrays[name], FIELDS[name]
    item = TYPES[dtype].itemsize
    start = array.address + slot * (RECORD_BYTES // item) * item
    return np.frombuffer(ctypes.string_at(start, count * item), TYPES[dtype])


def words(address: int, count: int, dtype: Any = np.int32) -> np.ndarray:
    return np.frombuffer(ctypes.string_at(int(address), 4 * count), dtype)


def test_fields_of_a_record_do_not_overlap() -> None:
    sizes = {"settings": 8 * SETTINGS, "info": 4 * INFO, "rows": 32, "counts": 16, "state": 8, "recent": 256}
    ends = [(place, place + sizes[name]) for name, (place, _) in FIELDS.items()]
    for (_, end), (start, _) in zip(ends, [*ends[1:], (RECORD_BYTES, 0)], strict=True):
        assert end <= start
    assert FIELDS["counts"][0] == sampler_table.CONSTANT_BYTES


def test_a_slot_is_sent_whole_and_once() -> None:
    device, table, copy = make(3, 70)
    params = SamplingParams(
        seed=5, presence_penalty=1, logit_bias={4: 1.5, 9: -2}, min_tokens=9, logprobs=3, repetition_penalty=1.1
    )
    table.assign(1, params, [1, 2], [3, 3], [60])
    table.set_mask(1, mask_of(np.arange(70) % 2 == 0))
    copy.update(table, [0, 1])
    for slot in (0, 1):
        np.testing.assert_array_equal(field(copy, "settings", slot, SETTINGS), table.settings[slot])
        np.testing.assert_array_equal(field(copy, "info", slot, INFO), table.info[slot])
        np.testing.assert_array_equal(field(copy, "recent", slot, 64), table.recent[slot])
        assert field(copy, "counts", slot, 2).tolist() == [table.counts[slot], table.generated[slot]]
        assert field(copy, "state", slot, 1)[0] == table.state[slot]
    assert words(copy.arrays["last_token"].address, 3).tolist()[:2] == [0, 3]
    rows = field(copy, "rows", 1, 4)
    np.testing.assert_array_equal(words(rows[ROW_COUNTS], 70), table.output_counts[1])
    np.testing.assert_array_equal(words(rows[ROW_MASK], 3, np.uint32), table.mask[1])
    assert words(rows[ROW_BIAS], 6)[::2].tolist() == [4, 9, 60]
    assert words(rows[ROW_BIAS], 4, np.float32)[1::2].tolist() == [1.5, -2]
    assert rows[ROW_LOGITS] and not field(copy, "rows", 0, 4)[[ROW_COUNTS, ROW_BIAS, ROW_LOGITS]].any()
    sent = len(device.sent)
    copy.update(table, [0, 1])
    assert len(device.sent) == sent, "nothing has changed"


def test_a_mask_does_not_undo_what_the_device_sampled() -> None:
    _, table, copy = make(2, 70)
    table.assign(1, SamplingParams(seed=1, temperature=0, logprobs=1), [5])
    copy.update(table, [1])
    state = copy.arrays["state"].address + RECORD_BYTES
    ctypes.c_uint64.from_address(state).value = 77  # as a kernel does
    ctypes.c_int32.from_address(copy.arrays["last_token"].address + 4).value = 33
    assert not field(copy, "rows", 1, 4)[ROW_LOGITS]
    table.set_mask(1, mask_of(np.arange(70) < 9))
    copy.update(table, [1])
    assert field(copy, "info", 1, INFO)[HAS_MASK] and field(copy, "rows", 1, 4)[ROW_MASK]
    assert field(copy, "rows", 1, 4)[ROW_LOGITS], "the mask changes logits, so the model's are kept"
    assert field(copy, "state", 1, 1)[0] == 77 and words(copy.arrays["last_token"].address + 4, 1)[0] == 33
    table.set_mask(1, None)
    copy.update(table, [1])
    assert not field(copy, "info", 1, INFO)[HAS_MASK] and field(copy, "state", 1, 1)[0] == 77
    table.assign(1, SamplingParams(seed=2), [6])
    copy.update(table, [1])
    assert field(copy, "state", 1, 1)[0] == 2 and words(copy.arrays["last_token"].address + 4, 1)[0] == 6


def test_memory_is_kept_for_later_generations() -> None:
    _, table, copy = make(2, 1000)
    before = copy.nbytes
    for count in (3, 2, 40, 1):
        table.assign(0, SamplingParams(frequency_penalty=1, logit_bias=dict.fromkeys(range(count), 1.0)))
        copy.update(table, [0])
        rows = field(copy, "rows", 0, 4)
        assert not words(rows[ROW_COUNTS], 1000).any(), "a new generation has no output"
        words_of_bias = words(rows[ROW_BIAS], 2 * count)
        assert words_of_bias[::2].tolist() == list(range(count))
        ctypes.memset(int(rows[ROW_COUNTS]), 1, 4000)
    assert copy.nbytes == before + 4000 + 8 * 40
    table.assign(0, SamplingParams())
    copy.update(table, [0])
    assert not field(copy, "info", 0, INFO)[HAS_COUNTS]
    copy.free()


def test_another_table_is_sent_anew() -> None:
    device, table, copy = make(2, 50)
    copy.update(table, [0])
    sent = len(device.sent)
    copy.update(SamplerTable(2, 50), [0])
    assert len(device.sent) > sent


def test_staging_waits_before_it_overwrites() -> None:
    device: Any = CountingDevice()
    staging, target = Staging(device, 1024), HostMemory(device, 1 << 14, "a test")
    for number in range(4):
        staging.write(target.address + 256 * number, np.full(200, number, np.uint8))
    assert device.waits == 0
    staging.write(target.address + 1024, np.full(200, 4, np.uint8))
    assert device.waits == 1
    staging.write(target.address + 2048, np.full(5000, 5, np.uint8))
    assert device.waits == 2, "a copy larger than the ring gets a larger one"
    staging.write(target.address + 8192, np.full(4000, 6, np.uint8))
    assert [words(target.address + 256 * n, 1, np.uint8)[0] for n in (0, 1, 2, 3, 4, 8, 32)] == [0, 1, 2, 3, 4, 5, 6]


def test_results_are_read_as_they_are_wanted() -> None:
    device: Any = HostDevice()
    sampled = DeviceSampled(device, 4)
    for name, array in sampled.arrays.items():
        numbers = np.arange(array.nbytes // 4, dtype=TYPES[array.dtype])
        ctypes.memmove(array.address, numbers.ctypes.data, array.nbytes)
        assert array.address - sampled.memory.address + array.nbytes <= sampled.memory.nbytes, name
    none = sampled.read(3, -1)
    assert none.tokens.tolist() == [0, 1, 2] and np.isnan(none.logprobs).all() and none.top_ids.shape == (3, 0)
    assert sampled.read(2, 0).logprobs.tolist() == [0, 1]
    some = sampled.read(2, 2)
    assert some.top_ids.tolist() == [[0, 1], [MAX_LOGPROBS, MAX_LOGPROBS + 1]]
    assert some.top_logprobs.tolist() == [[0, 1], [MAX_LOGPROBS, MAX_LOGPROBS + 1]]
