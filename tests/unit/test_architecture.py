"""Rules of the design that are checked by parsing the sources.

Which module may import which, where `numba.cuda` is imported, which modules compute nothing, what importing the package
loads, where each module's tests are, and which words are not used. Each test collects all violations and lists them in
one message.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import cache, lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import numballama

PACKAGE = Path(numballama.__file__).parent
TESTS = Path(__file__).parents[1]
SOURCES = sorted(PACKAGE.rglob("*.py"))

ORDER = """
    errors validation progress
    host: cgroup environment interrupts child call_types garbage
    config rope memory
    checkpoint
    quantization: types blocks search activations convert kv policy
    files hub
    tokenizers: eog base partition sentencepiece_proto sentencepiece pretokenizers library bpe tiktoken huggingface \
            vocab_merges scored llama2c gguf
    formats: limits tensors tensor_names json_reader rope_permute safetensors gguf.header gguf.split gguf.tokenizer \
            gguf.reader gguf.writer meta.torch_zip hf.config hf.tensor_map hf.weight_files hf.quantized \
            hf.text_settings tokenizer_files hf.text_files hf.reader hf.writer llama2c.layout llama2c.llama2c \
            llama2c.kuiper meta.reader
    loader
    visualize: parts html layout graph plan card profile stream
    ir ops registry graph fusion plan
    kernel_cache
    sampling
    cpu: fork compiler intrinsics workers vecdot tiling panel_bytes products_int8 activations_int8 \
            vecdot_int8 panel_f32 matmul attend kv_cache kernels_cpu kernels_int8 collectives ops sampling executor \
            bandwidth timing backend
    cuda: repack nccl launch lowering arithmetic intrinsics system_memory quant_traits kernels.params mma fragments \
            group_mma barriers clusters wgmma tma ops.collectives ops.gemv ops.elementwise ops.rounding ops.wgmma_gemm \
            ops.gemm ops.wide ops.skinny ops.linear ops.attention ops.joins ops.sampling ops.repack kernels.common \
            kernels.collectives kernels.linear_sums kernels.reduce kernels.dequant kernels.dot kernels.gemv_x \
            kernels.rounding kernels.gemv kernels_cuda kernels.kv_q8_0 kernels.gemm \
            kernels.skinny_x kernels.skinny_sum kernels.skinny kernels.block_decode \
            kernels.wgmma_loads kernels.wgmma_gemm kernels.wide_loads kernels.wide \
            kernels.kv_source kernels.decode_attention kernels.rows_attention kernels.group_queries \
            kernels.attention_out kernels.group_attention kernels.bulk_attention kernels.prefill_attention \
            kernels.wgmma_attention kernels.logits kernels.sampling kernels.copy kernels.repack compiler driver peers \
            selfcheck compile_worker upload weights sampler_table decode_pipeline program bandwidth timing backend
    reference
    parallel: shares weights shard communication rank_memory hangs backend graph_json rank_device rank_process processes
    backend session
    engine: interrupts sequence pages runner request logprobs constraints driver stats scheduler engine capacity \
            model_runner
    structured: checker patterns rewrite disjoint schema vocabulary formats lark blame forced constraint compiler
    generate
    chat: sandbox builtin_templates template tool_messages encoder text_model conversation
    export inspection
    bench: traffic debug profiler trace benchmark sweep llama_cpp perplexity
    explain: values tokens terminal html explanation
    model importance
    doctor: packages cache check cpu links gpu report
    server: settings errors pauses tools.definitions tools.events tools.custom fields tool_fields protocol params \
            client http metrics tools.scanner tools.call tools.parser tools.grammar tools.messages tools.formats \
            page.markdown service generation logprobs call completions content_tokens custom_tools chat_core chat \
            responses_protocol responses messages tokens answers openapi guard app loader run \
            link remote http_process engine_host processes affinity ray_app
    cli: streams parser args completion doctor inspect explain batch generate remote chat serve bench perplexity \
         export main
    __main__
"""
"""The flow, from left to right: a module imports only modules before it.

A line with a colon is a package and its modules. The others are flat modules.
"""

FLAT_PARTS = ("kernels_cpu", "kernels_cuda")
"""Flat modules that belong to a package: the kernels that a reader looks at first."""


@lru_cache
def order() -> list[tuple[str, str]]:
    """`ORDER` as (module, its group); the group is the package, or the flat module itself."""
    modules = []
    for line in ORDER.replace("\\\n", " ").splitlines():
        package, colon, names = line.rpartition(":")
        for name in names.split():
            module = name if not colon or name in FLAT_PARTS else f"{package.strip()}.{name}"
            modules.append((module, package.strip() or name))
    return modules


class Import(NamedTuple):
    """One imported name: absolute and dotted (`from x import y` is "x.y"), and its line."""

    name: str
    line: int


def module_of(path: Path) -> str:
    """Dotted name below `numballama`: "cpu.matmul"; a package's `__init__.py` is "cpu", the package's own is ""."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


