"""Pictures of pages 1 to 11: how a model is read, declared and planned, and what it holds in memory."""

from __future__ import annotations

from course.picture import Picture


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
    p.note(380, 46, "the device has one kernel", "middle")
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
