"""Every Python block of README and docs runs, in order, one namespace a page, beside real models where a page names
them.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    code = "\n".join(blocks(page))
    if "stories15M.bin" in code:
        models = request.getfixturevalue("models")
        for name, real in (("stories15M.bin", "stories15M.bin"), ("tokenizer.model", "llama2_tokenizer.model")):
            (tmp_path / name).symlink_to(models / real)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"<{page.name}>", "exec"), {"__name__": page.stem})


def test_there_are_blocks() -> None:
    assert sum(len(blocks(page)) for page in PAGES) >= 3


def test_example_story(models: Path) -> None:
    words = [
        ROOT / "examples" / "story.py",
        models / "stories15M.bin",
        models / "llama2_tokenizer.model",
        "Once upon a time",
    ]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.startswith("Once upon a time") and len(done.stdout) > 100
    assert "tokens/s" in done.stderr