MODULES = {module_of(path): path for path in SOURCES}
PACKAGES = {module for module, path in MODULES.items() if path.name == "__init__.py"} - {""}


@cache  # there are more files than its default
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """All imports of a file, inside functions too, except those under `if TYPE_CHECKING`."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[Import]:
    package = ["numballama", *path.relative_to(PACKAGE).parent.parts]
    tree = tree_of(path)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(f"{start}.{alias.name}", node.lineno) for alias in node.names)


def target_of(name: str) -> str | None:
    """The module of this package that an imported name belongs to: the longest that exists, or None."""
    first, *rest = name.split(".")
    if first != "numballama":
        return None
    return next(module for n in range(len(rest), -1, -1) if (module := ".".join(rest[:n])) in MODULES)


def report(violations: Iterable[str]) -> None:
    """Fail with all violations in one message."""
    found = list(violations)
    assert not found, "\n" + "\n".join(found)


def test_every_module_has_its_place() -> None:
    modules = [module for module, _ in order()]
    assert len(modules) == len(set(modules)), "a module stands twice in ORDER"
    missing, gone = set(MODULES) - PACKAGES - {""} - set(modules), set(modules) - set(MODULES)
    assert not missing and not gone, f"give a new module its place in ORDER: {missing or '-'}; remove: {gone or '-'}"


def test_imports_point_to_the_left() -> None:
    """A package's `__init__.py` stands behind its modules: it may import them, and who imports it may need them all."""
    place: dict[str, float] = {module: n for n, (module, _) in enumerate(order())}
    for package in PACKAGES:
        inside = [n for module, n in place.items() if module.startswith(f"{package}.")]
        place[package] = max(inside) + 0.5 if inside else 0
    report(
        f"{path}:{line}: {module} imports {target}, which stands to its right in ORDER"
        for module, path in MODULES.items()
        if module  # `import numballama` opens everything, so it may import everything
        for name, line in imports(path)
        if (target := target_of(name))
        and target in place
        and module in place
        and not (target in PACKAGES and module.startswith(f"{target}."))
        and place[target] >= place[module]
    )


def test_no_circle_of_imports_between_packages() -> None:
    """A flat module counts as a package of its own, `kernels_cpu` as a part of `cpu`, `kernels_cuda` of `cuda`."""
    groups = dict(order())
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        group = groups.get(module, module.split(".")[0])
        if module:
            targets = {target for name, _ in imports(path) if (target := target_of(name))}
            graph.setdefault(group, set()).update({groups.get(t, t.split(".")[0]) for t in targets} - {group})
    assert {"config", "ir"} <= graph["graph"], "the graph is about something"
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("packages import each other: " + " → ".join(reversed(error.args[1])))


def test_the_parser_sees_imports() -> None:
    """The checks above find imports at all."""
    targets = {target_of(name) for name, _ in imports(MODULES["model"])}
    assert {"loader", "session", "backend", "errors"} <= targets
    assert "tokenizers.base" not in {target_of(name) for name, _ in imports(MODULES["checkpoint"])}  # TYPE_CHECKING
    kuiper = {target_of(name) for name, _ in imports(MODULES["formats.llama2c.kuiper"])}
    assert {"formats.llama2c.layout", "checkpoint"} <= kuiper


MOST_FLAT_MODULES = 30


def test_the_flat_part_is_small() -> None:
    flat = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(flat) <= MOST_FLAT_MODULES, (
        f"{len(flat)} modules lie flat in numballama/; move some to a package: {flat}"
    )


MOST_LINES = 500
LONG_FILES: dict[str, str] = {}
"""Files that may be longer, and why."""


def test_files_are_short() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    report(
        f"{MODULES[module]} has {length} lines, more than {MOST_LINES}: split it"
        for module, length in lengths.items()
        if length > MOST_LINES and module not in LONG_FILES
    )
    report(f"{m} is no longer long: remove it from LONG_FILES" for m in LONG_FILES if lengths.get(m, 0) <= MOST_LINES)


