"""Draws the course's pictures: `python docs/course/draw.py` writes docs/course/pictures/*.svg.

`PICTURES` lists one function a page.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # makes `course` and `numballama` importable
    sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from course import draw_kernels, draw_model, draw_text

FOLDER = Path(__file__).resolve().parent / "pictures"

PICTURES: dict[str, Callable[[], str]] = {
    "01-architecture": draw_model.architecture,
    "02-memory": draw_model.memory,
    "03-tensors": draw_model.tensors,
    "04-operators": draw_model.operators,
    "05-registry": draw_model.registry,
    "06-llama": draw_model.llama,
    "07-mmap": draw_model.mapped,
    "08-parameters": draw_model.parameters,
    "09-layers": draw_model.layers,
    "10-kv-cache": draw_model.kv_cache,
    "11-int8": draw_model.int8,
    "12-dot": draw_kernels.dot,
    "13-cuda": draw_kernels.cuda,
    "14-cuda-operators": draw_kernels.cuda_operators,
    "15-gemv": draw_kernels.gemv,
    "16-attention": draw_kernels.attention,
    "17-device": draw_kernels.device,
    "18-generation": draw_text.generation,
    "19-story": draw_text.story,
    "20-conversation": draw_text.conversation,
    "21-llama-cpp": draw_text.llama_cpp,
    "22-miopen": draw_text.miopen,
    "23-summary": draw_text.summary,
}
"""Name of the page → what draws its picture."""


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
