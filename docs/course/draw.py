"""Draws the course's pictures: `python docs/course/draw.py` writes docs/course/pictures/*.svg.

A picture has the colours of the reader's theme, light or dark. `PICTURES` lists one function a page.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "pictures"

STYLE = """
svg { font-family: sans-serif; font-size: 14px }
.page { fill: #ffffff } .text { fill: #1f2328 } .note { fill: #59636e; font-size: 12px }
.a { fill: #e3edfb; stroke: #4a6fa5 } .b { fill: #fdeecb; stroke: #a8761a } .c { fill: #dff3e1; stroke: #3d8b4a }
.d { fill: #f6f8fa; stroke: #8c959f } .line { stroke: #59636e; fill: none } .head { fill: #59636e }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117 } .text { fill: #e6edf3 } .note { fill: #9da7b1 }
.a { fill: #16304f; stroke: #7aa5dd } .b { fill: #47340f; stroke: #d9a441 } .c { fill: #143a1f; stroke: #6cc07a }
.d { fill: #161b22; stroke: #6e7681 } .line { stroke: #9da7b1 } .head { fill: #9da7b1 }
}
"""


class Picture:
    """Shapes on a page of `width` × `height`. Boxes have one of the colours a, b, c and d."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height, self.parts = width, height, list[str]()

    def box(self, x: float, y: float, w: float, h: float, lines: str | Sequence[str] = "", kind: str = "a") -> None:
        """A rectangle with centred lines of text; all but the first are small."""
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="4"/>')
        lines = [lines] if isinstance(lines, str) else list(lines)
        top = y + h / 2 + 5 - 8 * (len(lines) - 1)
        for i, line in enumerate(lines):
            self.text(x + w / 2, top + 16 * i, line, "middle", small=i > 0)

    def text(self, x: float, y: float, text: str, anchor: str = "start", small: bool = False) -> None:
        kind = "note" if small else "text"
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')

    def note(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        self.text(x, y, text, anchor, small=True)

    def arrow(self, *points: float) -> None:
        """A line through points x, y, x, y … with a head at its end."""
        pairs = " L".join(f"{x},{y}" for x, y in zip(points[::2], points[1::2], strict=True))
        self.parts.append(f'<path class="line" d="M{pairs}" marker-end="url(#head)"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(f'<path class="line" d="M{x1},{y1} L{x2},{y2}"/>')

    def __str__(self) -> str:
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = '<marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        head += '<path class="head" d="M0,0 L9,4 L0,8 Z"/></marker>'
        page = f'<rect class="page" width="{self.width}" height="{self.height}"/>'
        top = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style><defs>{head}</defs>{page}'
        return "\n".join([top, *self.parts, "</svg>\n"])


def architecture() -> str:
    p = Picture(900, 190)
    stops = [
        ("file", "on disk"), ("Checkpoint", "config, weights"), ("Graph", "ops, values"), ("Plan", "steps, arena"),
        ("Program", "table of addresses"), ("Engine", "requests, pages"), ("text", "on the screen"),
    ]  # fmt: skip
    modules = ["", "loader.py", "graph.py, fusion.py", "plan.py", "cpu/, cuda/", "engine/", "generate.py"]
    for i, (stop, module) in enumerate(zip(stops, modules, strict=True)):
        x = 10 + i * 127
        p.box(x, 50, 116, 52, stop, "d" if i in (0, 6) else "a")
        p.note(x + 58, 122, module, "middle")
        if i:
            p.arrow(x - 11, 76, x, 76)
    p.line(137, 140, 632, 140)
    p.note(385, 158, "once: compile()", "middle")
    p.line(645, 140, 890, 140)
    p.note(767, 158, "for every token", "middle")
    p.note(10, 28, "Each stop knows only the stops to its left.")
    return str(p)


def memory() -> str:
    """The memory map of the small model of page 2, 4 tokens."""
    from numballama.config import ModelConfig
    from numballama.cpu import ops  # noqa: F401 (registers the kernels)
    from numballama.fusion import fuse
    from numballama.graph import KVLayout, build
    from numballama.plan import lower
    from numballama.quantization.types import F32

    config = ModelConfig(16, 24, 1, 4, 2, 40, 64)
    types = dict.fromkeys(config.weight_shapes(), F32)
    plan = lower(fuse(build(config, types, KVLayout.of(config, 64), tokens=3), "cpu"), "cpu", workers=1)
    p, left, wide, high = Picture(900, 470), 60, 75, 0.22
    for index, step in enumerate(plan.steps):
        p.note(left + wide * index + wide / 2, 435 + 14 * (index % 2), f"{index} {step.kernel.name}", "middle")
    for offset in range(0, plan.arena_bytes + 1, 256):
        y = 415 - offset * high
        p.note(left - 8, y + 4, str(offset), "end")
    for index, (name, place) in enumerate(plan.placements.items()):
        x, w = left + wide * place.first, wide * (place.last - place.first + 1)
        label = name.rpartition(".")[2].rpartition("/")[2].replace("_buffer", "") if place.nbytes >= 64 else ""
        kind = "d" if place.first == 0 and place.last == len(plan.steps) - 1 else "abc"[index % 3]
        p.box(x, 415 - (place.offset + place.nbytes) * high, w, place.nbytes * high, kind=kind)
        if label:
            p.note(x + w / 2, 415 - (place.offset + place.nbytes / 2) * high + 4, label, "middle")
    p.note(10, 14, "bytes")
    p.note(890, 465, "steps", "end")
    return str(p)


def tensors() -> str:
    p = Picture(900, 250)
    for i in range(3):
        for j in range(4):
            p.box(30 + 56 * j, 50 + 40 * i, 52, 36, f"{4 * i + j}", "abc"[i])
            p.box(22 + 71 * (4 * i + j), 205, 68, 30, f"{4 * i + j}", "abc"[i])
    p.note(140, 38, "4 columns: stride 4 bytes", "middle")
    p.note(262, 72, "3 rows: stride 16 bytes")
    p.text(420, 72, "shape (3, 4), float32, C order")
    p.text(420, 98, "address of [i, j] = base + 16 · i + 4 · j")
    p.note(420, 122, "a row is contiguous: a[1] is bytes 16 to 32")
    p.note(420, 142, "a column is not: a[:, 1] is bytes 4, 20 and 36")
    p.note(22, 196, "the same in memory")
    for i in range(0, 13, 4):
        p.note(22 + 71 * i - (14 if i == 12 else 0), 248, f"+{4 * i}")
    return str(p)


def operators() -> str:
    p = Picture(900, 230)
    p.box(360, 20, 180, 46, ["op “swiglu”", "a name"], "d")
    p.box(30, 110, 250, 60, ["rule", "operands, attributes, shapes"], "a")
    p.box(325, 110, 250, 60, ["definition", "NumPy, float64"], "b")
    p.box(620, 110, 250, 60, ["kernels", "one for each device and types"], "c")
    for x in (155, 450, 745):
        p.arrow(450, 66, x, 110)
    p.note(155, 192, "ops.py: checked when the op is added", "middle")
    p.note(450, 192, "reference.py: what the op means", "middle")
    p.note(745, 192, "kernels_cpu.py, kernels_cuda.py, cuda/", "middle")
    p.arrow(620, 140, 575, 140)
    p.note(597, 132, "tested", "middle")
    p.note(597, 156, "beside", "middle")
    return str(p)


def registry() -> str:
    p = Picture(900, 250)
    p.text(20, 30, "plan.py asks once for each op")
    p.box(20, 60, 210, 60, ["linear, cpu", "types f32, q8_0"], "d")
    rows = [
        ("linear, cpu", "f32; f32, f16, bf16, q8_0, q4_0 …", "linear"),
        ("linear, cpu", "i8, f32; int8", "linear_int8"),
        ("linear, reference", "any; any", "linear (NumPy)"),
        ("norm_qkv, cpu", "f32, f32; three weights", "norm_qkv"),
        ("softcap, cpu", "f32", "softcap (yours)"),
    ]
    p.note(300, 30, "op and device")
    p.note(470, 30, "types of the inputs")
    p.note(740, 30, "kernel")
    for i, (key, types, found) in enumerate(rows):
        y, kind = 42 + 40 * i, "b" if i == 4 else "a"
        p.box(290, y, 170, 34, key, kind)
        p.box(462, y, 265, 34, types, kind)
        p.box(729, y, 150, 34, found, "c" if i == 0 else kind)
    p.arrow(230, 80, 288, 60)
    p.note(20, 150, "no match: an error that lists")
    p.note(20, 168, "what exists")
    return str(p)


def llama() -> str:
    p = Picture(900, 330)
    p.line(60, 40, 840, 40)
    p.arrow(820, 40, 870, 40)
    p.note(60, 28, "x: the residual stream, [tokens, dim]")
    boxes = [
        (90, "RMSNorm", "attn_norm", "d"), (200, "q, k, v", "wq wk wv", "a"), (310, "RoPE", "q and k", "d"),
        (420, "attention", "KV cache", "b"), (530, "o", "wo", "a"),
    ]  # fmt: skip
    for i, (x, name, what, kind) in enumerate(boxes):
        p.box(x, 90, 90, 50, [name, what], kind)
        if i:
            p.arrow(x - 20, 115, x, 115)
    p.arrow(75, 40, 75, 115, 90, 115)
    p.arrow(620, 115, 650, 115, 650, 52)
    p.box(640, 30, 20, 20, "+", "c")
    p.note(90, 164, "attention: tokens look at earlier tokens")
    low = [
        (200, "RMSNorm", "ffn_norm", "d"), (310, "gate, up", "w1 w3", "a"), (420, "SwiGLU", "silu(gate) · up", "d"),
        (540, "down", "w2", "a"),
    ]  # fmt: skip
    for i, (x, name, what, kind) in enumerate(low):
        p.box(x, 220, 100, 50, [name, what], kind)
        if i:
            p.arrow(x - (20 if i == 3 else 10), 245, x, 245)
    p.arrow(690, 40, 690, 195, 180, 195, 180, 245, 200, 245)
    p.arrow(640, 245, 790, 245, 790, 52)
    p.box(780, 30, 20, 20, "+", "c")
    p.note(200, 294, "feed-forward: each token by itself")
    p.note(60, 320, "blue: matrices, nearly all of the weights. A model repeats this layer n_layers times.")
    return str(p)


def mapped() -> str:
    p = Picture(900, 250)
    p.text(20, 36, "file on disk")
    p.text(20, 116, "page cache (physical memory)")
    p.text(20, 206, "addresses of the process")
    for i in range(12):
        p.box(250 + 52 * i, 18, 48, 30, f"{i}", "d")
        here = i in (0, 1, 4, 5, 6)
        if here:
            p.box(250 + 52 * i, 98, 48, 30, f"{i}", "c")
        p.box(250 + 52 * i, 188, 48, 30, f"{i}", "a" if here else "d")
        if here:
            p.line(274 + 52 * i, 48, 274 + 52 * i, 98)
            p.line(274 + 52 * i, 128, 274 + 52 * i, 188)
    p.note(250, 236, "header")
    p.note(458, 236, "a weight that was used")
    p.note(640, 236, "never touched: no memory")
    p.note(20, 134, "shared by all processes")
    return str(p)


def parameters() -> str:
    p = Picture(900, 250)
    p.text(20, 28, "llama2.c v0: seven int32, then float32 in a fixed order")
    x = 20.0
    for name, w, kind in (
        ("7 × i32", 70, "b"), ("tok_embeddings", 170, "a"), ("attn_norm", 80, "d"), ("wq", 70, "a"), ("wk", 50, "a"),
        ("wv", 50, "a"), ("wo", 70, "a"), ("ffn_norm", 80, "d"), ("w1 w2 w3", 150, "a"), ("norm", 50, "d"),
    ):  # fmt: skip
        p.box(x, 42, w - 3, 40, name, kind)
        x += w
    p.note(20, 102, "no names, no magic: the size of the file must be right")
    p.text(20, 150, "GGUF: describes itself")
    x = 20.0
    for lines, w, kind in (
        (["GGUF, 3", "magic, version"], 110, "b"), (["counts", "2 × u64"], 80, "b"),
        (["key-value pairs", "sizes, vocabulary, chat template"], 240, "c"),
        (["tensor table", "name, dims, type, offset"], 190, "c"),
        (["data", "each tensor aligned to 32 bytes"], 240, "a"),
    ):  # fmt: skip
        p.box(x, 164, w - 3, 50, lines, kind)
        x += w
    return str(p)


def layers() -> str:
    p = Picture(900, 400)
    groups = [
        ("norm_qkv", ["rmsnorm", "linear q", "linear k", "linear v"], "a"),
        ("rope_kv_write", ["rope q", "rope k", "kv_write k", "kv_write v"], "b"),
        ("attention", ["attention_scores", "softmax", "attention_values"], "c"),
        ("linear_add", ["linear o", "add"], "a"),
        ("norm_gate_up", ["rmsnorm", "linear gate", "linear up", "swiglu"], "b"),
        ("linear_add", ["linear down", "add"], "c"),
    ]
    p.text(130, 24, "as declared: 19 ops", "middle")
    p.text(640, 24, "after fusion: 6 steps", "middle")
    y = 36.0
    for name, ops, kind in groups:
        h = 19.0 * len(ops)
        for i, op in enumerate(ops):
            p.box(30, y + 19 * i, 200, 17, "", kind)
            p.note(130, y + 19 * i + 13, op, "middle")
        p.arrow(230, y + h / 2 - 1, 530, y + h / 2 - 1)
        p.box(530, y, 220, h - 2, name, kind)
        y += h
    p.note(380, 30, "a pass joins ops for which", "middle")
    p.note(380, 398, "the device has one kernel", "middle")
    return str(p)


def kv_cache() -> str:
    p = Picture(900, 290)
    p.text(20, 30, "page table")
    rows = [("slot 0", [7, 3, 9]), ("slot 1", [7, 4, 0]), ("padding", [0, 0, 0])]
    colours = {7: "b", 3: "a", 9: "a", 4: "c", 0: "d"}
    for i, (name, numbers) in enumerate(rows):
        p.note(20, 66 + 34 * i, name)
        for j, number in enumerate(numbers):
            p.box(90 + 44 * j, 46 + 34 * i, 40, 30, str(number), colours[number])
    p.text(20, 190, "pages of the cache, 32 tokens each")
    what = {
        0: ["0", "padding"], 3: ["3", "32 – 63"], 4: ["4", "32 – 47"], 7: ["7", "0 – 31"], 9: ["9", "64 – 69"],
    }  # fmt: skip
    for number in range(10):
        p.box(20 + 87 * number, 204, 82, 44, what.get(number, [str(number), "free"]), colours.get(number, "d"))
    p.text(300, 66, "position 40 of slot 0: entry 40 // 32 = 1 is page 3, place 40 % 32 = 8")
    p.text(300, 100, "position 20 of slot 1: entry 0 is page 7, place 20")
    p.note(300, 134, "page 7 is shared: both texts begin with the same 32 tokens")
    p.note(20, 274, "below each page number: the positions that it holds")
    return str(p)


def int8() -> str:
    p = Picture(900, 230)
    numbers = [0.31, -1.27, 0.004, 0.9]
    p.text(20, 30, "a group of float32, 32 bits each")
    for i, x in enumerate(numbers):
        p.box(20 + 100 * i, 42, 94, 40, f"{x}", "a")
        p.box(20 + 100 * i, 150, 94, 40, f"{round(x / 0.01)}", "b")
        p.arrow(67 + 100 * i, 82, 67 + 100 * i, 150)
    p.box(440, 150, 120, 40, "0.01", "c")
    p.note(500, 208, "scale: 16 or 32 bits", "middle")
    p.note(218, 208, "quants: 8 bits each", "middle")
    p.text(440, 60, "scale = max|x| / 127 = 1.27 / 127")
    p.text(440, 84, "quant = round(x / scale)")
    p.text(600, 166, "x ≈ quant · scale")
    p.note(600, 186, "error of an element: at most scale / 2")
    return str(p)


def dot() -> str:
    p = Picture(900, 300)
    p.text(20, 28, "1: one chain of additions")
    for i in range(8):
        p.box(20 + 60 * i, 40, 40, 28, "+", "a")
        if i:
            p.arrow(60 + 60 * (i - 1), 54, 20 + 60 * i, 54)
    p.note(510, 58, "each waits about 4 cycles for the one before")
    p.text(20, 104, "2: four chains")
    for row in range(4):
        for i in range(2):
            p.box(20 + 60 * i, 114 + 24 * row, 40, 20, "+", "abcd"[row])
        p.arrow(60, 124 + 24 * row, 80, 124 + 24 * row)
    p.note(160, 166, "independent: the next")
    p.note(160, 182, "starts while others run")
    p.text(380, 104, "3: chains of vectors, 8 numbers an instruction")
    for row in range(2):
        for i in range(2):
            for lane in range(8):
                p.box(380 + 26 * lane + 260 * i, 116 + 44 * row, 24, 28, "+", "ab"[row])
        p.arrow(588, 130 + 44 * row, 638, 130 + 44 * row)
    p.text(20, 244, "bytes for 64 weights")
    for y, w, label, kind in (
        (230, 512, "float32: 256", "a"),
        (256, 256, "float16: 128", "b"),
        (276, 136, "int8: 68", "c"),
    ):
        p.box(200, y, w, 18, "", kind)
        p.note(206, y + 13, label)
    return str(p)


def cuda() -> str:
    p = Picture(900, 260)
    p.text(20, 28, "grid: blocks that do not wait for each other")
    for x in range(6):
        for y in range(3):
            p.box(20 + 62 * x, 44 + 44 * y, 56, 36, f"{x}, {y}", "b" if (x, y) == (5, 1) else "d")
    p.note(20, 196, "blockIdx.x →, blockIdx.y ↓")
    p.arrow(386, 106, 415, 106)
    p.text(415, 28, "block: warps, shared memory, barriers")
    for w in range(4):
        p.box(415, 44 + 36 * w, 190, 30, f"warp {w}: 32 threads", "c" if w == 2 else "a")
    p.box(415, 196, 190, 30, "shared memory", "d")
    p.arrow(605, 131, 680, 131)
    p.text(680, 28, "warp: lanes, shuffles")
    for lane in range(32):
        p.box(680 + 25 * (lane % 8), 60 + 34 * (lane // 8), 22, 28, "", "c")
        p.note(691 + 25 * (lane % 8), 78 + 34 * (lane // 8), str(lane), "middle")
    p.note(680, 214, "one instruction for 32 lanes")
    return str(p)


def cuda_operators() -> str:
    p = Picture(900, 230)
    p.text(20, 28, "add, SwiGLU: a thread an element")
    for t in range(3):
        for k in range(8):
            p.box(20 + 46 * k, 44 + 44 * t, 42, 36, "", "abc"[t])
            p.note(41 + 46 * k, 66 + 44 * t, f"t{k}", "middle")
    p.note(20, 200, "blockIdx.y is the token; no communication")
    p.text(470, 28, "RMSNorm, softmax: a block a row")
    for t in range(3):
        p.box(470, 44 + 44 * t, 230, 36, ["one token: all threads of a block"], "abc"[t])
        p.arrow(700, 62 + 44 * t, 740, 62 + 44 * t)
        p.box(740, 44 + 44 * t, 140, 36, "sum or maximum", "d")
    p.note(470, 200, "shuffles in a warp, shared memory between warps")
    return str(p)


def gemv() -> str:
    p = Picture(900, 300)
    what = [
        ("1 thread_per_row", "a thread reads a row: 32 lanes, 32 rows", "d"),
        ("2 block_per_row", "128 threads read a row; barriers to add up", "a"),
        ("3 warp_per_row", "32 lanes read a row; shuffles to add up", "a"),
        ("4 vector_loads", "16 bytes a lane: 512 bytes of a row at once", "b"),
        ("5 two_rows", "4 loads under way a lane; x once for two rows", "b"),
        ("6 ring", "copies run ahead, over the ends of rows", "c"),
    ]
    for i, (name, text, kind) in enumerate(what):
        y = 20 + 44 * i
        p.box(20, y, 150, 34, name, kind)
        p.note(184, y + 21, text)
        requested = [4, 4, 4, 16, 64, 48][i]
        p.box(480, y + 6, 5 * requested, 22, "", kind)
        p.note(488 + 5 * requested, y + 21, ["4", "4", "4", "16", "64", "48, also between two rows"][i])
    p.note(480, 14, "bytes of weights that a lane requests before it uses the first")
    p.note(20, 292, "floor: bytes of the weights / bandwidth of the memory")
    return str(p)


def attention() -> str:
    p = Picture(900, 260)
    p.text(20, 28, "1 to 3: three passes")
    for i, (name, kind) in enumerate((("scores q · K", "a"), ("softmax", "b"), ("sum of V", "c"))):
        p.box(20 + 130 * i, 44, 110, 40, name, kind)
        if i:
            p.arrow(130 * i, 64, 20 + 130 * i, 64)
    p.note(20, 106, "scores go to memory and back; barriers between")
    p.text(470, 28, "4, 5: one pass (online softmax)")
    p.box(470, 44, 380, 40, ["for each key: score, new maximum,", "scale the sums down, add"], "b")
    p.note(470, 106, "a warp keeps: maximum, sum of exponentials, weighted values")
    p.text(20, 150, "6: keys split over blocks")
    for i in range(4):
        p.box(20 + 150 * i, 164, 140, 36, f"block {i}: {4096 * i} …", "abcd"[i])
        p.arrow(90 + 150 * i, 200, 700, 232)
    p.box(700, 214, 150, 36, "combine", "c")
    return str(p)


def device() -> str:
    p = Picture(900, 230)
    p.text(20, 34, "host")
    p.text(20, 104, "GPU")
    p.text(20, 174, "tokens")
    for i in range(3):
        p.box(90 + 60 * i, 14, 54, 32, f"queue {i}", "a")
    for i in range(6):
        p.box(120 + 125 * i, 84, 121, 34, f"graph: step {i}", "b")
        p.box(205 + 125 * i, 154, 60, 30, f"token {i}", "c")
        p.arrow(235 + 125 * i, 118, 235 + 125 * i, 154)
        if i < 3:
            p.box(275 + 125 * i, 14, 70, 32, f"queue {i + 3}", "a")
            p.arrow(265 + 125 * i, 154, 310 + 125 * i, 46)
    p.note(90, 212, "The host queues steps ahead. It reads a token while the next step runs already.")
    return str(p)


def generation() -> str:
    p = Picture(900, 150)
    stops = [
        ("logits", "one row a sequence", "a"), ("penalties", "repetition, bias", "d"),
        ("temperature", "divide", "d"), ("top_k, top_p", "cut the tail", "d"), ("draw", "seed", "b"),
        ("decode", "whole characters", "c"), ("stop strings", "hold back", "c"),
    ]  # fmt: skip
    for i, (name, what, kind) in enumerate(stops):
        p.box(10 + 127 * i, 40, 114, 54, [name, what], kind)
        if i:
            p.arrow(127 * i - 3, 67, 10 + 127 * i, 67)
    p.note(10, 24, "in the compiled step: CPU or GPU")
    p.note(645, 24, "in Python, once a token")
    p.arrow(575, 94, 575, 124, 67, 124, 67, 94)
    p.note(320, 142, "the token is the next input", "middle")
    return str(p)


def story() -> str:
    """Probabilities of the story model, temperature 0, after "Once upon a time"."""
    words = [
        (",", 97), ("there", 90), ("was", 99), ("a", 99), ("little", 59), ("girl", 62), ("named", 99), ("Lily", 90),
        (".", 93), ("She", 87), ("loved", 76), ("to", 87), ("play", 59), ("outside", 42),
    ]  # fmt: skip
    p = Picture(900, 210)
    p.line(20, 160, 880, 160)
    for i, (word, share) in enumerate(words):
        x = 24 + 61 * i
        p.box(x, 160 - 1.2 * share, 50, 1.2 * share, "", "c" if share > 80 else "a" if share > 50 else "b")
        p.note(x + 25, 154 - 1.2 * share, f"{share} %", "middle")
        p.note(x + 25, 178, word, "middle")
    p.note(20, 202, "probability of the token that was taken, after “Once upon a time”; the story model, temperature 0")
    return str(p)


def conversation() -> str:
    p = Picture(900, 250)
    rows = [("turn 1", [("user", 150, "a"), ("answer", 110, "b")])]
    rows.append(("turn 2", [*rows[0][1], ("user", 130, "a"), ("answer", 120, "b")]))
    rows.append(("turn 3", [*rows[1][1], ("user", 90, "a"), ("answer", 100, "b")]))
    for i, (name, parts) in enumerate(rows):
        y = 30 + 66 * i
        p.text(20, y + 24, name)
        x = 90.0
        for j, (what, w, kind) in enumerate(parts):
            old = j < len(parts) - 2
            p.box(x, y, w - 3, 38, what, "d" if old else kind)
            x += w
        if i:
            p.note(90, y + 54, "grey: its whole pages are in the cache, and are not computed again")
    p.note(90, 22, "control tokens stand between the parts; the template writes them")
    return str(p)


def llama_cpp() -> str:
    p = Picture(900, 320)
    p.text(150, 28, "llama.cpp and ggml", "middle")
    p.text(750, 28, "numballama", "middle")
    rows = [
        ("gguf file, mmap", "Checkpoint, mmap"), ("ggml_tensor", "Value; address and extents"),
        ("ggml_cgraph", "Graph, fusion passes"), ("ggml_gallocr", "Plan: one arena"),
        ("type_traits, vec_dot", "registry, TYPE_TRAITS"), ("KV cells, llama_batch", "pages, engine"),
        ("llama_sampler chain", "sampler in the step"),
    ]  # fmt: skip
    what = ["the file", "a tensor", "what to compute", "where values lie", "which code", "many sequences", "next token"]
    for i, ((left, right), question) in enumerate(zip(rows, what, strict=True)):
        y = 42 + 39 * i
        p.box(30, y, 240, 32, left, "b")
        p.box(630, y, 240, 32, right, "a")
        p.line(270, y + 16, 380, y + 16)
        p.line(520, y + 16, 630, y + 16)
        p.text(450, y + 21, question, "middle")
    return str(p)


def miopen() -> str:
    p = Picture(900, 240)
    p.box(20, 84, 150, 60, ["problem", "op, shapes, types"], "d")
    p.box(230, 30, 190, 50, ["Find", "times the solvers"], "b")
    p.box(230, 150, 190, 50, ["immediate mode", "looks up only"], "a")
    for i, name in enumerate(("solver 1", "solver 2", "solver 3: not applicable")):
        p.box(500, 14 + 34 * i, 180, 28, name, "d" if i == 2 else "c")
    p.arrow(420, 50, 500, 28)
    p.arrow(420, 55, 500, 62)
    p.box(500, 150, 180, 50, ["find-db", "user part, system part"], "b")
    p.arrow(590, 116, 590, 150)
    p.note(600, 138, "ranking by time")
    p.arrow(500, 175, 420, 175)
    p.arrow(170, 104, 230, 60)
    p.arrow(170, 124, 230, 170)
    p.note(
        20, 226, "numballama: one look-up by op, device and types when the plan is made; a rule chooses among families"
    )
    return str(p)


def summary() -> str:
    p = Picture(900, 250)
    stops = [
        ("file", "7, 8"), ("Checkpoint", "8, 11"), ("Graph", "4, 5, 6, 9"), ("Plan", "2, 3, 22"),
        ("Program", "1, 17"), ("Engine", "10, 18"), ("text", "18, 19, 20"),
    ]  # fmt: skip
    for i, (name, numbers) in enumerate(stops):
        x = 10 + i * 127
        p.box(x, 30, 116, 52, [name, f"pages {numbers}"], "d" if i in (0, 6) else "a")
        if i:
            p.arrow(x - 11, 56, x, 56)
    for i, name in enumerate(("dot product", "CUDA in four steps", "operators", "GEMV", "attention")):
        p.box(80 + 150 * i, 130, 140, 50, [name, f"page {12 + i}"], "c")
    p.arrow(576, 130, 576, 82)
    p.note(590, 112, "kernels")
    p.note(80, 206, "each kernel is compared with its definition, and its time with the floor: bytes / bandwidth")
    p.note(80, 226, "pages 21 and 22: the same parts in llama.cpp and MIOpen")
    return str(p)


PICTURES: dict[str, Callable[[], str]] = {
    "01-architecture": architecture,
    "02-memory": memory,
    "03-tensors": tensors,
    "04-operators": operators,
    "05-registry": registry,
    "06-llama": llama,
    "07-mmap": mapped,
    "08-parameters": parameters,
    "09-layers": layers,
    "10-kv-cache": kv_cache,
    "11-int8": int8,
    "12-dot": dot,
    "13-cuda": cuda,
    "14-cuda-operators": cuda_operators,
    "15-gemv": gemv,
    "16-attention": attention,
    "17-device": device,
    "18-generation": generation,
    "19-story": story,
    "20-conversation": conversation,
    "21-llama-cpp": llama_cpp,
    "22-miopen": miopen,
    "23-summary": summary,
}
"""Name of the page → what draws its picture."""


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parents[2]))
    main()
