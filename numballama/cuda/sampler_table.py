"""The copy of a `SamplerTable` in device memory, and the memory that sampling writes its results to.

A slot's fields lie in one record of `RECORD_BYTES`, so that one copy sends a slot:

    byte  0         64     96    128     136        144    256
          settings  info   rows  counts  generated  state  recent
          f64[7]    i32[7] i64[4] i64    i64        u64    i32[64]

Kernels update what stands from byte 128 on, so after a generation has begun the device's copy of that is the newer one:
the host does not need it. `rows` are addresses of memory that only some slots need, and that is allocated when the
first generation in a slot needs it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..sampling import HAS_COUNTS, MAX_LOGPROBS, N_BIAS, N_LOGPROBS, N_STOP, Sampled, SamplerTable
from .driver import Device, Memory, Pinned
from .kernels.params import RECORD_BYTES, ROW_BIAS, ROW_COUNTS, ROW_LOGITS, ROW_MASK
from .launch import ITEM_BYTES, Array
from .weights import aligned

FIELDS = {"settings": (0, "f64"), "info": (64, "i32"), "rows": (96, "i64"), "counts": (128, "i64"),
          "state": (144, "u64"), "recent": (256, "i32")}  # fmt: skip
"""Field of a record → (its byte, its type). `counts` is followed by the number of generated tokens."""
CONSTANT_BYTES = 128
"""Bytes at the beginning of a record that no kernel writes."""
STAGING_BYTES = 1 << 18
"""Bytes of pinned memory for copies that wait in the stream, at first."""


class Staging:
    """A ring of pinned memory from which copies to the device are enqueued."""

    def __init__(self, device: Device, nbytes: int = STAGING_BYTES) -> None:
        self._device, self._used = device, 0
        self._pinned = Pinned(device, nbytes)

    def write(self, address: int, source: NDArray[np.uint8]) -> None:
        """Enqueue a copy of bytes to a device address; `source` may change at once."""
        if self._used + source.nbytes > len(self._pinned.bytes):
            self._device.synchronize()  # all copies from the ring have been made
            self._used = 0
            if source.nbytes > len(self._pinned.bytes):
                self._pinned = Pinned(self._device, source.nbytes)
        self._pinned.bytes[self._used : self._used + source.nbytes] = source
        self._device.write(address, self._pinned.address + self._used, source.nbytes)
        self._used += aligned(source.nbytes)


class DeviceSamplerTable:
    """The records of `slots` slots that sample from logits of `vocab_size` tokens, and their latest tokens.

    `arrays` are what kernels read: a record's fields, each from its place in the first record on, and `last_token` i32
    [slots]. A slot that was never sent has no candidates: do not sample for it.
    """

    def __init__(self, device: Device, slots: int, vocab_size: int) -> None:
        self.slots, self.vocab_size, self._device = slots, vocab_size, device
        self._staging = Staging(device)
        records, tokens = aligned(slots * RECORD_BYTES), aligned(4 * slots)
        self._memory = Memory(device, records + tokens, "the sampler's state")
        device.fill(self._memory.address, 0, self._memory.nbytes)
        self.arrays: dict[str, Array] = {
            name: self._memory.array(place, ((slots * RECORD_BYTES - place) // ITEM_BYTES[dtype],), dtype)
            for name, (place, dtype) in FIELDS.items()
        }
        self.arrays["last_token"] = self._memory.array(records, (slots,), "i32")
        self._rows = np.zeros((slots, 4), np.int64)
        self._row_memory: dict[tuple[int, int], Memory] = {}
        self._masks: Memory | None = None
        self._sent: SamplerTable | None = None
        self._assigned, self._masked = [-1] * slots, [-1] * slots

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        owned = [self._memory, *self._row_memory.values(), *([self._masks] if self._masks else [])]
        return sum(memory.nbytes for memory in owned)

    def free(self) -> None:
        """Free the memory."""
        for memory in (self._memory, *self._row_memory.values(), *([self._masks] if self._masks else [])):
            memory.free()

    def update(self, table: SamplerTable, slots: Iterable[int]) -> None:
        """Enqueue copies of what has changed in these slots since they were last sent.

        After `assign` or `release` that is all of the slot's state, after `set_mask` only the mask: tokens that the
        device has sampled since are not forgotten. Raises `DeviceError` if too little memory is free.
        """
        if table is not self._sent:
            self._sent, self._assigned, self._masked = table, [-1] * self.slots, [-1] * self.slots
        for slot in slots:
            if self._assigned[slot] != table.assigned[slot]:
                self.send(table, slot)
            elif self._masked[slot] != table.masked[slot]:
                self._send_mask(table, slot)
                self._send_record(table, slot, CONSTANT_BYTES)
            self._assigned[slot], self._masked[slot] = table.assigned[slot], table.masked[slot]

    def send(self, table: SamplerTable, slot: int) -> None:
        """Enqueue copies of all of a slot's state, as the host has it."""
        info, rows = table.info[slot], self._rows[slot]
        n_entries = int(info[N_BIAS] + info[N_STOP])
        if n_entries:
            entries = np.zeros((n_entries, 2), np.int32)
            entries[:, 0] = table.bias_ids[slot, :n_entries]
            entries[: info[N_BIAS], 1] = table.bias_values[slot, : info[N_BIAS]].view(np.int32)
            rows[ROW_BIAS] = self._reserve(slot, ROW_BIAS, entries.nbytes)
            self._staging.write(int(rows[ROW_BIAS]), entries.reshape(-1).view(np.uint8))
        if info[HAS_COUNTS]:
            rows[ROW_COUNTS] = self._reserve(slot, ROW_COUNTS, 4 * self.vocab_size)
            if table.generated[slot]:
                self._staging.write(int(rows[ROW_COUNTS]), table.output_counts[slot].view(np.uint8))
            else:
                self._device.fill(int(rows[ROW_COUNTS]), 0, 4 * self.vocab_size)
        self._send_mask(table, slot)
        self._send_record(table, slot, RECORD_BYTES)
        token = table.last_token[slot : slot + 1].view(np.uint8)
        self._staging.write(self.arrays["last_token"].address + 4 * slot, token)

    def _send_mask(self, table: SamplerTable, slot: int) -> None:
        if len(table.mask):
            words = table.mask.shape[1]
            if self._masks is None:
                self._masks = Memory(self._device, 4 * words * self.slots, "the masks of allowed tokens")
            self._rows[slot, ROW_MASK] = self._masks.address + 4 * words * slot
            self._staging.write(int(self._rows[slot, ROW_MASK]), table.mask[slot].view(np.uint8))

    def _send_record(self, table: SamplerTable, slot: int, nbytes: int) -> None:
        rows = self._rows[slot]
        keeps_raw = table.info[slot, N_LOGPROBS] >= 0 and table.changes_logits(slot)
        rows[ROW_LOGITS] = self._reserve(slot, ROW_LOGITS, 4 * self.vocab_size) if keeps_raw else 0
        record = np.zeros(RECORD_BYTES, np.uint8)
        counts = np.array([table.counts[slot], table.generated[slot]], np.int64)
        fields: dict[str, NDArray[np.generic]] = {
            "settings": table.settings[slot], "info": table.info[slot], "rows": rows, "counts": counts,
            "state": table.state[slot : slot + 1], "recent": table.recent[slot],
        }  # fmt: skip
        for name, (place, _) in FIELDS.items():
            record[place : place + fields[name].nbytes] = fields[name].view(np.uint8)
        self._staging.write(self._memory.address + slot * RECORD_BYTES, record[:nbytes])

    def _reserve(self, slot: int, row: int, nbytes: int) -> int:
        """The address of at least `nbytes` of a slot's own memory. It is kept for later generations."""
        memory = self._row_memory.get((slot, row))
        if memory is None or memory.nbytes < nbytes:
            if memory is not None:
                self._device.synchronize()  # a run may still read it
                memory.free()
            memory = self._row_memory[slot, row] = Memory(self._device, nbytes, "the state of a slot's sampler")
        return memory.address


