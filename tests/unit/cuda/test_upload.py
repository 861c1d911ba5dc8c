"""The upload: every byte of every weight reaches its place, on a device whose memory is the host's."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.cuda_host import HostDevice, HostMemory, install, missing_packages

if reason := missing_packages():
    pytest.skip(f"the backend cannot be imported: {reason}", allow_module_level=True)

from numballama.checkpoint import Weight
from numballama.cuda import upload
from numballama.cuda import weights as module
from numballama.cuda.launch import Matrix
from numballama.cuda.weights import Weights, layout_of
from numballama.errors import DeviceError
from numballama.quantization import convert as quant
from numballama.quantization.types import F32
from tests.helpers.bounds import as_weight
from tests.helpers.repacked import memory_of

TYPES = ("f32", "f16", "bf16", "int8", "q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k")


@pytest.mark.parametrize("staging", [1024, 1 << 20])
def test_upload(monkeypatch: pytest.MonkeyPatch, staging: int) -> None:
    """Each weight's bytes reach its place, also where a weight is longer than a pinned buffer; padding is zeros."""
    install(patch=monkeypatch.setattr)
    monkeypatch.setattr(module, "STAGING", staging)
    monkeypatch.setattr(upload, "STAGING", staging)
    rng = np.random.default_rng(2)
    weights = {"norm": as_weight(rng.standard_normal(600).astype(np.float32), "f32")}
    for kind in TYPES:
        group = 32 * (kind == "int8")
        weights[kind] = as_weight(rng.standard_normal((9, 768), np.float32), kind, group)
    weights["odd"] = as_weight(rng.standard_normal((5, 37), np.float32), "f16")
    weights["blocks"] = as_weight(rng.standard_normal((5, 96), np.float32), "q4_0")
    uploaded = Weights(HostDevice(), weights)  # type: ignore[arg-type]
    assert uploaded.nbytes == sum(layout_of(weight).nbytes for weight in weights.values())
    memory = np.empty(uploaded.nbytes, np.uint8)
    HostDevice().read(uploaded.memory.address, memory)
    for name, weight in weights.items():
        operand, layout = uploaded.operands[name], layout_of(weight)
        first = (operand.payload if isinstance(operand, Matrix) else operand).address - uploaded.memory.address
        expected, rows = memory_of(layout), layout.rows * layout.row_bytes
        np.testing.assert_array_equal(memory[first : first + rows], expected[:rows], err_msg=name)
        if layout.scales:
            used = slice(layout.scales_offset, layout.scales_offset + operand.scales.nbytes)  # type: ignore[union-attr]
            np.testing.assert_array_equal(memory[first:][used], expected[used], err_msg=name)
    f16 = uploaded.operands["f16"]
    assert isinstance(f16, Matrix)
    start = f16.payload.address - uploaded.memory.address
    elements = memory[start : start + 9 * 1536].view(np.float16).reshape(9, 768)
    np.testing.assert_array_equal(elements.astype(np.float32), quant.dequantize(weights["f16"]))
    uploaded.free()


def test_the_file_is_read_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read by their place in the file, whatever the order of their names."""
    install(patch=monkeypatch.setattr)
    file = np.random.default_rng(3).standard_normal((3, 64), np.float32)
    weights = {name: Weight((2, 32), F32, file[i].reshape(2, 32)) for name, i in (("b", 1), ("c", 2), ("a", 0))}
    read: list[int] = []
    before = upload.Upload.copy

    def copy(self: upload.Upload, address: int, source: np.ndarray) -> None:
        read.append((source.ctypes.data - file.ctypes.data) // 256)
        before(self, address, source)

    monkeypatch.setattr(upload.Upload, "copy", copy)
    uploaded = Weights(HostDevice(), weights)  # type: ignore[arg-type]
    assert read == [0, 1, 2]
    assert list(uploaded.operands) == ["b", "c", "a"]


def test_memory_is_freed_where_an_upload_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    install(patch=monkeypatch.setattr)
    before = len(HostMemory.live)
    weight = as_weight(np.ones((4, 64), np.float32), "q8_0")

    def fail(*arguments: object) -> None:
        raise DeviceError("no more")

    monkeypatch.setattr(upload, "compile_kernel", fail)
    with pytest.raises(DeviceError, match="no more"):
        Weights(HostDevice(), {"w": weight})  # type: ignore[arg-type]
    assert len(HostMemory.live) == before
