"""Pictures of pages 18 to 23: how text is made, the same parts in other projects, and a summary."""

from __future__ import annotations

from course.picture import Picture


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
