"""Every Python block of README and docs runs in an empty folder, with one namespace per page; so do the examples.

The blocks of docs/cuda.md do what a machine without a GPU can, and the rest where there is one. Of commands in shell
blocks, the words are checked.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import numballama
from numballama import fusion, graph, ir, registry
from numballama.cli import main as cli
from numballama.cpu import CpuBackend
from numballama.export import export_model
from numballama.formats.hf import config as hf_config
from numballama.formats.hf import reader as hf
from numballama.loader import STORY_MODEL
from numballama.quantization import policy
from numballama.quantization.types import KV_TYPES
from numballama.server.settings import Settings
from tests.helpers.command_line import call
from tests.helpers.hf_files import save_tensors
from tests.helpers.markup import parsed
from tests.helpers.notebook import fake_ipython, run_cells

ROOT = Path(__file__).parents[2]
START = sorted((ROOT / "docs" / "start").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *START]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Remove what a page registers after its test."""
    with ExitStack() as stack:
        for table in (ir.RULES, fusion.FUSIONS, graph.LAYERS, hf_config.READERS, hf.LAYER_NAMES):
            stack.enter_context(patch.dict(table))  # type: ignore[arg-type]
        yield
    for entries in registry._kernels.values():
        entries[:] = [entry for entry in entries if entry.function.__module__.startswith("numballama.")]


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


CUDA_PAGE = ROOT / "docs" / "cuda.md"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page != CUDA_PAGE], ids=lambda page: page.name
)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(blocks(page))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"<{page.name}>", "exec"), {"__name__": page.stem})


def test_tables_of_the_page_on_scale_are_computed(capsys: pytest.CaptureFixture[str]) -> None:
    """Its block prints their rows, in order."""
    page = ROOT / "docs" / "scale.md"
    exec(compile("\n".join(blocks(page)), "<scale.md>", "exec"), {"__name__": "scale"})
    printed = capsys.readouterr().out.splitlines()
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line in printed]
    assert len(printed) == 11 and rows == printed


SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(pages: Sequence[Path] = PAGES) -> list[str]:
    """The commands of the pages, after the word `numballama`."""
    found = [block for page in pages for block in SHELL.findall(page.read_text(encoding="utf-8"))]
    lines = [line for block in found for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r"&&|[|;>]| #", line)]
    return [part.removeprefix("numballama ") for part in parts if part.startswith("numballama ")]


@pytest.mark.parametrize("words", commands())
def test_commands_are_understood(words: str) -> None:
    """They need files, networks and GPUs; that the command line takes them needs none."""
    parsed = cli.parser().parse_args(shlex.split(words))
    if hasattr(parsed, "device"):
        assert re.fullmatch(r"auto|cpu|reference|cuda(:\d)?", parsed.device)
        assert parsed.kv_dtype in (None, *KV_TYPES)
        dtypes = parsed.dtype if isinstance(parsed.dtype, list) else [parsed.dtype]  # perplexity takes a list
        assert {None, *policy.DTYPES}.issuperset(dtypes)


NOT_RUN = ("doctor", "serve", "chat", "bench")
"""Commands of the pages in docs/start that other tests run, or that wait for somebody."""


