"""PTX instructions as Python functions, for what kernels need of the GPU beyond plain Numba.

Functions are named after the PTX instruction that they emit (PTX ISA, "Instruction Set"), or after CUDA C++'s intrinsic
where that is better known (`uint_as_float`). A function marked "sm_80" or "sm_90" compiles to something of the same
meaning, or to nothing, on older cards.

Kernels access memory in two ways. Where speed does not matter they index typed pointers, `p[i]`. Where it does they
take the address of an element, `address(p, i)`, and move 16 bytes at a time. State spaces as in PTX: "global" is device
memory, "shared" the block's shared memory, whose addresses come from `shared_address`. Addresses are int64, words
uint32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .lowering import (  # fmt: skip
    F32,
    I16,
    I32,
    I64,
    VOID,
    as_integer,
    call_asm,
    compiling_for,
    element_pointer,
    instruction,
    is_memory,
    load,
    saturated_to_16,
)

FLOATS4 = types.UniTuple(types.float32, 4)


@intrinsic
def address(typingctx, memory, index):  # type: ignore[no-untyped-def]
    """Generic address of an element of a typed pointer or a shared array, as int64."""
    if not (is_memory(memory) and isinstance(index, types.Integer)):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = as_integer(context, builder, args[1], index, types.int64)
        return builder.ptrtoint(element_pointer(context, builder, memory, args[0], where), I64)

    return types.int64(memory, index), codegen


@intrinsic
def shared_address(typingctx, memory, index):  # type: ignore[no-untyped-def]
    """Address of an element of a shared array in the shared state space, for cp.async and ld.shared."""
    if not isinstance(memory, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = as_integer(context, builder, args[1], index, types.int64)
        generic = builder.ptrtoint(element_pointer(context, builder, memory, args[0], where), I64)
        asm = ir.InlineAsm(ir.FunctionType(I64, [I64]), "cvta.to.shared.u64 $0, $1;", "=l,l")
        return builder.call(asm, [generic])

    return types.int64(memory, index), codegen


@intrinsic
def ld_v4_f32(typingctx, memory, index):  # type: ignore[no-untyped-def]
    """ld.v4.f32: load four float32 from a 16-byte aligned element of a pointer or a shared array."""
    if not (is_memory(memory) and memory.dtype == types.float32):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = as_integer(context, builder, args[1], index, types.int64)
        vector = ir.VectorType(F32, 4)
        element = builder.bitcast(element_pointer(context, builder, memory, args[0], where), vector.as_pointer())
        loaded = builder.load(element, align=16)
        parts = [builder.extract_element(loaded, ir.Constant(I32, i)) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, parts)

    return FLOATS4(memory, index), codegen


@intrinsic
def st_v4_f32(typingctx, memory, index, a, b, c, d):  # type: ignore[no-untyped-def]
    """st.v4.f32: store four float32 at a 16-byte aligned element of a pointer or a shared array."""
    if not (is_memory(memory) and memory.dtype == types.float32):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = as_integer(context, builder, args[1], index, types.int64)
        vector = ir.VectorType(F32, 4)
        elements = ir.Constant(vector, ir.Undefined)
        for i in range(4):
            elements = builder.insert_element(elements, args[2 + i], ir.Constant(I32, i))
        element = builder.bitcast(element_pointer(context, builder, memory, args[0], where), vector.as_pointer())
        builder.store(elements, element, align=16)
        return context.get_dummy_value()

    return types.void(memory, index, *[types.float32] * 4), codegen


# Asynchronous copies from global to shared memory


def _copy(text: str, plain: str) -> Any:
    """cp.async of one size. Before sm_80 it is a load and a store, complete at once."""

    def typing(typingctx, to, source, count):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            args = [builder.trunc(args[0], I32), args[1], as_integer(context, builder, args[2], count, types.int32)]
            body = text if compiling_for() >= (8, 0) else plain
            call_asm(builder, VOID, body, "r,l,r,~{memory}", args)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, count), codegen

    return typing


def _or_zeros(copy: str) -> str:
    """The copy, or zeros unless $2 is positive: by a predicate, as a number of bytes takes seven instructions more."""
    return f"{{.reg .pred p; setp.le.s32 p, $2, 0; {copy}, p;}}"


cp_async_16 = intrinsic(
    _copy(
        _or_zeros("cp.async.cg.shared.global.L2::128B [$0], [$1], 16"),
        "{.reg .pred p; .reg .u32 a, b, c, d; setp.gt.s32 p, $2, 0; "
        "mov.u32 a, 0; mov.u32 b, 0; mov.u32 c, 0; mov.u32 d, 0; @p ld.global.nc.v4.u32 {a, b, c, d}, [$1]; "
        "st.shared.v4.u32 [$0], {a, b, c, d};}",
    )
)
"""cp_async_16(to, source, count): start copying 16 bytes from a global to a shared address, both 16-byte aligned. If
`count` is not positive, zeros are written and the source is not read. The copy is complete after cp_async_commit and a
wait.
"""

cp_async_8 = intrinsic(
    _copy(
        _or_zeros("cp.async.ca.shared.global [$0], [$1], 8"),
        "{.reg .pred p; .reg .u32 a, b; setp.gt.s32 p, $2, 0; mov.u32 a, 0; mov.u32 b, 0; "
        "@p ld.global.nc.v2.u32 {a, b}, [$1]; st.shared.v2.u32 [$0], {a, b};}",
    )
)
"""cp_async_8(to, source, count): the same for 8 bytes."""

cp_async_4 = intrinsic(
    _copy(
        _or_zeros("cp.async.ca.shared.global [$0], [$1], 4"),
        "{.reg .pred p; .reg .u32 a; setp.gt.s32 p, $2, 0; mov.u32 a, 0; "
        "@p ld.global.nc.u32 a, [$1]; st.shared.u32 [$0], a;}",
    )
)
"""cp_async_4(to, source, count): the same for 4 bytes."""


def _of_copies(text: str) -> Any:
    """An instruction about copies, without operands. Before sm_80 there is none: copies are complete at once."""

    def typing(typingctx):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            if compiling_for() >= (8, 0):
                call_asm(builder, VOID, text, "~{memory}", [])
            return context.get_dummy_value()

        return types.void(), codegen

    return typing


cp_async_commit = intrinsic(_of_copies("cp.async.commit_group;"))
"""cp_async_commit(): the copies that this thread started since the last commit become a group."""

cp_async_wait_all = intrinsic(_of_copies("cp.async.wait_group 0;"))
"""cp_async_wait_all(): wait until all groups of this thread have arrived."""


@intrinsic
def cp_async_wait_group(typingctx, n):  # type: ignore[no-untyped-def]
    """cp.async.wait_group n: wait until at most the newest `n` groups of this thread are pending (sm_80); `n` is a
    literal.
    """
    if not isinstance(n, types.IntegerLiteral):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if compiling_for() >= (8, 0):
            call_asm(builder, VOID, f"cp.async.wait_group {n.literal_value};", "~{memory}", [])
        return context.get_dummy_value()

    return types.void(n), codegen


ld_shared_v4_u32 = load("ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];", "r", 4, "shared")
"""ld_shared_v4_u32(address): four words from a 16-byte aligned shared address."""

ld_shared_v2_u32 = load("ld.shared.v2.u32 {$0, $1}, [$2];", "r", 2, "shared")
"""ld_shared_v2_u32(address): two words from an 8-byte aligned shared address."""

ld_shared_u32 = load("ld.shared.u32 $0, [$1];", "r", 1, "shared")
"""ld_shared_u32(address): a word from a 4-byte aligned shared address."""


@intrinsic
def ld_global_u32(typingctx, where):  # type: ignore[no-untyped-def]
    """ld.global.u32: a word from a 4-byte aligned global address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(builder.inttoptr(args[0], I32.as_pointer(1)), align=4)

    return types.uint32(types.int64), codegen


