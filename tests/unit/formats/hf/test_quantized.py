"""Matrices quantised by MLX, GPTQ and AWQ: packed here element by element, compared with scale · q + offset."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.errors import FormatError, UnsupportedError
from numballama.loader import open_checkpoint
from numballama.quantization.convert import dequantize
from tests.helpers.hf_files import save_tensors, tensors
from tests.helpers.quantized_files import DIM, HIDDEN, VOCAB, pack, write

CASES = st.one_of(
    st.tuples(st.just("mlx"), st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([16, 32, 64])),
    st.tuples(st.just("gptq"), st.sampled_from([4, 8]), st.sampled_from([16, 32, 64])),
    st.tuples(st.just("awq"), st.just(4), st.sampled_from([32, 64])),
)


def check(folder: Path, method: str, bits: int, group: int, seed: int, order: bool = False, zero: int = 1) -> None:
    rng = np.random.default_rng(seed)
    wanted = write(folder, method, bits, group, rng, order=order, zero=zero, biases=method == "gptq")
    opened = open_checkpoint(folder)
    for name, values in wanted.items():
        weight = opened.weights[name]
        shuffled = order and values.shape[1] > group
        exact = bits == 4 and group % 32 == 0 and not shuffled
        assert weight.type.name == ("q4_1" if exact else "f16")
        assert weight.data.nbytes == weight.nbytes
        got = dequantize(weight).reshape(values.shape)
        if method == "mlx" and exact:
            np.testing.assert_allclose(got, values, rtol=1e-6, atol=1e-9)
        else:  # half of float16's last bit of the largest term
            np.testing.assert_allclose(got, values, rtol=0, atol=np.abs(values).max() * 2**-10)
    kind = {"mlx": "MLX", "gptq": "GPTQ", "awq": "AWQ"}[method]
    assert any(note.startswith(f"matrices quantised by {kind} run as") for note in opened.notes)


@pytest.mark.parametrize(
    ("method", "bits"), [*(("mlx", bits) for bits in (2, 3, 4, 5, 6, 8)), ("gptq", 4), ("gptq", 8), ("awq", 4)]
)
def test_each_method(tmp_path: Path, method: str, bits: int) -> None:
    check(tmp_path / "m", method, bits, 32, 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_point_of_0_borrows_from_its_neighbour(tmp_path: Path, bits: int) -> None:
    """GPTQ's first format subtracts 1 from each zero point, and GPTQModel does so from whole words."""
    rng = np.random.default_rng(5)
    write(tmp_path / "m", "gptq", bits, 32, rng)
    arrays, name = tensors(tmp_path / "m"), "model.layers.0.mlp.up_proj."
    zeros = rng.integers(0, 3, (2, HIDDEN))
    zeros[0], zeros[1, -1] = 0, 0
    ones = np.uint32(sum(1 << at for at in range(0, 32, bits)))
    arrays[name + "qzeros"] = (pack(zeros, bits) - ones).view(np.int32)
    save_tensors(tmp_path / "m" / "model.safetensors", arrays)
    q = (arrays[name + "qweight"].view(np.uint32)[:, None] >> np.arange(0, 32, bits, dtype=np.uint32)[:, None]) & (
        (1 << bits) - 1
    )
    values = (q.reshape(DIM, HIDDEN) - zeros.repeat(32, 0)) * arrays[name + "scales"].astype(np.float64).repeat(32, 0)
    got = dequantize(open_checkpoint(tmp_path / "m").weights["layers.0.w3"])
    np.testing.assert_allclose(got, values.T, rtol=0, atol=np.abs(values).max() * 2**-10)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(case=CASES, order=st.booleans(), zero=st.sampled_from([0, 1]), seed=st.integers(0, 1 << 20))
def test_matrices_are_scale_times_integer_plus_offset(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[str, int, int], order: bool, zero: int, seed: int
) -> None:
    method, bits, group = case
    check(tmp_path_factory.mktemp("q") / "m", method, bits, group, seed, order and method == "gptq", zero)


