"""The registry: a kernel whose signature does not fit the op's rule is refused where it is defined."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from numballama import ir, registry
from numballama.cpu import CpuBackend
from numballama.cuda import ops  # noqa: F401 (registers the kernels)
from numballama.errors import Error, UnsupportedError
from numballama.ir import Graph, Value, rule, verify
from numballama.registry import KernelRef, kernel


@pytest.fixture(autouse=True)
def own_entries() -> Iterator[None]:
    """Remove the rules and kernels that a test declares."""
    rules, kernels = dict(ir.RULES), {key: list(entries) for key, entries in registry._kernels.items()}

    @rule("sub", inputs=("a", "b"), outputs=("out",), attrs=("scale",), optional=("scale",))
    def sub(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[ir.Shaped]:
        return [(inputs[0].shape, "f32")]

    yield
    ir.RULES.clear()
    ir.RULES.update(rules)
    registry._kernels.clear()
    registry._kernels.update(kernels)


def swapped(worker, n_workers, tokens, a, out, b): ...  # type: ignore[no-untyped-def]
def short(worker, n_workers, tokens, a): ...  # type: ignore[no-untyped-def]
def without_leading(a, b, out): ...  # type: ignore[no-untyped-def]
def swapped_leading(n_workers, worker, tokens, a, b, out, scale): ...  # type: ignore[no-untyped-def]
def unknown(worker, n_workers, tokens, a, b, out, eps): ...  # type: ignore[no-untyped-def]
def no_scratch(worker, n_workers, tokens, a, b, out, scale): ...  # type: ignore[no-untyped-def]
def launch_without_context(a, b, out): ...  # type: ignore[no-untyped-def]
def launch_swapped(ctx, a, out, b): ...  # type: ignore[no-untyped-def]
def reference_with_output(a, b, out): ...  # type: ignore[no-untyped-def]
def reference_swapped(b, a): ...  # type: ignore[no-untyped-def]


@pytest.mark.parametrize(
    ("backend", "function", "scratch", "message"),
    [
        ("cpu", swapped, (), "cpu kernel swapped for sub: parameter 5 must be `b`, found `out`"),
        ("cpu", short, (), "parameter 5 must be `b`, found nothing"),
        ("cpu", without_leading, (), "parameter 1 must be `worker`, found `a`"),
        ("cpu", swapped_leading, (), "parameter 1 must be `worker`, found `n_workers`"),
        ("cpu", unknown, (), "`eps` is no attribute of the op and no scratch array of the kernel"),
        ("cpu", no_scratch, ("buffer",), "scratch array `buffer` is declared but no parameter"),
        ("cpu", no_scratch, ("scale",), "scratch array `scale` has the name of an operand or attribute"),
        ("cuda", launch_without_context, (), "cuda kernel launch_without_context for sub: parameter 1 must be `ctx`"),
        ("cuda", launch_swapped, (), "parameter 3 must be `b`, found `out`"),
        ("reference", reference_with_output, (), "`out` is no attribute of the op"),
        ("reference", reference_swapped, (), "parameter 1 must be `a`, found `b`"),
    ],
)
def test_a_kernel_with_the_wrong_parameters_is_refused(
    backend: str, function: Callable[..., Any], scratch: Sequence[str], message: str
) -> None:
    with pytest.raises(Error, match=message):
        kernel("sub", backend, "f32", "f32", **{name: lambda *shapes, workers: (1,) for name in scratch})(function)
    assert not registry.has("sub", backend, ["f32", "f32"])


def test_a_kernel_must_take_every_attribute_that_is_not_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all backends, and for a kernel by name when it is loaded."""
    rule("pow", inputs=("x",), attrs=("exponent", "hint"), optional=("hint",))(lambda inputs, attrs: [((1,), "f32")])

    def on_cpu(worker, n_workers, tokens, x, out, hint): ...  # type: ignore[no-untyped-def]
    def on_cuda(ctx, x, out): ...  # type: ignore[no-untyped-def]
    def meaning(x): ...  # type: ignore[no-untyped-def]
    def right(worker, n_workers, tokens, x, out, exponent): ...  # type: ignore[no-untyped-def]

    message = "attribute `exponent` changes the result, so it must be a parameter"
    for backend, function in (("cpu", on_cpu), ("cuda", on_cuda), ("reference", meaning)):
        with pytest.raises(Error, match=message):
            kernel("pow", backend, "f32")(function)
        assert not registry.has("pow", backend, ["f32"])
    kernel("pow", "cpu", "f32")(right)
    (tmp_path / "lazy_pow.py").write_text("def without(worker, n_workers, tokens, x, out): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    kernel("pow", "cpu", "f32")(KernelRef("lazy_pow", "without"))
    with pytest.raises(Error, match=message):
        _ = registry.find("pow", "cpu", ["f32"]).function


def test_swapped_parameters_overwrite_no_input() -> None:
    """The kernel that once ran, and wrote into its input: it is an error now, and the right one computes a - b."""
    with pytest.raises(Error, match="expected \\(worker, n_workers, tokens, a, b, out\\)"):
        kernel("sub", "cpu", "f32", "f32")(swapped)

    @kernel("sub", "cpu", "f32", "f32")
    def sub(worker, n_workers, tokens, a, b, out):  # type: ignore[no-untyped-def]
        for t in range(worker, tokens, n_workers):
            for k in range(a.shape[1]):
                out[t, k] = a[t, k] - b[t, k]

    graph = Graph("sub")
    a, b = graph.input("a", (2, 4), "f32"), graph.input("b", (2, 4), "f32")
    graph.outputs = [graph.add("sub", a, b, out="y").name]
    program = CpuBackend({}).program(graph)
    program.inputs["a"][:], program.inputs["b"][:] = 7, 5
    program.run(2)
    assert (program.value("y") == 2).all() and (program.inputs["b"] == 5).all()


def test_an_in_place_kernel_of_a_user() -> None:
    """The updated state is no operand of its own, lives through runs, and takes no place in the arena."""

    @rule("accumulate", inputs=("total", "x"), inplace={"out": "total"})
    def accumulate_shape(inputs: Sequence[Value], attrs: Mapping[str, Any]) -> list[ir.Shaped]:
        return [(inputs[0].shape, "f32")]

    @kernel("accumulate", "cpu", "f32", "f32")
    def accumulate(worker, n_workers, tokens, total, x):  # type: ignore[no-untyped-def]
        if worker == 0:
            for t in range(tokens):
                for k in range(x.shape[1]):
                    total[t, k] += x[t, k]

    graph = Graph("running sum")
    x, total = graph.input("x", (1, 4), "f32"), graph.state("total", (1, 4), "f32")
    after = graph.add("accumulate", total, x, out="total'")
    graph.outputs = [graph.add("add", after, x, out="y").name]
    verify(graph)
    program = CpuBackend({}).program(graph)
    assert "total'" not in program.plan.placements
    for count in (1, 2, 3):
        program.inputs["x"][:] = 2
        program.run(1)
        assert (program.value("total") == 2 * count).all() and (program.value("y") == 2 * count + 2).all()


def test_a_kernel_for_an_unknown_backend_or_type() -> None:
    with pytest.raises(Error, match=r"kernel short: unknown backend 'cdua'; choose from cpu, cuda, reference"):
        kernel("sub", "cdua", "f32", "f32")(short)
    with pytest.raises(Error, match=r"kernel short: unknown operand type 'f33'; choose from \*, bf16"):
        kernel("sub", "cpu", "f32", ("f16", "f33"))(short)


def test_other_names_of_leading_parameters_are_welcome() -> None:
    @kernel("sub", "cpu", "f32", "f32")
    def sub(ith, nth, tokens, a, b, out, scale): ...  # type: ignore[no-untyped-def]

    assert registry.find("sub", "cpu", ["f32", "f32"]).function is sub


def test_a_kernel_for_an_unknown_op_or_number_of_operands() -> None:
    with pytest.raises(Error, match=r"kernel swapped: there is no op 'subtract'; declare it first: @rule"):
        kernel("subtract", "cpu", "f32", "f32")(swapped)
    with pytest.raises(Error, match=r"kernel swapped has 3 types: sub takes \(a, b\), found 3 inputs"):
        kernel("sub", "cpu", "f32", "f32", "f32")(swapped)


def test_a_kernel_by_name_is_imported_and_checked_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazy_kernels.py").write_text(
        "def right(worker, n_workers, tokens, a, b, out, scale): ...\n"
        "def wrong(worker, n_workers, tokens, a, out, b): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    kernel("sub", "cpu", "f32", "f32")(KernelRef("lazy_kernels", "right"))
    found = registry.find("sub", "cpu", ["f32", "f32"])
    assert found.name == "right" and "lazy_kernels" not in sys.modules
    assert found.named == ["scale"] and "lazy_kernels" in sys.modules
    kernel("sub", "cpu", "f32", "f32")(KernelRef("lazy_kernels", "wrong"))
    with pytest.raises(Error, match="parameter 5 must be `b`, found `out`"):
        _ = registry.find("sub", "cpu", ["f32", "f32"]).function


def test_what_is_not_there_is_named() -> None:
    kernel("sub", "reference", "f32", "f32")(lambda a, b, scale=1: a - b)
    with pytest.raises(
        UnsupportedError, match=r"no reference kernel for sub\(f16, f32\); registered for this op: \('f32'"
    ):
        registry.find("sub", "reference", ["f16", "f32"])


def test_every_kernel_of_the_package_fits_its_rule() -> None:
    """Those behind a `KernelRef` too."""
    entries = [entry for many in registry._kernels.values() for entry in many]
    assert {entry.backend for entry in entries} == set(registry.CONVENTIONS) and len(entries) > 90
    for entry in entries:
        registry.check_signature(entry.function, entry)


def test_a_look_up_before_the_backend_is_imported_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_kernels", {})
    with pytest.raises(Error, match=r"no kernels of backend 'cpu' are registered; import the backend first"):
        registry.has("add", "cpu", ["f32", "f32"])