ld_shared_v4_f32 = load("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", "f", 4, "shared")
"""ld_shared_v4_f32(address): four float32 from a 16-byte aligned shared address."""

st_shared_u32 = instruction("st.shared.u32 [$0], $1;", "rr")
"""st_shared_u32(address, word)"""

ld_global_v4_u32 = load("ld.global.v4.u32 {$0, $1, $2, $3}, [$4];", "r", 4)
"""ld_global_v4_u32(address): four words from a 16-byte aligned global address."""


def _load_or_0(count: int) -> Any:
    """Load of float32 from a global address, zeros without reading it unless `left` is positive: without a branch."""
    to = [f"${i}" for i in range(count)]
    zeros = " ".join(f"mov.f32 {each}, 0f00000000;" for each in to)
    names = f"{{{', '.join(to)}}}" if count > 1 else to[0]
    text = f"{{.reg .pred p; setp.gt.s32 p, ${count + 1}, 0; {zeros} @p ld.global{'.v4' * (count > 1)}.f32 {names}, "
    text += f"[${count}];}}"
    result = FLOATS4 if count > 1 else types.float32

    def typing(typingctx, where, left):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            kind = ir.LiteralStructType([F32] * count) if count > 1 else F32
            values = [args[0], as_integer(context, builder, args[1], left, types.int32)]
            found = call_asm(builder, kind, text, ",".join(["=&f"] * count) + ",l,r,~{memory}", values)
            if count == 1:
                return found
            return context.make_tuple(builder, result, [builder.extract_value(found, i) for i in range(count)])

        return result(types.int64, left), codegen

    return intrinsic(typing)