def test_mlx_quantises_the_embedding_and_layers_differ(tmp_path: Path) -> None:
    """The shapes say how each matrix is quantised, whatever the configuration says of all."""
    rng = np.random.default_rng(3)
    write(tmp_path / "m", "mlx", 4, 32, rng)
    arrays = tensors(tmp_path / "m")
    q = rng.integers(0, 256, (VOCAB, DIM))
    scale = (rng.random((VOCAB, 2)) * 0.01).astype(np.float16)
    base = "model.embed_tokens."
    arrays |= {base + "weight": pack(q, 8), base + "scales": scale, base + "biases": np.zeros_like(scale)}
    save_tensors(tmp_path / "m" / "model.safetensors", arrays)
    opened = open_checkpoint(tmp_path / "m")
    got = dequantize(opened.weights["tok_embeddings"])
    np.testing.assert_allclose(got, np.repeat(scale.astype(np.float32), 32, 1) * q, rtol=1e-3)
    assert len(opened.notes) == 2 and "q4_1" in opened.notes[1] and "f16" in opened.notes[0]


def test_bfloat16_scales(tmp_path: Path) -> None:
    """MLX's usual type: eight bits of a scale fit float16."""
    rng = np.random.default_rng(4)
    write(tmp_path / "m", "mlx", 4, 64, rng)
    arrays = tensors(tmp_path / "m")
    name = "model.layers.0.mlp.up_proj."
    narrow = {}
    for part in ("scales", "biases"):
        bits = (arrays[name + part].astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        arrays[name + part] = bits
        narrow[part] = (bits.astype(np.uint32) << 16).view(np.float32)
    save_tensors(tmp_path / "m" / "model.safetensors", arrays)
    words = arrays[name + "weight"]
    q = np.stack([words >> np.uint32(4 * n) & 15 for n in range(8)], -1).reshape(HIDDEN, DIM)
    got = dequantize(open_checkpoint(tmp_path / "m").weights["layers.0.w3"])
    np.testing.assert_array_equal(got, narrow["scales"].repeat(64, 1) * q + narrow["biases"].repeat(64, 1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedError, "quant_method.*fp8.*GPTQ"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, UnsupportedError, "AWQ"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, UnsupportedError, "bits': 3"),
        (
            {"quantization_config": {"checkpoint_format": "marlin", "quant_method": "gptq", "bits": 4}},
            UnsupportedError,
            "'checkpoint_format': 'marlin'.*not supported",
        ),
        (
            {"quantization_config": {"is_marlin_format": True, "quant_method": "gptq", "bits": 4}},
            UnsupportedError,
            "'is_marlin_format': True.*not supported",
        ),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}}, UnsupportedError, "gemv"),
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, UnsupportedError, "mxfp4"),
        ({"quantization_config": 7}, UnsupportedError, "quantization_config is 7"),
        ({"quantization_config": []}, UnsupportedError, r"quantization_config is \[\]"),
    ],
)
def test_other_schemes_are_named(
    copy: Callable[[str], Path], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = copy("llama")
    keys = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(keys))
    with pytest.raises(error, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16"}, "bitsandbytes"),
        ({"config_groups": {"group_0": {"input_activations": {"dynamic": True, "num_bits": 8}}}}, "compressed-tensors"),
    ],
)
def test_the_method_is_named_however_long_its_settings_are(
    copy: Callable[[str], Path], own: dict[str, Any], message: str
) -> None:
    folder = copy("llama")
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(keys | {"quantization_config": own | {"quant_method": message, "z": [0] * 99}})
    )
    with pytest.raises(UnsupportedError, match=f"quantization_config is .'quant_method': '{message}'.*not supported"):
        open_checkpoint(folder)


OLDER = {
    "gptq": ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}),
    "awq": ("quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
}
"""Files that AutoGPTQ and AutoAWQ wrote before transformers had a key for them."""


