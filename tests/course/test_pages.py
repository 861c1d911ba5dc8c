"""Every page of the course runs, has its Chinese page with the same code, its picture and its solutions.

Pages with CUDA kernels, and the solutions of their exercises (`simulated_*.py`), run in a process of their own, where
Numba's simulator stands in for a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from course import draw, pages

from numballama.cli import main as cli
from tests.helpers.cuda_host import missing_packages

FOLDER = pages.FOLDER
CPU_PAGES = [page for page in pages.english() if not pages.needs_cuda(page)]
CUDA_PAGES = [page for page in pages.english() if pages.needs_cuda(page)]
ALL = [FOLDER / "README.md", *pages.english()]
NAMED_FILE = re.compile(r"`((?:[a-z_0-9]+/)*(?:[a-z_0-9]+\.(?:py|md)|[a-z_0-9]+/))`")
LINK = re.compile(r"\]\(([^)#:…]+)\)")


@pytest.mark.slow
@pytest.mark.parametrize("page", CPU_PAGES, ids=lambda page: page.name)
def test_page_runs(page: Path) -> None:
    pages.run(page)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_packages()), reason=missing_packages())
def test_cuda_pages_and_their_solutions_run_in_the_simulator() -> None:
    path = os.pathsep.join([str(pages.ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, pages.SIMULATOR: "1", "PYTHONPATH": path}
    numbers = [page.name[:2] for page in CUDA_PAGES]
    solutions = sorted(str(path) for path in Path(__file__).parent.glob("simulated_*.py"))
    for command in (
        [str(FOLDER / "pages.py"), "run", *numbers],
        [str(FOLDER / "gemv" / "measure.py"), "--simulate"],
        [str(FOLDER / "attention" / "measure.py"), "--simulate"],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", *solutions],
    ):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=pages.ROOT, env=environment
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        if "--simulate" in command:
            assert done.stdout.count(" error ") == 6, done.stdout


@pytest.mark.parametrize("numbers", [["99"], ["02", "x"], []])
def test_a_page_that_is_not_there_is_named(numbers: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"numbers of pages, 01 to 23.* found (99|x|none)$"):
        pages.numbered(numbers)
    assert [page.name[:2] for page in pages.numbered(["12", "2"])] == ["02", "12"]


def test_what_the_simulator_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba-cuda, which the extra `test` does not install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv(pages.SIMULATOR, "1")
    with pytest.raises(SystemExit, match=r"numba-cuda.*pip install -e '\.\[cuda,test\]'"):
        pages.prepare(cuda=True)


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_chinese_page_has_the_same_code(page: Path) -> None:
    """`python docs/course/pages.py copy` makes it so."""
    assert pages.fenced(pages.chinese(page)) == pages.fenced(page)
    headings = [re.findall(r"^(#+) ", text.read_text("utf-8"), re.M) for text in (page, pages.chinese(page))]
    assert headings[0] == headings[1], "the same sections"


def test_links_lead_to_files() -> None:
    files = [*ALL, *map(pages.chinese, ALL)]
    texts = {page: pages.FENCED.sub("", page.read_text(encoding="utf-8")) for page in files}
    links = [(page, link) for page, text in texts.items() for link in LINK.findall(text)]
    assert not [f"{page}: {link}" for page, link in links if not (page.parent / link).exists()]


def test_files_that_pages_name_exist() -> None:
    files = {path.relative_to(pages.ROOT).as_posix() for path in pages.ROOT.rglob("*") if ".git" not in path.parts}
    found = {(page.name, name.rstrip("/")) for page in ALL for name in NAMED_FILE.findall(page.read_text("utf-8"))}
    assert not [
        (page, name) for page, name in found if not any(file == name or file.endswith(f"/{name}") for file in files)
    ]


def test_commands_are_understood() -> None:
    shell = [text for page in ALL for language, text in pages.fenced(page) if language == "sh"]
    lines = [line.partition("#")[0] for text in shell for line in text.splitlines()]
    commands = [line.strip().removeprefix("numballama ") for line in lines if line.startswith("numballama ")]
    assert len(commands) >= 5
    for words in commands:
        cli.parser().parse_args(shlex.split(words))


def test_pictures_are_drawn_by_their_script() -> None:
    """`python docs/course/draw.py` makes it so."""
    drawn = {f"{name}.svg": draw() for name, draw in draw.PICTURES.items()}
    found = {path.name: path.read_text(encoding="utf-8") for path in draw.FOLDER.glob("*.svg")}
    assert drawn == found
    for page in pages.english():
        for text, folder in ((page, "pictures"), (pages.chinese(page), "../pictures")):
            shown = re.findall(r"^!\[(.+)\]\((.+)\)$", text.read_text(encoding="utf-8"), re.M)
            assert [file for _, file in shown] == [f"{folder}/{page.stem}.svg"], text


@pytest.mark.parametrize("page", pages.english(), ids=lambda page: page.name)
def test_every_exercise_has_its_solution(page: Path) -> None:
    kind = "simulated" if page in CUDA_PAGES else "test"
    solutions = (Path(__file__).parent / f"{kind}_{page.stem.replace('-', '_')}.py").read_text(encoding="utf-8")
    exercises = re.findall(r"^\d+\. \*\*", page.read_text(encoding="utf-8").split("## Exercises")[1], re.M)
    assert len(exercises) == 3
    assert set(re.findall(r"^def test_(\d)_", solutions, re.M)) == {"1", "2", "3"}
