"""Runs the code of the course's pages, and copies it into the Chinese ones.

python docs/course/pages.py run 02 12    the Python blocks of these pages, top to bottom, one namespace a page
python docs/course/pages.py copy         every code block of an English page to its Chinese page

Pages with CUDA kernels run on a GPU if there is one, otherwise in Numba's CUDA simulator (`simulator.py`).
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SIMULATOR = "NUMBA_ENABLE_CUDASIM"


def english() -> list[Path]:
    """The pages in order, without the index."""
    return sorted(FOLDER.glob("[0-9][0-9]-*.md"))


def chinese(page: Path) -> Path:
    """The Chinese page of an English one."""
    return page.parent / "zh" / page.name


def fenced(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return FENCED.findall(page.read_text(encoding="utf-8"))


def code(page: Path) -> str:
    """The Python blocks of a page, joined."""
    return "\n".join(text for language, text in fenced(page) if language == "python")


def needs_cuda(page: Path) -> bool:
    """Whether the page has kernels for a GPU."""
    return any(
        word in code(page) for word in ("from numba import cuda", "course.gemv", "course.attention", "CudaBackend")
    )


def with_code_of(page: Path, translated: str) -> str:
    """The text of a translated page with the blocks of `page`. Raises `ValueError` for another number of blocks."""
    blocks: Iterator[tuple[str, str]] = iter(fenced(page))
    if len(FENCED.findall(translated)) != len(fenced(page)):
        raise ValueError(f"{page.name} has {len(fenced(page))} blocks, found {len(FENCED.findall(translated))}")

    def block(match: re.Match[str]) -> str:
        language, text = next(blocks)
        return f"```{language}\n{text}```"

    return FENCED.sub(block, translated)


def prepare(cuda: bool) -> None:
    """Make `course` importable, and choose the simulator for CUDA kernels where there is no GPU."""
    for folder in (ROOT, ROOT / "docs"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    if cuda and SIMULATOR not in os.environ:
        from numballama.backend import choose_device

        if choose_device("auto")[0] == "cpu":
            os.environ[SIMULATOR] = "1"
            print("no GPU: the kernels run in Numba's CUDA simulator", file=sys.stderr)
    if cuda and os.environ.get(SIMULATOR) == "1":
        try:
            from course import simulator  # noqa: F401 (replaces what kernels import)
        except ModuleNotFoundError as error:
            if error.name != "numba_cuda":
                raise
            sys.exit(str(error))


def run(page: Path) -> None:
    """Run a page's code in an empty folder."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(compile(code(page), f"<{page.name}>", "exec"), {"__name__": page.stem})
        finally:
            os.chdir(before)


def numbered(numbers: Sequence[str]) -> list[Path]:
    """The pages with these numbers, in order; 2 and 02 are the same. Ends the process if there is no such page."""
    pages = {page.name[:2]: page for page in english()}
    wrong = [number for number in numbers if number.zfill(2) not in pages]
    if wrong or not numbers:
        found = ", ".join(wrong) or "none"
        sys.exit(f"run takes numbers of pages, {min(pages)} to {max(pages)}, such as `run 02 12`; found {found}")
    return [pages[number] for number in sorted({number.zfill(2) for number in numbers})]


def main() -> None:
    command, *numbers = sys.argv[1:] or ["help"]
    if command == "copy":
        for page in (FOLDER / "README.md", *english()):
            other = chinese(page)
            other.write_text(with_code_of(page, other.read_text(encoding="utf-8")), encoding="utf-8")
    elif command == "run":
        chosen = numbered(numbers)
        prepare(any(needs_cuda(page) for page in chosen))
        for page in chosen:
            print(f"== {page.name}", flush=True)
            run(page)
    else:
        print(__doc__)


if __name__ == "__main__":
    main()
