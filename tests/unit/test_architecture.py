"""The rules of the design that sources can be parsed for: who may import whom, where `numba.cuda` is, what is no place
for arithmetic, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import numballama

PACKAGE = Path(numballama.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

ORDER = [
    "errors", "validation", "config", "rope", "registry", "memory", "progress", "quantization.types", "checkpoint",
    "quantization.blocks", "quantization.activations", "quantization.convert", "quantization.policy", "files",
    "formats.gguf.header", "formats.gguf.split", "tokenizers.sentencepiece_proto", "hub", "tokenizers",
    "tokenizers.base", "tokenizers.sentencepiece", "tokenizers.scored", "tokenizers.pretokenizers", "tokenizers.bpe",
    "formats.gguf.tokenizer", "tokenizers.tiktoken", "tokenizers.huggingface", "formats.tokenizer_files",
    "formats.llama2c.layout", "formats.llama2c.reader", "formats.llama2c.kuiper", "formats.rope_permute",
    "formats.gguf.reader", "formats.gguf.writer", "formats.json_reader", "formats.safetensors", "formats.hf.config",
    "formats.hf.reader", "formats.hf.writer", "formats.meta.torch_zip", "formats.meta.reader", "formats", "loader",
    "ir", "graph", "plan", "kernels_outline", "kernel_cache", "cpu.compiler", "cuda.repack", "cpu.intrinsics",
    "cpu.vecdot", "cpu.vecdot_int8", "cpu.matmul", "kernels_cpu", "cpu.kernels_int8", "cpu.sampling", "sampling",
    "cpu.backend", "cuda.launch", "cuda.kernels.params", "cuda.lowering", "cuda.intrinsics", "cuda.mma",
    "cuda.compiler", "cuda.driver", "cuda.compile_worker", "cuda.ops.gemv", "cuda.ops.elementwise", "cuda.ops.gemm",
    "cuda.ops.linear", "cuda.ops.attention", "cuda.ops.sampling", "cuda.ops", "cuda.kernels.common",
    "cuda.kernels.dequant",
    "cuda.kernels.dot", "cuda.kernels.gemv", "kernels_cuda", "cuda.kernels.gemm", "cuda.kernels.decode_attention",
    "cuda.kernels.prefill_attention", "cuda.kernels.sampling", "cuda.kernels.copy", "cuda.weights",
    "cuda.decode_pipeline", "cuda.program", "cuda.backend",
    "reference", "session", "generate", "chat.builtin_templates", "chat.sandbox", "chat.template", "chat.encoder",
    "chat.conversation", "model", "inspection",
    "bench.profiler", "bench.bandwidth", "bench.benchmark", "export", "cli.args", "cli.bench", "cli.chat",
    "cli.doctor", "cli.export", "cli.generate", "cli.inspect", "cli.main",
    "__main__",
]  # fmt: skip
"""The flow, left to right: a module imports only what stands before it."""

CUDA = ("kernels_cuda", "cuda")
"""Where `numba.cuda` may be imported: these modules, or packages of these names."""


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "__init__" else ""


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted names of all that a file imports, with the line: `from x import y` is "x.y"."""
    package = ["numballama", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue  # an annotation may name what a module does not need
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{start}.{alias.name}", node.lineno) for alias in node.names)


def own(name: str) -> str | None:
    """The module of this package that an imported name belongs to, if it is one: the longest that exists."""
    parts = name.split(".")
    if parts[0] != "numballama":
        return None
    modules = {module_of(path) for path in SOURCES}
    return max(
        (m for m in modules if ".".join(parts[1:]) == m or ".".join(parts[1:]).startswith(f"{m}.")), key=len, default=""
    )


def test_every_module_has_its_place() -> None:
    assert {module_of(path) for path in SOURCES} - {""} == set(ORDER), "a new module is given its place in ORDER"
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_to_the_left(path: Path) -> None:
    module = module_of(path)
    if module == "":
        return  # the front door imports what it opens
    for name, line in imports(path):
        target = own(name)
        if target:
            assert ORDER.index(target) < ORDER.index(module), f"{path}:{line}: {module} imports {target}, right of it"


def test_the_parser_sees_imports() -> None:
    """The checks above are about something."""
    found = {own(name) for name, _ in imports(PACKAGE / "model.py")}
    assert {"loader", "session", "reference", "cpu", "ir", "errors"} <= found
    assert "tokenizer" not in {own(name) for name, _ in imports(PACKAGE / "checkpoint.py")}  # TYPE_CHECKING only
    assert {own(name) for name, _ in imports(PACKAGE / "formats" / "kuiper.py")} >= {"formats.layout", "checkpoint"}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_numba_cuda_is_in_one_place(path: Path) -> None:
    if module_of(path).split(".")[0] not in CUDA:
        for name, line in imports(path):
            assert not name.startswith(("numba.cuda", "numba_cuda", "cuda.")), f"{path}:{line}: {name}"
        assert not [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "numba.cuda"
        ], path


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("errors", set()),
        ("config", set()),
        ("registry", set()),
        ("rope", set()),
        ("ir", {"numpy"}),  # its dtypes only
        ("graph", set()),
        ("plan", set()),
        ("text", set()),
        ("session", {"numpy"}),
    ],
)
def test_vocabulary_and_graph_need_nothing(module: str, allowed: set[str]) -> None:
    tops = {name.split(".")[0] for name, _ in imports(PACKAGE / f"{module}.py")} - {"numballama"}
    assert tops - set(sys.stdlib_module_names) <= allowed


