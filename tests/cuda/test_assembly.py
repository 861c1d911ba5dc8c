"""Every CUDA kernel that a plan launches, compiled to PTX and assembled by nvJitLink, for three generations of cards.

This needs NVIDIA's packages but no GPU. Numba accepts any text as inline PTX, so only the assembler finds errors in it.
It also reports how many registers a thread has, and what was spilled to local memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import numballama
from tests.helpers.cuda_host import missing_packages

pytestmark = pytest.mark.slow

if reason := missing_packages():
    pytest.skip(f"kernels are not compiled: {reason}", allow_module_level=True)

PACKAGE = Path(numballama.__file__).parent
EVERYTHING = ["all"] if os.environ.get("NUMBALLAMA_TEST_ALL") == "1" else []
"""By default some kernels are compiled for one set of types of their operands, before sm_90 some of each file only
(`assembly`). With `all`, everything is.
"""
CAPABILITIES = ("7.5", "8.0", "9.0")
"""The oldest that CUDA 13 compiles for; the first with asynchronous copies; the first with early starts."""
REGISTERS = 65536
"""Registers of a multiprocessor on all these cards."""

STACK = {
    # sine and cosine of float64 reduce large angles in a function of their own, which keeps a table of digits
    "rope_angles_kernel": {"9.0": 40, "8.0": 40, "7.5": 40},
    # three blocks leave 80 registers per thread: some addresses of quantised weights are put aside while x is staged
    "linear_kernel": {"9.0": 16, "8.0": 56, "7.5": 40},
    "gate_up_kernel": {"9.0": 32, "8.0": 64, "7.5": 48},
    "qkv_kernel": {"9.0": 40, "8.0": 80, "7.5": 56},
    "qkv_rope_kernel": {"9.0": 72, "8.0": 48, "7.5": 16},
    # for older cards the assembler keeps more values than there are registers
    "attention_grouped_rows_kernel": {"8.0": 8, "7.5": 8},
    "attention_group_64_kernel": {"8.0": 128, "7.5": 104},
    "attention_group_128_kernel": {"8.0": 88, "7.5": 152},
    "attention_few_64_kernel": {"8.0": 88, "7.5": 120},
    "attention_few_128_kernel": {"8.0": 352, "7.5": 56},
    "skinny_8_kernel": {"8.0": 112, "7.5": 112},
    "skinny_16_kernel": {"8.0": 128, "7.5": 120},
    # two sets of sums are stored one after the other: some of the second are put aside
    "wgmma_tall_kernel": {"9.0": 240},
    "attention_128_kernel": {"8.0": 8, "7.5": 80},  # a real 7.5 has too little shared memory for it to be launched
}
"""Maximum bytes of stack of a kernel on a card, if not 0, for all types of its operands."""

STACK_OF_BLOCKS = {
    # words with several factors want a register or two more than those with one scale
    "linear_kernel": {"9.0": 16, "8.0": 72, "7.5": 48},
    "gate_up_kernel": {"9.0": 32, "8.0": 72, "7.5": 72},
    "qkv_kernel": {"9.0": 48, "8.0": 88, "7.5": 72},
    "qkv_rope_kernel": {"9.0": 80, "8.0": 40, "7.5": 16},
    "skinny_8_kernel": {"8.0": 112, "7.5": 112},
    "skinny_16_kernel": {"8.0": 128, "7.5": 120},
    "wgmma_tall_kernel": {"9.0": 240},
}
"""The same for weights of q4_1, q4_k and q6_k."""

STACK_OF_Q5_K = STACK_OF_BLOCKS | {
    # the address of the fifth bits is one more
    "linear_kernel": {"9.0": 24, "8.0": 72, "7.5": 48},
    "qkv_rope_kernel": {"9.0": 80, "8.0": 40, "7.5": 24},
}
"""The same for weights of q5_k."""

STACK_OF_Q8_0 = {
    # quants have scales, with addresses of their own
    "attention_grouped_kernel": {"8.0": 16, "7.5": 16},
    "attention_grouped_rows_kernel": {"8.0": 40, "7.5": 40},
}
"""The same for a KV cache of q8_0."""

STREAMING = {"linear_kernel", "gate_up_kernel", "qkv_kernel", "qkv_rope_kernel", "skinny_8_kernel", "skinny_64_kernel"}
"""Kernels that copy weights to shared memory asynchronously."""


def start(capability: str, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.cuda.assembly", capability, str(out), *EVERYTHING]
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}
    )


def finish(process: subprocess.Popen[str], out: Path) -> dict[str, Any]:
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Capability → what `assembly` found; a process for each of them."""
    files = {capability: tmp_path_factory.mktemp("ptx") / f"{capability}.json" for capability in CAPABILITIES}
    processes = {capability: start(capability, out) for capability, out in files.items()}
    try:
        return {capability: finish(process, files[capability]) for capability, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def described(kernel: dict[str, Any]) -> str:
    return f"{kernel['kernel']}({', '.join(kernel['kinds'])})"


def test_every_kernel_of_the_package_is_among_them(assembled: dict[str, dict[str, Any]]) -> None:
    """The models of `assembly` launch all that there is; for older cards by default a kernel of each file."""
    from tests.cuda.assembly import BEFORE_WIDE, BULK, FAMILIES, HOPPER

    script = (
        "import json, sys\n"
        "import importlib, pkgutil\n"
        "import numballama.kernels_cuda\n"
        "from numballama import registry\n"
        "from numballama.cuda import kernels\n"
        "import numballama.cuda.ops\n"
        "for each in pkgutil.iter_modules(kernels.__path__, 'numballama.cuda.kernels.'):\n"
        "    if each.name.rpartition('.')[2] != 'copy':  # a yardstick, no operator\n"
        "        importlib.import_module(each.name)\n"
        "from numba.cuda.dispatcher import CUDADispatcher\n"
        "homes = ('numballama.cuda.kernels.', 'numballama.kernels_cuda')\n"
        "modules = [m for name, m in sys.modules.items() if name.startswith(homes)]\n"
        "found = [v for m in modules for v in vars(m).values() if isinstance(v, CUDADispatcher)]\n"
        "kernels = {v.py_func.__name__: v.py_func.__module__ for v in found if not v.targetoptions.get('device')}\n"
        "ops = {op for op, backend in registry._kernels if backend == 'cuda'}\n"
        "print(json.dumps([kernels, sorted(ops)]))"
    )
    kernels, ops = json.loads(python(script))
    for capability in CAPABILITIES:
        found = assembled[capability]
        every = set(kernels) - (set() if capability == "9.0" else HOPPER | BEFORE_WIDE | BULK)
        wanted = FAMILIES if capability != "9.0" and not EVERYTHING else every
        assert {kernel["kernel"] for kernel in found["kernels"]} == wanted
        # those without the norm come where a norm has two readers
        assert set(ops) - set(found["ops"]) <= {"qkv", "gate_up"}
    of_each_file = FAMILIES | HOPPER | BULK | BEFORE_WIDE
    assert {kernels[name] for name in of_each_file} == set(kernels.values()), "a kernel of each file"
    keys = {key: {(k["kernel"], tuple(k["kinds"])) for k in assembled[key]["kernels"]} for key in CAPABILITIES}
    assert len(keys["9.0"]) == len(assembled["9.0"]["kernels"]) > 50
    new = {name for name, _ in (keys["7.5"] | keys["8.0"]) - keys["9.0"]}
    # for sm_90 the first is where others have wgmma, and the second is compiled for other types
    assert new <= {"skinny_64_kernel", "qkv_rope_kernel"}, "older cards: the same kernels"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_numbers_stay_in_registers(assembled: dict[str, dict[str, Any]], capability: str) -> None:
    for kernel in assembled[capability]["kernels"]:
        assert kernel["local"] == 0, f"{described(kernel)}: {kernel['local']} bytes of local memory"
        of_blocks = {"q4_1*", "q4_k*", "q5_k*", "q6_k*"} & set(kernel["kinds"])
        table = STACK_OF_Q8_0 if "q8_0*" in kernel["kinds"] else STACK_OF_BLOCKS if of_blocks else STACK
        table = STACK_OF_Q5_K if "q5_k*" in of_blocks else table
        allowed = table.get(kernel["kernel"], {}).get(capability, 0)
        assert 0 <= kernel["stack"] <= allowed, f"{described(kernel)}: {kernel['stack']} bytes of stack, not {allowed}"
        most = REGISTERS // (kernel["blocks"] * kernel["threads"])
        assert 0 < kernel["registers"] <= most, f"{described(kernel)}: {kernel['registers']} registers, not {most}"
        assert kernel["bytes"] > 1000


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_instructions_that_a_card_has(assembled: dict[str, dict[str, Any]], capability: str) -> None:
    """Every kernel of sm_90 waits for the one before and lets the next one start; asynchronous copies are for sm_80 and
    newer; older cards do without.
    """
    from tests.cuda.assembly import BULK, HOPPER, TMA, WIDE

    copying, tried = set(), {kernel["kernel"] for kernel in assembled[capability]["kernels"]}
    for kernel in assembled[capability]["kernels"]:
        opcodes = kernel["opcodes"]
        control = {opcode for opcode in opcodes if opcode.startswith("griddepcontrol")}
        both = {"griddepcontrol.wait", "griddepcontrol.launch_dependents"}
        assert control == (both if capability == "9.0" else set()), described(kernel)
        if any(opcode.startswith("cp.async.c") for opcode in opcodes):
            copying.add(kernel["kernel"])
            waits = {"cp.async.commit_group", "cp.async.wait_group"} <= set(opcodes)  # or at an mbarrier
            assert waits or any(opcode.startswith("cp.async.mbarrier") for opcode in opcodes), described(kernel)
        by_engine = any(opcode.startswith("cp.async.bulk") for opcode in opcodes)
        assert by_engine == (kernel["kernel"] in TMA | WIDE | BULK), described(kernel)
        uses_wgmma = any(opcode.startswith("wgmma.mma_async") for opcode in opcodes)
        assert uses_wgmma == (kernel["kernel"] in HOPPER), described(kernel)
    assert copying >= STREAMING & tried if capability != "7.5" else not copying


def test_the_parser_sees_instructions() -> None:
    """The check above finds instructions at all."""
    from tests.cuda.assembly import opcodes

    text = (
        "{\n.reg .u64 s; cvta.to.shared.u64 s, %rd1; cp.async.ca.shared.global [s], [%rd2], 4, %r1;}\n"
        "\t@p ld.global.nc.u32 a, [%rd1];\n\tgriddepcontrol.wait;\n\t@!%p3 bra $L__BB0_1;\n"
    )
    assert opcodes(text) == [
        "bra", "cp.async.ca.shared.global", "cvta.to.shared.u64", "griddepcontrol.wait", "ld.global.nc.u32",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_second_process_compiles_nothing(assembled: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    again = finish(start("9.0", out := tmp_path / "again.json"), out)
    assert all(kernel["cached"] for kernel in again["kernels"])
    without = [
        [{name: value for name, value in kernel.items() if name != "cached"} for kernel in result["kernels"]]
        for result in (assembled["9.0"], again)
    ]
    assert without[0] == without[1]


def python(script: str, **environment: str) -> str:
    first = environment.pop("first", str(PACKAGE.parent))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=first,
        env={**os.environ, "PYTHONPATH": first, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


BAD = """
from pathlib import Path
from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numballama.errors import DeviceError
from numballama.kernel_cache import cuda_cache_directory
from numballama import kernels_cuda
from numballama.cuda import compiler
from numballama.cuda.launch import Specialization


@intrinsic
def nonsense(typingctx, x):
    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
        text = "add.f99 $0, $1, $1;"
        return builder.call(ir.InlineAsm(kind, text, "=f,f", side_effect=True), args)

    return types.float32(types.float32), codegen


@cuda.jit
def wrong(x):
    x[0] = nonsense(x[0])


kernel = Specialization(wrong, (("x", "f32*"),), 32)
assert ".f99" in compiler.to_ptx(kernel, (8, 0))  # Numba lets it pass
cache = cuda_cache_directory()
for _ in range(2):
    try:
        compiler.compile_kernel(kernel, (8, 0), cache)
    except DeviceError as error:
        print("refused:", str(error).replace("\\n", " "))
assert not list(cache.glob("wrong*"))  # what is refused is not kept

parameters = ("tokens", "i32*"), ("a", "f32*"), ("b", "f32*"), ("out", "f32*"), ("columns", "i64")
add = Specialization(kernels_cuda.add_kernel, parameters, 256)
first = compiler.compile_kernel(add, (8, 0), cache)
(file,) = cache.glob("add_kernel*.cubin")
second = compiler.compile_kernel(add, (8, 0), cache)
assert (first.cached, second.cached) == (False, True) and first.machine == second.machine
whole = file.read_bytes()
for damaged in (b"", b"{", whole[:20], whole[:-1], b"{}\\n", b"[]\\n"):
    file.write_bytes(damaged)  # by a crash, or by another version
    assert not compiler.compile_kernel(add, (8, 0), cache).cached, damaged
    assert compiler.compile_kernel(add, (8, 0), cache).cached, damaged
try:
    compiler.compile_kernel(add, (9, 0), None)
except Exception as error:
    print("another capability:", error)
"""


def test_bad_ptx_is_refused_and_the_cache_heals(tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text(BAD)
    output = python(f"exec(compile(open({str(script)!r}).read(), {str(script)!r}, 'exec'))",
                    NUMBALLAMA_CACHE=str(tmp_path / "cache"))  # fmt: skip
    refused = [line for line in output.splitlines() if line.startswith("refused: nvJitLink refuses a kernel")]
    assert len(refused) == 2 and all(".f99" in line for line in refused), output
    assert "another capability: this process compiles kernels for (8, 0)" in output


@pytest.mark.parametrize("name", ["kernels_cuda.py", "cuda/kernels/common.py", "cuda/intrinsics.py"])
def test_an_edited_source_has_another_cache(tmp_path: Path, name: str) -> None:
    """A kernel is kept by the sources of all of them: an edited helper in another file counts as well."""
    copy = tmp_path / "numballama"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.gguf"))
    ask = "from numballama.kernel_cache import cuda_cache_directory\nprint(cuda_cache_directory().name)"
    before = python(ask, first=str(tmp_path), NUMBALLAMA_CACHE=str(tmp_path / "cache"))
    assert before == python(ask, first=str(tmp_path), NUMBALLAMA_CACHE=str(tmp_path / "cache"))
    with (copy / name).open("a") as file:
        file.write("\n# edited\n")
    assert before != python(ask, first=str(tmp_path), NUMBALLAMA_CACHE=str(tmp_path / "cache"))
