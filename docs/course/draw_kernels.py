"""Pictures of pages 12 to 17: kernels, and how a GPU runs them."""

from __future__ import annotations

from course.picture import Picture


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