NUMPY_IN_MODEL = {"empty", "ndarray", "float32", "int32", "int64"}


@pytest.mark.parametrize("module", ["model", "session", "text"])
def test_no_array_arithmetic_beside_the_graph(module: str) -> None:
    """Arrays are made and copied there, nothing is computed: of NumPy only types and `empty`, of arrays no operator."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np":
            assert node.attr in NUMPY_IN_MODEL, f"{module}.py:{node.lineno}: np.{node.attr}"
        if isinstance(node, ast.BinOp):
            assert not isinstance(node.op, ast.MatMult), f"{module}.py:{node.lineno}"
        if isinstance(node, (ast.BinOp, ast.AugAssign)):
            assert ".value(" not in ast.unparse(node), f"{module}.py:{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in {"dot", "sum", "mean", "max", "argmax", "argsort", "exp"}, (
                f"{module}.py:{node.lineno}"
            )


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60, cwd=PACKAGE.parent
    )
    return set(found.stdout.split())


HEAVY = {
    "numba",
    "llvmlite",
    "sentencepiece",
    "rich",
    "tokenizers",
    "jinja2",
    "safetensors",
    "torch",
    "huggingface_hub",
}


def test_importing_the_package_is_cheap() -> None:
    loaded = modules_after("import numballama")
    assert "numballama.errors" in loaded
    assert not {name for name in loaded if name.split(".")[0] in HEAVY | {"numpy"}}


def test_help_needs_no_compiler() -> None:
    code = "import contextlib, io, numballama.cli as c\nwith contextlib.redirect_stdout(io.StringIO()):\n"
    code += "    try: c.main(['--help'])\n    except SystemExit: pass"
    assert not {name for name in modules_after(code) if name.split(".")[0] in HEAVY - {"rich"}}


def test_graph_and_loader_need_no_compiler() -> None:
    """A model can be inspected without Numba; only kernels and sampling need it."""
    loaded = modules_after("import numballama.loader, numballama.graph, numballama.plan")
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}


def test_a_gpu_with_kernels_in_the_cache_needs_no_numba() -> None:
    """Its import takes longer than all else of a start."""
    pytest.importorskip("cuda.bindings")
    loaded = modules_after(
        "import numballama.model, numballama.cuda.backend\n"
        "from numballama import registry\n"
        "registry.load('cuda')\n"
        "from numballama.cuda.ops import elementwise\n"
        "from numballama.cuda import compiler, driver, launch\n"
        "array = launch.Array(256, (4, 64), 'f32')\n"
        "ctx = launch.LaunchContext(4, 1 << 16, array, lambda n: array)\n"
        "(one,) = elementwise.add(ctx, array, array, array)\n"
        "from pathlib import Path\n"
        "assert compiler.cache_entry(one.specialization, (9, 0), Path('cache')) is not None"
    )
    assert not {name for name in loaded if name.split(".")[0] in ("numba", "llvmlite", "numba_cuda")}


def test_compiling_sees_numba() -> None:
    """The check above would notice."""
    assert "numba" in modules_after("import numballama.cpu.backend")