@pytest.mark.slow
def test_commands_of_the_first_pages_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that need no network and no GPU, in a folder with a model."""
    pytest.importorskip("shtab")
    shutil.copy(STORY_MODEL, tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    run = []
    for words in dict.fromkeys(commands(START)):
        if words.split()[0] not in NOT_RUN and "HuggingFaceTB/" not in words and "--device cuda" not in words:
            short = ["--max-tokens", "8"] if words.startswith("story") else []
            done = call(capsys, *shlex.split(words), *short)
            assert done.code == 0 and done.out and not done.err, (words, done.err)
            run.append(words.split()[0])
    assert len(run) >= 7 and {"story", "generate", "inspect", "completion"} <= set(run)


@pytest.mark.slow
def test_cuda_blocks_are_compiled(tmp_path: Path) -> None:
    """To PTX and to machine code; where there is a GPU they also run. In a process of its own: that of the tests may
    compile for another compute capability."""
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    pytest.importorskip("cuda.bindings", reason="NVIDIA's Python packages are not installed")
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(CUDA_PAGE)), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "registers, 0 bytes of local memory" in done.stdout


@pytest.mark.slow
def test_the_architecture_of_the_docs_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What docs/architecture.md adds gives the logits of transformers (golden/make_hf.py)."""
    folder = ROOT / "tests" / "golden" / "hf" / "olmo2-0"
    with pytest.raises(numballama.UnsupportedError, match="model_type is 'olmo2'"):
        numballama.inspect(folder)
    page = ROOT / "docs" / "architecture.md"
    exec(compile("\n".join(blocks(page)), "<architecture.md>", "exec"), {"__name__": "architecture"})
    assert "layers.1.ffn_normed" in capsys.readouterr().out
    expected = np.load(folder / "expected.npz")
    for device in ("reference", "cpu"):
        with numballama.compile(folder, device=device) as model:
            assert np.abs(model.logits(expected["ids"]) - expected["logits"]).max() <= 2e-4
    for name in ("gguf", "safetensors", "llama2c-v0"):
        with pytest.raises(numballama.UnsupportedError, match="Olmo2Config"):
            export_model(folder, tmp_path / name, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_architecture_with_an_operator_opens(tmp_path: Path) -> None:
    """A directory with the second model of docs/architecture.md; another activation is refused."""
    page = ROOT / "docs" / "architecture.md"
    names: dict[str, Any] = {"__name__": "architecture"}
    exec(compile("\n".join(blocks(page)), "<architecture.md>", "exec"), names)
    config = names["Relu2Config"](16, 24, 2, 4, 2, 40, 64)
    keys = {"model_type": "llama_relu2", "hidden_act": "relu2", "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40,
            "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
    file_names, rng = hf.tensor_names("llama_relu2"), np.random.default_rng(0)
    shapes = {file_names[name]: shape for name, shape in config.weight_shapes().items()}
    assert "model.layers.1.mlp.up_proj.weight" in shapes and len(shapes) == 2 + 2 * 8
    tensors = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    save_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(keys))
    logits = []
    for device in ("reference", "cpu"):
        with numballama.compile(tmp_path, device=device) as model:
            logits.append(model.logits([1, 2, 3]))
    assert np.abs(logits[0] - logits[1]).max() <= 1e-4 and np.ptp(logits[0]) > 1
    (tmp_path / "config.json").write_text(json.dumps(keys | {"hidden_act": "gelu"}))
    with pytest.raises(numballama.UnsupportedError, match="hidden_act is 'gelu'"):
        numballama.inspect(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "printed", "drawn"),
    [
        ("quickstart", ("little girl named Lily", "tokens/s", "steps after fusion"), ("configuration", "arena")),
        (
            "inside",
            ("KV cache 13,", "feed-forward"),
            ("memory for a context", "story.gguf", "layers 0 to 5, alike", "norm_qkv", "layer 0", "one decode step"),
        ),
    ],
)
def test_notebook_runs(
    name: str, printed: Sequence[str], drawn: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Its cells in order, in a folder of their own: they need nothing but the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CpuBackend, "measure_bandwidth", lambda self: 1e10)  # it reads a GiB several times
    displayed = fake_ipython(monkeypatch, kernel=object())
    pieces = run_cells(ROOT / "examples" / f"{name}.ipynb")
    text, pictures = capsys.readouterr().out, "".join(pieces)
    assert not [word for word in printed if word not in text] and not [word for word in drawn if word not in pictures]
    assert all(parsed(piece).text for piece in pieces if piece)
    if name == "inside":
        assert "length; 120 tokens" in displayed[-1]["text/html"], "a stream has shown itself"


WITHOUT_EXTRAS = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("cuda", "numba_cuda", "mkdocs", "ray", "mypy")
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""
"""A plugin for pytest: packages of other extras than `test` are not found."""