ld_global_v4_f32_or_0, ld_global_f32_or_0 = _load_or_0(4), _load_or_0(1)
"""ld_global_v4_f32_or_0(address, left): four float32 from a 16-byte aligned global address, or zeros unless `left` is
positive. The other loads one.
"""


@intrinsic
def st_global_u32(typingctx, where, word):  # type: ignore[no-untyped-def]
    """st.global.u32: write a word to a 4-byte aligned global address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store(args[1], builder.inttoptr(args[0], I32.as_pointer(1)), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint32), codegen


@intrinsic
def st_global_f16(typingctx, where, x):  # type: ignore[no-untyped-def]
    """st.global.b16: a float32 rounded to float16, at most its largest finite value if finite, to a global address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        bits = saturated_to_16(builder, "uint16", args[1])
        builder.store(bits, builder.inttoptr(args[0], I16.as_pointer(1)), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def no_unroll(typingctx):  # type: ignore[no-untyped-def]
    """Keep the compiler from unrolling the enclosing loop, if its trip count is not a constant. Emits no instruction.

    Kernels of a step are so short that fetching their instructions takes measurable time. So code that runs once must
    be small.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(VOID, [])
        builder.call(ir.InlineAsm(kind, "", "", side_effect=True), [], attrs=("convergent",))
        return context.get_dummy_value()

    return types.void(), codegen


# Order between kernels and between blocks


def _for_sm_90(text: str) -> Any:
    def typing(typingctx):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            if compiling_for() >= (9, 0):
                call_asm(builder, VOID, text, "~{memory}", [])
            return context.get_dummy_value()

        return types.void(), codegen

    return typing


griddepcontrol_wait = intrinsic(_for_sm_90("griddepcontrol.wait;"))
"""griddepcontrol.wait: wait until the previous kernel has finished and its results are visible (sm_90). Before this a
kernel may only read what no kernel of the same run writes: weights, inputs, keys and values of earlier runs.
"""

griddepcontrol_launch_dependents = intrinsic(_for_sm_90("griddepcontrol.launch_dependents;"))
"""griddepcontrol.launch_dependents: the next kernel's blocks may start once all blocks of this one have come here or
ended (sm_90). They fill their rings while this kernel is still running, and wait before they read its results.
"""


@intrinsic
def atom_add_1(typingctx, counter):  # type: ignore[no-untyped-def]
    """atom.add of 1 to an int32 at a global address, with acquire and release fences; returns the old value.

    Not PTX's atom.inc, which wraps around."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return call_asm(builder, I32, "fence.acq_rel.gpu; atom.global.add.u32 $0, [$1], 1; fence.acq_rel.gpu;",
                    "=r,l,~{memory}", args)  # fmt: skip

    return types.int32(types.int64), codegen


@intrinsic
def store_release_system(typingctx, where, number):  # type: ignore[no-untyped-def]
    """st.release.sys: write an int64 that the host reads, after all earlier writes of this thread."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        call_asm(builder, VOID, "st.release.sys.global.u64 [$0], $1;", "l,l,~{memory}", args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