def test_numba_cuda_is_imported_in_one_place() -> None:
    """In `kernels_cuda.py` and `cuda/`. A machine without a GPU must not need it."""
    others = {m: path for m, path in MODULES.items() if m.split(".")[0] not in ("kernels_cuda", "cuda")}
    report(
        f"{path}:{line}: imports {name}"
        for path in others.values()
        for name, line in imports(path)
        if name.startswith(("numba.cuda", "numba_cuda", "cuda."))
    )
    report(
        f"{path}:{node.lineno}: numba.cuda"
        for path in others.values()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and node.attr == "cuda" and ast.unparse(node) == "numba.cuda"
    )
    assert any(name.startswith("numba.cuda") for name, _ in imports(MODULES["kernels_cuda"])), "the check sees it"


def test_ray_is_imported_in_one_place() -> None:
    """In `server/ray_app.py`, which only `numballama serve --ray` imports."""
    importers = {m for m, path in MODULES.items() if any(name.split(".")[0] == "ray" for name, _ in imports(path))}
    assert importers == {"server.ray_app"}
    code = "from numballama.cli.serve import require_extra; require_extra(); import numballama.server.run"
    loaded = modules_after(code)
    assert "numballama.server.run" in loaded
    assert "numballama.server.ray_app" not in loaded and "ray" not in tops(loaded)


ALLOWED_IMPORTS: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "registry": set(),
    "rope": set(),
    "ir": {"numpy"},  # its dtypes only
    "ops": set(),
    "graph": set(),
    "fusion": set(),
    "plan": set(),
    "generate": set(),
    "session": {"numpy"},
}
"""What modules of the vocabulary and of the graph import besides the standard library."""


def test_vocabulary_and_graph_need_nothing() -> None:
    report(
        f"{MODULES[module]}:{line}: imports {name}"
        for module, allowed in ALLOWED_IMPORTS.items()
        for name, line in imports(MODULES[module])
        if name.split(".")[0] not in {"numballama", *allowed, *sys.stdlib_module_names}
    )


WITHOUT_ARITHMETIC = ("model", "session", "generate")
NUMPY_NAMES = {"empty", "ndarray", "float32", "int32", "int64"}
METHODS = {"dot", "sum", "mean", "max", "argmax", "argsort", "exp"}


def test_no_array_arithmetic_beside_the_graph() -> None:
    """These modules make and copy arrays and compute nothing: only types and `empty` of NumPy, no operator."""

    def violations(module: str) -> Iterator[str]:
        for node in ast.walk(tree_of(MODULES[module])):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np":
                wrong = node.attr not in NUMPY_NAMES
            elif isinstance(node, (ast.BinOp, ast.AugAssign)):
                wrong = isinstance(node.op, ast.MatMult) or ".value(" in ast.unparse(node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                wrong = node.func.attr in METHODS
            else:
                continue
            if wrong:
                yield f"{MODULES[module]}:{node.lineno}: {ast.unparse(node)}"

    report(violation for module in WITHOUT_ARITHMETIC for violation in violations(module))


OLD_WORDS = """
    march muster walk_and_sample ROSTER ARRIVED COLDEST PATIENCE PATIENCE_S heat
    close_copies await_all_but_3 await_all copy16 wait_for_predecessor let_successor_start load_fragments
    multiply_fragments count_up keep_loop at_once blocks_at_once Gpu beyond KernelFile
    letter letters _turns _take_turn _furthest _forget_steps _settle Recording
    Deferred RUNS_AS ROUNDED_AS ROUNDINGS round_as
    enders stop_ids ENDS_OF_TURN bos_ends_text at_start own_tokenizer
    fresh_session _take_over Words LETTERS _controls spelling converse _obey person examine
"""
"""Words of earlier versions. The field has others: CONTRIBUTING.md says which."""


def test_old_words_are_gone() -> None:
    """As names in the code of the package; docstrings and comments are for readers to judge."""
    words, uses = set(OLD_WORDS.split()), dict[str, list[str]]()
    for module, path in MODULES.items():
        source = io.StringIO(path.read_text(encoding="utf-8"))
        for token in tokenize.generate_tokens(source.readline):
            if token.type == tokenize.NAME and token.string in words:
                uses.setdefault(token.string, []).append(f"{module}:{token.start[0]}")
    report(f"{word}: {' '.join(places)}" for word, places in sorted(uses.items()))


TESTED_ELSEWHERE = {
    "tests/cuda: device code, which needs the simulator, the emulator or a GPU; tests there are by what runs it": """
        kernels_cuda cuda.kernels.* cuda.intrinsics cuda.arithmetic cuda.lowering cuda.mma cuda.group_mma cuda.barriers
        cuda.clusters cuda.wgmma cuda.tma cuda.quant_traits cuda.system_memory
    """,
    "tests/cuda and tests/unit/cuda/test_ops.py: operators beside the reference, and their registrations": """
        cuda.ops.*
    """,
    "tests/cuda, on a GPU: bench/test_profiler.py asks for its figures": "cuda.bandwidth",
    "tests/kernels/test_kernels_cpu.py: every linear operator beside the reference": "cpu.matmul",
    "tests/kernels/cpu/test_kernels_int8.py: products beside ggml's": """
        cpu.vecdot_int8 cpu.activations_int8
    """,
    "tests/unit/cli/test_bench.py, bench/test_profiler.py: what the command prints": "bench.benchmark",
    "tests/unit/cli/test_main.py: in a process of its own": "__main__",
    "tests/unit/server/test_app.py: around every request": "server.call server.settings",
    "tests/unit/server/test_processes.py, test_engine_host.py: real processes, and both sides in one": """
        server.remote server.http_process
    """,
    "tests/unit/test_model.py: a model that has its weights": "chat.text_model",
    "tests/unit/server/test_*.py: what the server answers is compared with them": "server.answers",
}
"""Where the tests of modules are that have no test file of their name. A star stands for any name."""


def test_every_module_has_a_test_file_of_its_name() -> None:
    """`cpu/matmul.py` has `cpu/test_matmul.py` below a folder of tests/, `plan.py` has `test_plan.py`."""
    files = {path.relative_to(TESTS).with_suffix("").parts for path in TESTS.rglob("test_*.py")}

    def is_tested(module: str) -> bool:
        *folders, name = module.split(".")
        wanted = (*folders, f"test_{name}")
        return any(parts[len(parts) - len(wanted) :] == wanted for parts in files)

    untested = {module for module in MODULES if module not in PACKAGES | {""} and not is_tested(module)}
    patterns = " ".join(TESTED_ELSEWHERE.values()).split()
    elsewhere = {module for module in untested if any(fnmatch(module, pattern) for pattern in patterns)}
    report(
        f"{m}: no tests/**/{'/'.join([*m.split('.')[:-1], 'test_' + m.split('.')[-1]])}.py"
        for m in sorted(untested - elsewhere)
    )
    report(
        f"{pattern} is in TESTED_ELSEWHERE, and no module of that name is without a test file: remove it"
        for pattern in patterns
        if not any(fnmatch(module, pattern) for module in untested)
    )


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has imported after some code."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60, cwd=PACKAGE.parent
    )
    return set(done.stdout.split())