@pytest.mark.slow
def test_the_tests_are_collected_with_the_extra_test_alone(tmp_path: Path) -> None:
    """As README says: `pip install ".[test]" && pytest`. A module that needs another extra is skipped."""
    (tmp_path / "without_extras.py").write_text(WITHOUT_EXTRAS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    options = ["-p", "without_extras", "-p", "no:cacheprovider", "-p", "no:xdist", "--collect-only", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_there_are_blocks() -> None:
    assert sum(len(blocks(page)) for page in PAGES) >= 3


LINK = re.compile(r"\]\(([^)#:]+)\)")


def test_links_lead_to_files() -> None:
    pages = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
    links = [(page, link) for page in pages for link in LINK.findall(page.read_text(encoding="utf-8"))]
    assert not [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()]


NAMED_FILES = re.compile(r"`((?:[a-z_0-9]+/)*(?:[a-z_0-9]+\.(?:py|md)|[a-z_0-9]+/))`")


def test_files_that_pages_name_exist() -> None:
    """By a path from the repository, the package, or a folder of the package: `cpu/matmul.py`, `gemv.py`."""
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if ".git" not in path.parts}
    missing = [
        f"{page.name}: {name}"
        for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
        for name in NAMED_FILES.findall(page.read_text(encoding="utf-8"))
        if not any(file == name.rstrip("/") or file.endswith(f"/{name.rstrip('/')}") for file in files)
    ]
    assert not missing, missing


@pytest.mark.slow
def test_example_story() -> None:
    words = [str(ROOT / "examples" / "story.py"), "Once upon a time"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.startswith("Once upon a time")
    assert len(done.stdout) > 100
    assert "tokens/s" in done.stderr


@pytest.mark.slow
def test_example_chat() -> None:
    words = [str(ROOT / "examples" / "chat.py")]
    first_message = "Tell me of a little girl and her dog, who went to the park and met a big friendly bear there."
    done = subprocess.run(  # a prompt of more than the 32 tokens of a page
        [sys.executable, *words], input=f"{first_message}\nAnd then?\n", capture_output=True, text=True, check=True,
        timeout=300,
    )  # fmt: skip
    assert len(done.stdout) > 20
    first, second = (line for line in done.stderr.splitlines() if "tokens read" in line)
    assert ", 0 from the cache" in first and ", 0 from the cache" not in second


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a server with the story model."""
    pytest.importorskip("openai")
    pytest.importorskip("starlette")
    from tests.helpers.http_server import serving

    settings = Settings(api_keys=("secret",))
    with numballama.compile(None, device="cpu", max_sequences=2) as model, serving(model, settings) as server:
        yield server.url


def client_example(name: str, url: str) -> subprocess.CompletedProcess[str]:
    """What an example prints that is a client of the server. It must not fail."""
    words = [str(ROOT / "examples" / name), "--url", url, "--key", "secret"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_example_openai_client(url: str) -> None:
    done = client_example("openai_client.py", url)
    assert "60 written" in done.stdout and "' time'" in done.stdout


@pytest.mark.slow
def test_example_extract(url: str) -> None:
    """The story model knows nothing, but its answer has the shape that was asked for."""
    done = client_example("extract.py", url)
    born = re.fullmatch(r"name=.* born=(\d+) places=\[.*\]\n", done.stdout)
    assert born is not None and int(born[1]) <= 2100, done.stdout


@pytest.mark.slow
def test_example_tool_loop(url: str) -> None:
    """The first answer must be a call, which is carried out; what the story model makes of it is a story."""
    done = client_example("tool_loop.py", url)
    call = re.match(r'multiply\(\{"a": (-?\d+), "b": (-?\d+)\}\) = (-?\d+)\n', done.stderr)
    assert call is not None and int(call[1]) * int(call[2]) == int(call[3]), done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("name", ["openai_client.py", "extract.py", "tool_loop.py"])
def test_example_without_a_server(name: str) -> None:
    words = [sys.executable, str(ROOT / "examples" / name), "--url", "http://127.0.0.1:9"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"nothing answers at http://127.0.0.1:9; start it: numballama serve( MODEL)?\n", done.stderr)