class DeviceSampled:
    """Memory for what a run of up to `rows` rows samples: `arrays` of the names of `Sampled`, and `normalizers`."""

    def __init__(self, device: Device, rows: int) -> None:
        self._device, self.rows = device, rows
        shapes = {
            "next_token": ((rows,), "i32"), "logprobs": ((rows,), "f32"), "normalizers": ((rows,), "f32"),
            "top_ids": ((rows, MAX_LOGPROBS), "i32"), "top_logprobs": ((rows, MAX_LOGPROBS), "f32"),
        }  # fmt: skip
        sizes = {name: aligned(4 * int(np.prod(shape))) for name, (shape, _) in shapes.items()}
        self.memory = Memory(device, sum(sizes.values()), "sampled tokens")
        self.arrays: dict[str, Array] = {}
        offset = 0
        for name, (shape, dtype) in shapes.items():
            self.arrays[name] = self.memory.array(offset, shape, dtype)
            offset += sizes[name]

    def read(self, rows: int, top: int) -> Sampled:
        """Wait for the stream; the results of the first `rows` rows. `top` is `SamplerTable.top_logprobs` of the run's
        slots: -1 if none wants log probabilities.
        """
        out = Sampled.empty(rows, max(0, top))
        wide = {name: np.empty((rows, MAX_LOGPROBS), array.dtype) for name, array in
                (("top_ids", out.top_ids), ("top_logprobs", out.top_logprobs))}  # fmt: skip
        self._device.read(self.arrays["next_token"].address, out.tokens)
        if top >= 0:
            self._device.read(self.arrays["logprobs"].address, out.logprobs)
            for name, array in wide.items():
                self._device.read(self.arrays[name].address, array)
                getattr(out, name)[...] = array[:, :top]
        return out
