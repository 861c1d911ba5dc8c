"""What cases of `gemm_cases` and `skinny_cases` leave out, mostly before sm_90, unless an argument is `all`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

OLDER = {"7.5": ("bf16", "q4_k"), "8.0": ("q8_0", "f16", "f32")}
"""Types of weights that are tried for cards before sm_90: what tensor cores read there differs. A block of another type
is decoded by the same instructions as on sm_90. `all` as an argument, or NUMBALLAMA_TEST_ALL=1 for the tests, tries
every type there too. `assembly` compiles each kernel once for them, for the first type here that it is launched for."""


LEFT_OUT = {
    "7.5": ("attention bf16, 128", "attention, heads of 80"),
    "9.0": (
        "norm_linear q5_k, some of the last record", "gate_up q5_k",
        *(f"linear_add {kind}, 13 of 16" for kind in ("bf16", "q8_0", "q4_0", "q5_k", "q6_k")),
    ),
}  # fmt: skip
"""Cases that are not tried by default: sm_75 has no room for heads of 65 to 128 in `prefill_attention`, and the kernels
of single rows, which it runs instead, are tried with float16 and heads of 128. q5_k is decoded as q4_k, with a bit
more. `skinny` decodes a type by the same lines whatever the number of tokens: each is tried with up to 8, and with up
to 16 or to 64 (`skinny_cases.FEWER`).
"""


def kinds_of(arguments: Sequence[str], kinds: Iterable[str]) -> tuple[str, ...]:
    """Those of `kinds` that a command line asks for; without arguments, on a GPU, all."""
    some = OLDER.get(arguments[0]) if arguments and "all" not in arguments else None
    return tuple(kind for kind in kinds if some is None or kind in some)


def left_out(arguments: Sequence[str]) -> tuple[str, ...]:
    """Names of the cases that a command line leaves out."""
    return LEFT_OUT.get(arguments[0], ()) if arguments and "all" not in arguments else ()
