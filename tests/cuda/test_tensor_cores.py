"""Operators that prompts run on a GPU, linear layers and attention of many tokens: the cases of `gemm_cases.py`.

Numba's simulator has no tensor cores and no asynchronous copies, so `tests/cuda/emulator` runs the kernels' PTX; with
`-m gpu` the machine code runs on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import numballama
import numballama.cuda.ops
from numballama import registry
from numballama.errors import DeviceError

pytestmark = pytest.mark.slow

if any(find_spec(name) is None for name in ("numba_cuda", "cuda")):
    pytest.skip("kernels are not compiled: NVIDIA's packages are not installed", allow_module_level=True)

HERE, PACKAGE = Path(__file__).parent, Path(numballama.__file__).parent
EVERYTHING = ["all"] if os.environ.get("NUMBALLAMA_TEST_ALL") == "1" else []


def run_cases(*arguments: str, module: str = "gemm_cases") -> str:
    """Run a file of cases in a separate process, because a process compiles for one capability."""
    path = os.pathsep.join([str(PACKAGE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", f"tests.cuda.{module}", *arguments, *(EVERYTHING if arguments else [])],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=1200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


CAPABILITIES = ("7.5", "9.0")


@pytest.fixture(scope="module")
def emulated() -> Iterator[dict[tuple[str, str], Future[str]]]:
    """(module, capability) → what it printed: two processes at a time."""
    with ThreadPoolExecutor(2) as pool:
        pairs = [(module, capability) for module in ("gemm_cases", "skinny_cases") for capability in CAPABILITIES]
        pairs += [("wgmma_cases", "9.0"), ("rank_cases", "9.0")]
        yield {pair: pool.submit(run_cases, pair[1], module=pair[0]) for pair in pairs}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_emulated(capability: str, emulated: dict[tuple[str, str], Future[str]]) -> None:
    """Every kernel within its bounds, for cards without and with m16n8k16, bfloat16 and asynchronous copies; none of
    their values are spilled to local memory. For sm_75 of some types (`older_cards`)."""
    assert "attention bf16" in emulated["gemm_cases", capability].result()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_few_tokens_emulated(capability: str, emulated: dict[tuple[str, str], Future[str]]) -> None:
    """The same for linear layers of 2 to 128 tokens; a row's bits do not depend on other rows or on their number."""
    assert "same rows q4_k: the same bits" in emulated["skinny_cases", capability].result()


def test_wgmma_emulated(emulated: dict[tuple[str, str], Future[str]]) -> None:
    """The same for attention and linear layers by wgmma. Which writes their fences make visible is tried on a GPU only,
    as are wider tiles and all types.
    """
    printed = emulated["wgmma_cases", "9.0"].result()
    assert "a window of 100" in printed and "tiles of 256 tokens" in printed


def test_ranks_emulated(emulated: dict[tuple[str, str], Future[str]]) -> None:
    """Exchanges between ranks on GPUs, a thread for each rank. Whether other GPUs see the writes in order is tried on
    GPUs only.
    """
    printed = emulated["rank_cases", "9.0"].result()
    assert "2 ranks: a wait that is ended" in printed and "3 ranks: tokens of rank 0" in printed


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    from numballama.cuda.driver import Device

    try:
        Device()
    except DeviceError as error:
        pytest.skip(f"no GPU: {error}")
    assert "attention bf16" in run_cases()
    assert "same rows q6_k: the same bits" in run_cases(module="skinny_cases")
    assert "a window of 100" in run_cases(module="wgmma_cases")
    assert "2 ranks: tokens of rank 0" in run_cases(module="rank_cases")


def test_emulated_tensor_cores() -> None:
    """The emulator's own ldmatrix and mma, on a warp's product written down without them."""
    from tests.cuda.emulator import Memory, Program, run

    ptx = """
.visible .entry product(.param .u64 product_0, .param .u64 product_1)
{
    .reg .b32 %r<20>; .reg .f32 %f<8>; .reg .b64 %rd<8>;
    .shared .align 16 .b8 tile[768];
    ld.param.u64 %rd1, [product_0]; ld.param.u64 %rd2, [product_1];
    mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; cvt.u64.u32 %rd3, %r2; add.s64 %rd4, %rd1, %rd3;
    mov.u32 %r3, tile; add.s32 %r4, %r3, %r2;
    cp.async.cg.shared.global [%r4], [%rd4], 16; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r4];
    mov.f32 %f1, 0f00000000;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f2, %f3, %f4, %f5}, {%r5, %r6, %r7, %r8}, {%r5, %r7},
        {%f1, %f1, %f1, %f1};
    add.s64 %rd5, %rd2, %rd3; st.global.v4.f32 [%rd5], {%f2, %f3, %f4, %f5};
    ret;
}
"""
    memory = Memory()
    matrices = np.random.default_rng(0).integers(-8, 8, (4, 8, 8)).astype(np.float16)
    out = memory.put(np.zeros((32, 4), np.float32))
    run(Program(ptx), memory, (1,), 32, [memory.put(matrices), out])
    m = matrices.astype(np.float32)
    a = np.block([[m[0], m[2]], [m[1], m[3]]])  # 16 × 16
    b = np.concatenate([m[0], m[2]], axis=1).T  # 16 × 8: rows of the matrices are columns of B
    got, want = memory.get(out, (32, 4), np.float32), a @ b
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        expected = [want[row, column], want[row, column + 1], want[row + 8, column], want[row + 8, column + 1]]
        assert got[lane].tolist() == expected


