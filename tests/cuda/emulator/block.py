"""Blocks of threads that execute a program: which threads go on, and at which instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.cuda.emulator.arithmetic import Arithmetic
from tests.cuda.emulator.cluster import WAIT_S
from tests.cuda.emulator.copies import AsynchronousCopies
from tests.cuda.emulator.memory_access import MemoryAccess
from tests.cuda.emulator.program import Statement
from tests.cuda.emulator.warps import Warps


class Block(Arithmetic, MemoryAccess, AsynchronousCopies, Warps):
    """A running block, or several blocks of one size that execute instructions together.

    Several are as many times as fast: an instruction takes NumPy about as long for 100 threads as for 2,000. Their
    threads stand one block after the other, as does their shared memory. `Program.is_plain` says whether they may.
    """

    @property
    def _ready(self) -> np.ndarray:
        """Threads that can go on."""
        return ~self.done & ~self.waiting & ~self.barriers.blocked

    def run(self) -> None:
        statements = self.program.statements
        with np.errstate(all="ignore"):
            while True:
                ready = self._ready
                if not ready.any():
                    if self.done.all():
                        return
                    if self.in_warp.any():  # who could come to it has come
                        self.waiting &= ~self.in_warp
                        self.in_warp[:] = False
                    elif self.barriers.blocked.any():
                        assert self.cluster is not None, "threads that wait for each other"
                        self.cluster.wait_for(lambda: bool(self._ready.any()))
                    else:
                        self.waiting[:] = False
                    continue
                at = int(self.counter[ready].min())
                mask = ready & (self.counter == at)
                self.everyone = mask if mask.all() else None
                others = self.counter[ready & ~mask]
                limit = int(others.min()) if others.size else len(statements)
                while at < limit:
                    after = self._step(statements[at], at, mask)
                    at += 1
                    if after:
                        break
                else:
                    self.counter[mask] = at

    def _step(self, statement: Statement, at: int, mask: np.ndarray) -> bool:
        """Execute one instruction. Returns whether threads may have diverged or stopped."""
        active, some = mask, True
        if statement.guard:
            guard = self.registers[statement.guard]
            active = mask & (~guard if statement.negated else guard)
            some = bool(active.any())
        name, *modifiers = statement.operation
        self.executed[name] = self.executed.get(name, 0) + 1
        if name == "bra":
            self.counter[mask] = at + 1
            self.counter[active] = self.program.labels[statement.operands[0]]
            return True
        if name in ("ret", "exit"):
            self.counter[mask] = at + 1
            self.done |= active
            return True
        if name == "barrier" and modifiers[0] == "cluster":
            self.counter[mask] = at + 1
            self._at_cluster_barrier(modifiers[1], active)
            return modifiers[1] == "wait"
        if name in ("bar", "barrier"):
            self.counter[mask] = at + 1
            if len(statement.operands) > 1:
                numbers, threads = (self._value(operand, "u32") for operand in statement.operands)
                self.barriers.named(numbers, threads, active, waits="sync" in modifiers)
            else:
                self.waiting |= active
                if "warp" in modifiers:
                    self.in_warp |= active
            return True
        if name == "mbarrier" and modifiers[0] == "try_wait":
            to, where, parity = statement.operands
            self.counter[mask] = at + 1
            self._set(to, self.barriers.ended(self._address(where), self._value(parity, "u32"), active), active)
            return True
        if some:
            try:
                self._execute(name, modifiers, statement.operands, active)
            except Exception as error:
                raise AssertionError(f"{statement.text}: {error}") from error
        return False

    def _at_cluster_barrier(self, how: str, mask: np.ndarray) -> None:
        """Threads arrive at the cluster's barrier, or wait there: all of a block arrive before one waits."""
        assert self.cluster is not None, "no cluster"
        if how == "arrive":
            assert not (self.arrived & mask).any(), "a thread arrives a second time"
            self.arrived |= mask
            return
        assert self.arrived.all(), "a cluster's barrier wants all threads of its blocks"
        if not self.gone.any():
            self.cluster.meet()
        self.gone |= mask
        if self.gone.all():
            self.arrived[:] = self.gone[:] = False

    def _execute(self, name: str, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        function: Callable[..., None] | None = getattr(self, f"_{name}", None)
        if function is None:
            self._arithmetic(modifiers, operands, mask, name)
        else:
            function(modifiers, operands, mask)

    def _nanosleep(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        """Other blocks run meanwhile in any case."""

    def _fence(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        pass

    def _griddepcontrol(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        if modifiers[0] == "wait" and self.preceding is not None:
            assert self.preceding.wait(WAIT_S), "the preceding kernel does not end"