@pytest.mark.parametrize("method", sorted(OLDER))
def test_the_config_of_an_older_tool(tmp_path: Path, method: str) -> None:
    write(tmp_path / "m", method, 4, 32, np.random.default_rng(7))
    wanted = open_checkpoint(tmp_path / "m")
    keys = json.loads((tmp_path / "m" / "config.json").read_text())
    del keys["quantization_config"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(keys))
    with pytest.raises(
        UnsupportedError, match=r"q_proj.qweight belongs to weights quantised by GPTQ or AWQ, but config.json has no"
    ):
        open_checkpoint(tmp_path / "m")
    name, content = OLDER[method]
    (tmp_path / "m" / name).write_text(json.dumps({"bits": 3, "w_bit": 3}))
    with pytest.raises(UnsupportedError, match=rf"{name}: quantization_config is .*'bits': 3"):
        open_checkpoint(tmp_path / "m")
    (tmp_path / "m" / name).write_text(json.dumps(content))
    opened = open_checkpoint(tmp_path / "m")
    for weight in wanted.weights:
        np.testing.assert_array_equal(dequantize(opened.weights[weight]), dequantize(wanted.weights[weight]))


def test_bitsandbytes_without_its_config(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (file,) = folder.glob("*.safetensors")
    arrays = tensors(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    arrays |= {name: np.zeros((DIM * DIM // 8, 1), np.uint32), f"{name}.absmax": np.ones(DIM, np.float32)}
    save_tensors(file, arrays)
    with pytest.raises(UnsupportedError, match=r"weight.absmax belongs to weights quantised by bitsandbytes"):
        open_checkpoint(folder)


def test_mlx_has_no_other_bits(tmp_path: Path) -> None:
    write(tmp_path / "m", "mlx", 4, 32, np.random.default_rng(8))
    arrays, name = tensors(tmp_path / "m"), "model.layers.0.self_attn.q_proj.weight"
    for width, found in ((2 * DIM // 32 // 2, 1), (7 * DIM // 32, 7)):
        save_tensors(tmp_path / "m" / "model.safetensors", arrays | {name: np.zeros((DIM, width), np.uint32)})
        with pytest.raises(
            UnsupportedError, match=f"q_proj.weight has {found} bits; read are MLX .affine, 2 to 6 or 8"
        ):
            open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("method", ["mlx", "gptq", "awq"])
def test_parts_that_do_not_fit(tmp_path: Path, method: str) -> None:
    write(tmp_path / "m", method, 4, 32, np.random.default_rng(5))
    whole = tensors(tmp_path / "m")
    own = [name for name in whole if "up_proj." in name]
    for name in own:
        parts = {n: a for n, a in whole.items() if n != name}
        save_tensors(tmp_path / "m" / "model.safetensors", parts)
        if name.endswith("g_idx"):
            open_checkpoint(tmp_path / "m")
        else:
            with pytest.raises((FormatError, UnsupportedError)):
                open_checkpoint(tmp_path / "m")
        save_tensors(tmp_path / "m" / "model.safetensors", parts | {name: whole[name][:-1].copy()})
        with pytest.raises(FormatError):
            open_checkpoint(tmp_path / "m")
        save_tensors(tmp_path / "m" / "model.safetensors", parts | {name: np.ones(whole[name].shape, np.float32)})
        if name.endswith(("scales", "biases")):
            open_checkpoint(tmp_path / "m")
        else:
            with pytest.raises(UnsupportedError, match="has type F32"):
                open_checkpoint(tmp_path / "m")
    if method == "gptq":
        name = next(n for n in own if n.endswith("g_idx"))
        save_tensors(tmp_path / "m" / "model.safetensors", whole | {name: np.full_like(whole[name], -1)})
        with pytest.raises(FormatError, match="a group is out of range"):
            open_checkpoint(tmp_path / "m")


def test_biases_of_a_gptq_model_that_are_not_zero(tmp_path: Path) -> None:
    write(tmp_path / "m", "gptq", 4, 32, np.random.default_rng(6), biases=True)
    arrays = tensors(tmp_path / "m") | {"model.layers.0.mlp.up_proj.bias": np.ones(HIDDEN, np.float16)}
    save_tensors(tmp_path / "m" / "model.safetensors", arrays)
    with pytest.raises(UnsupportedError, match="no place"):
        open_checkpoint(tmp_path / "m")