WGMMA = """
.visible .entry product(.param .u64 product_0, .param .u64 product_1)
{
    .reg .b32 %r<8>; .reg .f32 %f<8>; .reg .b64 %rd<12>;
    .shared .align 1024 .b8 tile[10240];
    ld.param.u64 %rd1, [product_0]; ld.param.u64 %rd2, [product_1];
    mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; cvt.u64.u32 %rd3, %r2; add.s64 %rd4, %rd1, %rd3;
    mov.u32 %r3, tile; add.s32 %r4, %r3, %r2;
    COPIES cp.async.commit_group; cp.async.wait_group 0; fence.proxy.async.shared::cta; bar.sync 0;
    cvt.u64.u32 %rd5, %r3; shr.u64 %rd5, %rd5, 4; add.s64 %rd6, %rd5, A_TILE; add.s64 %rd7, %rd5, B_TILE;
    mov.f32 %f1, 0f3f800000; mov.f32 %f2, 0f3f800000; mov.f32 %f3, 0f3f800000; mov.f32 %f4, 0f3f800000;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}, %rd6, %rd7, 1, 1, 1, 0, TRANSPOSED;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    add.s64 %rd8, %rd2, %rd3; st.global.v4.f32 [%rd8], {%f1, %f2, %f3, %f4};
    ret;
}
""".replace(
    "COPIES", " ".join(f"cp.async.cg.shared.global [%r4+{at}], [%rd4+{at}], 16;" for at in range(0, 10240, 2048))
)


@pytest.mark.parametrize("transposed", [False, True])
def test_emulated_wgmma(transposed: bool) -> None:
    """The emulator's own wgmma, of a tile of 64 columns: A is 64 rows, B the 8 after them, or 16 rows transposed."""
    from tests.cuda.emulator import Memory, Program, run

    common = 1 << 62 | 64 << 32 | 1 << 16  # then 16 columns are 2 of a descriptor's units, 16 rows 128
    ptx = WGMMA.replace("A_TILE", f"{common + 2}").replace("B_TILE", f"{common + (128 if transposed else 512 + 2)}")
    memory = Memory()
    tile = np.random.default_rng(0).integers(-8, 8, (80, 64)).astype(np.float16)
    row, piece = np.arange(80)[:, None], np.arange(8)[None]
    swizzled = memory.put(tile.reshape(80, 8, 8)[row, piece ^ row & 7])
    out = memory.put(np.zeros((128, 4), np.float32))
    run(Program(ptx.replace("TRANSPOSED", str(int(transposed)))), memory, (1,), 128, [swizzled, out])
    a, b = tile[:64, 16:32].astype(np.float32), tile[64:72, 16:32].astype(np.float32)
    if transposed:
        b = tile[16:32, :8].T.astype(np.float32)
    got, want = memory.get(out, (128, 4), np.float32), a @ b.T + 1
    for thread in range(128):
        row, column = thread // 32 * 16 + thread % 32 // 4, 2 * (thread % 4)
        expected = [want[row, column], want[row, column + 1], want[row + 8, column], want[row + 8, column + 1]]
        assert got[thread].tolist() == expected


TURNS = """
.visible .entry turns(.param .u64 turns_0)
{
    .reg .b32 %r<8>; .reg .b64 %rd<8>; .reg .pred %p<4>;
    .shared .align 8 .b8 place[136];
    ld.param.u64 %rd1, [turns_0]; mov.u32 %r1, %tid.x; mov.u32 %r2, place; and.b32 %r3, %r1, 31; shl.b32 %r4, %r3, 2;
    add.s32 %r5, %r2, %r4; setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared::cta.b64 [%r2+128], 32; bar.sync 0;
    setp.ge.u32 %p2, %r1, 32; @%p2 bra reads;
    barrier.cta.sync 1, 64; st.shared.u32 [%r5], %r1; ARRIVE bra done;
reads:
    barrier.cta.arrive 1, 64;
again:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r2+128], 0; @!%p3 bra again;
    ld.shared.u32 %r6, [%r5]; cvt.u64.u32 %rd2, %r4; add.s64 %rd3, %rd1, %rd2; st.global.u32 [%rd3], %r6;
done:
    ret;
}
"""


