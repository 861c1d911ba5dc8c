"""What whole warps and warpgroups do together: shuffles, and products of matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.cuda.emulator.program import from_16
from tests.cuda.emulator.threads import Threads
from tests.cuda.emulator.wgmma import LANES, Products


class Warps(Threads):
    """shfl, redux, ldmatrix, mma and wgmma."""

    def _shfl(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        assert modifiers[1] in ("bfly", "idx") and (self._value(operands[4], "u32")[mask] == 0xFFFFFFFF).all()
        self._whole_warps(mask)
        to = operands[0].split("|")[0]
        lanes = np.arange(self.threads)
        given = np.where(mask, self._value(operands[2], "u32").astype(np.int64), 0)  # others' registers hold anything
        inside = (lanes & 31) ^ given if modifiers[1] == "bfly" else given & 31
        other = (lanes & ~31) | inside
        self._set(to, self._value(operands[1], "b32")[other], mask)

    def _redux(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        assert modifiers == ["sync", "max", "s32"] and int(operands[2], 0) == 0xFFFFFFFF, modifiers
        self._whole_warps(mask)
        largest = self._value(operands[1], "s32").reshape(-1, 32).max(axis=1)
        self._set(operands[0], np.repeat(largest, 32), mask)

    def _whole_warps(self, mask: np.ndarray) -> None:
        warps = mask.reshape(-1, 32)
        assert (warps.all(axis=1) | ~warps.any(axis=1)).all(), "a warp that is not whole"

    def _ldmatrix(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        """Lane l gives the address of row l mod 8 of matrix l / 8, and gets numbers 2 (l mod 4) and the next of row
        l / 4 of each; of its transposed with `trans`.
        """
        self._whole_warps(mask)
        count = len(operands[0])
        assert count == 4
        rows = np.zeros((self.threads, 8), np.uint16)
        rows[mask] = self._load(self._address(operands[1])[mask], 16, True, mask).view(np.uint16)
        matrices = rows.reshape(-1, 4, 8, 8)
        if "trans" in modifiers:
            matrices = matrices.transpose(0, 1, 3, 2)
        lane = np.arange(32)
        for i, name in enumerate(operands[0]):
            low = matrices[:, i, lane // 4, 2 * (lane % 4)].astype(np.uint32)
            high = matrices[:, i, lane // 4, 2 * (lane % 4) + 1].astype(np.uint32)
            self._set(name, (low | high << np.uint32(16)).reshape(-1), mask)

    def _mma(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        self._whole_warps(mask)
        shape, kind = modifiers[2], modifiers[6]
        assert modifiers[:2] == ["sync", "aligned"] and modifiers[3:6] == ["row", "col", "f32"], modifiers
        depth = {"m16n8k16": 16, "m16n8k8": 8}[shape]
        warps = self.threads // 32
        lane = np.arange(32)
        group, place = lane // 4, lane % 4

        def numbers(name: str) -> tuple[np.ndarray, np.ndarray]:
            words = self._value(name, "b32").reshape(warps, 32)
            return tuple(from_16((words >> np.uint32(s)).astype(np.uint16), kind) for s in (0, 16))  # type: ignore[return-value]

        a, b = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
        for i, name in enumerate(operands[1]):
            row, column = group + 8 * (i % 2), 2 * place + 8 * (i // 2)
            a[:, row, column], a[:, row, column + 1] = numbers(name)
        for i, name in enumerate(operands[2]):
            row = 2 * place + 8 * i
            b[:, row, group], b[:, row + 1, group] = numbers(name)
        product = a @ b
        for i, (to, name) in enumerate(zip(operands[0], operands[3], strict=True)):
            part = product[:, group + 8 * (i // 2), 2 * place + i % 2].reshape(-1)
            self._set(to, (part + self._value(name, "f32")).astype(np.float32), mask)

    def _wgmma(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        groups = len(self.warpgroups)
        assert not mask[LANES * groups :].any(), "a warpgroup that is not whole"
        for number, whole in enumerate(mask[: LANES * groups].reshape(-1, LANES)):
            assert whole.all() or not whole.any(), "a warpgroup that is not whole"
            if whole.any() and modifiers[0] != "fence":
                group = self.warpgroups[number]
                if modifiers[0] == "mma_async":
                    group.begin(modifiers[1:], operands)
                elif modifiers[0] == "commit_group":
                    group.groups.append(Products())
                else:
                    assert modifiers[0] == "wait_group"
                    group.wait(int(operands[0]))