def tops(modules: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


HEAVY = {
    "numba", "llvmlite", "sentencepiece", "rich", "tokenizers", "jinja2", "safetensors", "torch", "huggingface_hub",
    "starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance", "ray", "shtab",
}  # fmt: skip


def test_importing_the_package_is_cheap() -> None:
    """`benchmarks/opening.py` measures the time."""
    loaded = modules_after("import numballama")
    assert "numballama.errors" in loaded
    assert not tops(loaded) & (HEAVY | {"numpy"})


def test_help_needs_no_compiler() -> None:
    code = (
        "import contextlib, io\nfrom numballama.cli.main import main\nwith contextlib.redirect_stdout(io.StringIO()):\n"
    )
    code += "    try: main(['--help'])\n    except SystemExit: pass"
    assert not tops(modules_after(code)) & (HEAVY - {"rich"})


def test_graph_and_loader_need_no_compiler() -> None:
    """A model can be inspected without Numba; only kernels and sampling need it."""
    assert not tops(modules_after("import numballama.loader, numballama.graph, numballama.plan")) & HEAVY


@pytest.mark.slow
def test_a_gpu_with_kernels_in_the_cache_needs_no_numba() -> None:
    """Its import takes longer than all else of a start."""
    pytest.importorskip("cuda.bindings")
    loaded = modules_after(
        "from pathlib import Path\n"
        "import numballama.model, numballama.cuda.backend\n"
        "from numballama.cuda import compiler, launch\n"
        "from numballama.cuda.ops import elementwise\n"
        "array = launch.Array(256, (4, 64), 'f32')\n"
        "ctx = launch.LaunchContext(4, 1 << 16, array, array, lambda n: array)\n"
        "(one,) = elementwise.add(ctx, array, array, array)\n"
        "assert compiler.cache_entry(one.specialization, (9, 0), Path('cache')) is not None"
    )
    assert not tops(loaded) & {"numba", "llvmlite", "numba_cuda"}


@pytest.mark.slow
def test_compiling_sees_numba() -> None:
    """The check above finds Numba when it is imported."""
    assert "numba" in modules_after("import numballama.cpu.backend")