def test_emulated_barriers() -> None:
    """The emulator's own: a warp writes after the other came to a named barrier, which reads after the mbarrier."""
    from tests.cuda.emulator import Memory, Program, run

    memory = Memory()
    out = memory.put(np.zeros(32, np.uint32))
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%r2+128];"
    run(Program(TURNS.replace("ARRIVE", arrive)), memory, (1,), 64, [out])
    assert memory.get(out, (32,), np.uint32).tolist() == list(range(32))
    with pytest.raises(AssertionError, match="wait for each other"):
        run(Program(TURNS.replace("ARRIVE", "")), memory, (1,), 64, [out])


TOGETHER = """
.visible .entry together(.param .u64 together_0, .param .u64 together_1)
{
    .reg .b32 %r<12>; .reg .b64 %rd<12>; .reg .pred %p<4>;
    .shared .align 16 .b8 place[1024];
    ld.param.u64 %rd1, [together_0]; ld.param.u64 %rd2, [together_1];
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; shl.b32 %r3, %r1, 2; mov.u32 %r4, place; add.s32 %r5, %r4, %r3;
    shl.b32 %r6, %r2, 8; add.s32 %r6, %r6, %r3; cvt.u64.u32 %rd3, %r6;
    add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
    mov.u32 %r7, 0; xor.b32 %r8, %r3, 252; add.s32 %r8, %r4, %r8; mov.u32 %r10, 0;
    and.b32 %r11, %r2, 1; setp.ne.u32 %p2, %r11, 0; and.b32 %r11, %r2, 2; setp.ne.u32 %p3, %r11, 0;
again:
    cp.async.ca.shared.global [%r5], [%rd4], 4; cp.async.commit_group;
    cp.async.ca.shared.global [%r5+512], [%rd4], 4; cp.async.commit_group;
    @%p2 cp.async.commit_group; cp.async.wait_group 1; @%p3 cp.async.wait_group 0; bar.sync 0;
    ld.shared.u32 %r9, [%r8]; add.s32 %r10, %r10, %r9; ld.shared.u32 %r9, [%r5+512]; xor.b32 %r10, %r10, %r9;
    bar.sync 0;
    cp.async.wait_group 0; add.s32 %r7, %r7, 1; setp.le.u32 %p1, %r7, %r2; @%p1 bra again;
    st.global.u32 [%rd5], %r10;
    ret;
}
"""
"""Each block repeats two copies as many times as its number says, and once more. The second has not arrived when a
thread reads it, except where another group comes after it (odd blocks) or the wait is for all (blocks 2 and 3).
"""


def test_emulated_blocks_that_run_together() -> None:
    """They have shared memory and groups of copies of their own, also where some go on longer than others."""
    from tests.cuda.emulator import Memory, Program, run

    memory, numbers = Memory(), np.random.default_rng(1).integers(0, 1 << 20, (5, 64)).astype(np.uint32)
    source, out = memory.put(numbers), memory.put(np.zeros((5, 64), np.uint32))
    program = Program(TOGETHER)
    assert program.is_plain and not Program(TURNS.replace("ARRIVE", "")).is_plain
    run(program, memory, (5,), 64, [source, out])
    want = np.zeros((5, 64), np.uint32)
    for block in range(5):
        for _ in range(block + 1):
            second = numbers[block] if block & 3 else np.uint32(0xFFFFFFFF)
            want[block] = want[block] + numbers[block, ::-1] ^ second
    assert memory.get(out, (5, 64), np.uint32).tolist() == want.tolist()


TYPES = ("f32", "f16", "bf16", "int8", "q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k")


@pytest.mark.parametrize("kind", TYPES)
def test_one_token_takes_no_scratch(kind: str) -> None:
    """Decoding reads weights as they are, a classifier of 128,256 rows too; so does a run for the last token."""
    for op, types in (("linear", ["f32", kind]), ("norm_linear", ["f32", "f32", kind])):
        (space,) = registry.find(op, "cuda", types).scratch.values()
        shapes = [(4096,)] * (len(types) - 2) + [(128256, 4096)]
        assert space((1, 4096), *shapes, workers=132) == (0,)
        (numbers,) = space((512, 4096), *shapes, workers=132)
        assert 4 * numbers < 160 << 20  # of a weight of 1 GB in float16, a part at a time
