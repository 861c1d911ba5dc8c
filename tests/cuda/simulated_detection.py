"""Tests of the simulator itself: the mistakes in kernels that it must notice. Run by `test_simulator.py`."""

# ruff: noqa: E402
from __future__ import annotations

import numpy as np
import pytest

from tests.cuda import simulator  # first: it replaces what kernels import
from tests.cuda.simulator import launch, simulation
from tests.helpers.cuda_host import install

install(run=simulation.run, n_sms=2)

from numba import cuda

from numballama import kernels_cuda
from numballama.cuda.intrinsics import (
    address,
    cp_async_16,
    cp_async_commit,
    cp_async_wait_all,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    ld_global_v4_u32,
    ld_shared_v4_u32,
    ld_v4_f32,
    shared_address,
)
from numballama.cuda.kernels import common, decode_attention, dequant, dot, gemv, reduce, sampling
from numballama.cuda.launch import Launch, named
from tests.cuda.checks import Bench


def test_every_instruction_is_emulated() -> None:
    """All but those of kernels for many tokens, on tensor cores: test_tensor_cores runs their PTX."""
    for module in (kernels_cuda, common, decode_attention, dequant, dot, gemv, reduce, sampling):
        assert not set(vars(module)) & set(simulator.missing)


@cuda.jit
def reverses(x, wait):
    shared = cuda.shared.array(0, np.float32)
    griddepcontrol_wait()
    t = cuda.threadIdx.x
    shared[t] = x[t]
    if wait[0]:
        cuda.syncthreads()
    x[t] = shared[63 - t]


def test_it_notices_a_missing_barrier() -> None:
    x = np.arange(64, dtype=np.float32)
    np.testing.assert_array_equal(launch(reverses, x, np.array([1]))[0], x[::-1])
    assert np.isnan(launch(reverses, x, np.array([0]))[0]).any()


@cuda.jit
def diverges(x, which):
    griddepcontrol_wait()
    t = cuda.threadIdx.x
    if which[0] == 0 and t == 5:
        return
    if which[0] == 1 and t == 40:
        cuda.syncthreads()
    x[t] = cuda.shfl_xor_sync(0xFFFFFFFF, x[t], 2 if which[0] == 2 and t == 7 else 1)
    if which[0] != 3 or t != 50:
        cuda.syncthreads()


@pytest.mark.parametrize("which", range(5))
def test_it_notices_threads_that_part(which: int) -> None:
    x = np.arange(64, dtype=np.float32)
    if which == 4:
        np.testing.assert_array_equal(launch(diverges, x, np.array([which]))[0], x.reshape(-1, 2)[:, ::-1].reshape(-1))
    else:
        with pytest.raises(AssertionError, match=r"same shuffle|different places"):
            launch(diverges, x, np.array([which]))


@cuda.jit
def copies(x, how):
    shared = cuda.shared.array(0, np.float32)
    t = cuda.threadIdx.x
    griddepcontrol_wait()
    cp_async_16(shared_address(shared, 4 * t), address(x, 4 * t), 16)
    cp_async_commit()
    if how[0]:
        cp_async_wait_all()
    x[4 * t] = ld_shared_v4_u32(shared_address(shared, 4 * t))[3].view(np.float32)


def test_it_notices_a_copy_that_is_not_awaited() -> None:
    x = np.arange(256, dtype=np.float32)
    np.testing.assert_array_equal(launch(copies, x, np.array([1]))[0][::4], x[3::4])
    assert np.isnan(launch(copies, x, np.array([0]))[0][::4]).all()


@cuda.jit
def reaches(x, how):
    t = cuda.threadIdx.x
    if how[0] == 3:
        x[t] = 1
    griddepcontrol_wait()
    if how[0] == 0:
        x[t] = x[64 + t]
    if how[0] == 1:
        x[t] = ld_v4_f32(x, t)[0]
    if how[0] == 2:
        x[t] = ld_global_v4_u32(address(x, 0) + (1 << 50))[0]  # nearer, other memory may lie there


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (0, r"element \d+ of 64 float32"),
        (1, "ld_v4_f32 at element"),
        (2, "16 bytes at"),
        (3, "writes before"),
    ],
)
def test_it_notices_what_is_out_of_place(how: int, words: str) -> None:
    with pytest.raises((IndexError, AssertionError), match=words):
        launch(reaches, np.zeros(64, np.float32), np.array([how]))


@cuda.jit
def adds(x, early):
    t = cuda.threadIdx.x
    before = x[t] if early[0] else np.float32(0)
    griddepcontrol_wait()
    x[t] = (before if early[0] else x[t]) + np.float32(1)


@pytest.mark.parametrize("early", [0, 1])
def test_it_notices_what_is_read_before_the_wait(early: int) -> None:
    """The second of two launches reads what the first one writes."""
    bench = Bench()
    x, flag = bench.put(np.zeros(64, np.float32)), bench.put(np.array([early]))
    for _ in range(2):
        simulation.run(Launch(adds, (1,), 64, named(x=x, early=flag)))
    assert np.isnan(bench.get(x)).all() if early else (bench.get(x) == 2).all()


@cuda.jit
def passes(early):
    if early[0]:
        griddepcontrol_launch_dependents()
    griddepcontrol_wait()
    if not early[0]:
        griddepcontrol_launch_dependents()


@pytest.mark.parametrize("early", [0, 1])
def test_it_notices_what_an_early_start_leaves_unwritten(early: int) -> None:
    """The third of three launches reads before its wait what the first one writes. If the second one starts it before
    its own wait, the first may still run.
    """
    bench = Bench()
    x, flags = bench.put(np.zeros(64, np.float32)), [bench.put(np.array([flag])) for flag in (0, 1)]
    simulation.run(Launch(adds, (1,), 64, named(x=x, early=flags[0])))
    simulation.run(Launch(passes, (1,), 64, named(early=flags[early])))
    simulation.run(Launch(adds, (1,), 64, named(x=x, early=flags[1])))
    assert np.isnan(bench.get(x)).all() if early else (bench.get(x) == 2).all()
