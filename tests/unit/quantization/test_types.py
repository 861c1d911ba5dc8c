"""The table of storage types: it agrees with ggml, and every type that runs has every decoder."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from numballama.checkpoint import Weight
from numballama.cpu import panel_bytes, vecdot
from numballama.cuda.launch import ELEMENTS_PER_16_BYTES, ITEM_BYTES, PAYLOAD_TYPE, QUANTIZED
from numballama.cuda.repack import LAYOUTS
from numballama.formats.gguf.header import TENSOR_TYPES
from numballama.quantization import activations, blocks
from numballama.quantization.convert import dequantize
from numballama.quantization.types import (
    ACTIVATION_QUANT,
    BLOCKS,
    FALLBACK_TYPE,
    KV_TYPES,
    LINEAR_TYPES,
    TYPE_TRAITS,
    VEC_DOT_TYPE,
    KVType,
    WeightType,
)
from tests.helpers.cuda_host import missing_packages

IN_GGUF = [name for name, traits in TYPE_TRAITS.items() if traits.gguf_id is not None]
RUNNABLE_BLOCKS = [name for name in LINEAR_TYPES if name in BLOCKS]
FTYPE_NAMES = {"f32": "ALL_F32", "q3_k": "MOSTLY_Q3_K_M", "q4_k": "MOSTLY_Q4_K_M", "q5_k": "MOSTLY_Q5_K_M"}


def test_linear_and_kv_types() -> None:
    assert LINEAR_TYPES == ("f32", "f16", "bf16", "int8", "q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k")
    assert KV_TYPES == ("f32", "f16", "bf16", "q8_0") == get_args(KVType)
    assert set(LINEAR_TYPES) | FALLBACK_TYPE.keys() == TYPE_TRAITS.keys()
    assert {target.name for target in FALLBACK_TYPE.values()} <= set(LINEAR_TYPES)


@pytest.mark.parametrize("name", IN_GGUF)
def test_ids_and_sizes_are_ggmls(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    traits, kind = TYPE_TRAITS[name], gguf.GGMLQuantizationType[name.upper()]
    assert traits.gguf_id == kind
    assert (traits.block_size, traits.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert TENSOR_TYPES[kind] == (name.upper(), traits.block_size, traits.block_bytes)
    assert traits.ftype == gguf.LlamaFileType[FTYPE_NAMES.get(name, f"MOSTLY_{name.upper()}")]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_type_decodes_in_numpy(name: str) -> None:
    assert name in blocks.DECODERS
    traits = TYPE_TRAITS[name]
    assert traits.block_size % traits.scale_group == 0
    assert not (traits.has_min and traits.zero_point)
    assert traits.has_min == bool({"m", "dmin"} & set(traits.record.names or ()))


@pytest.mark.parametrize("name", BLOCKS)
def test_zero_point_and_minimum_are_the_decoders(name: str) -> None:
    """Quants of 0 are -zero_point times the scale, or the minimum; quants of the largest value are above it by
    2^bits - 1 scales. With a codebook they are its first and last number."""
    traits = TYPE_TRAITS[name]
    decoded = []
    for fill in (0, 255):
        block = np.zeros(1, traits.record)
        for field in traits.record.names or ():
            if field in ("d", "m", "dmin"):
                block[field] = np.float16(1).view(np.uint16)
            elif field == "scales":  # scales of 1, minimums of 1
                block[field] = {"q2_k": 0x11, "q6_k": 1}.get(name, 0)
            else:
                block[field] = np.array(fill, np.uint8).astype(block[field].dtype)
        if name == "q3_k":
            block["scales"][0, :8], block["scales"][0, 8:] = 0x11, 0xAA  # 33, from which 32 is subtracted
        if name in ("q4_k", "q5_k"):
            block["scales"][0, :8], block["scales"][0, 8:] = 1, 0x11
        if name == "iq4_xs":
            block["scales_h"], block["scales_l"] = 0xAAAA, 0x11  # 33, from which 32 is subtracted
        weight = Weight((1, traits.block_size), WeightType(name), block.view(np.uint8).reshape(1, -1))
        decoded.append(dequantize(weight))
    low, high = (np.unique(values) for values in decoded)
    if traits.codebook:
        assert len(traits.codebook) == 2**traits.bits
        assert (low.tolist(), high.tolist()) == ([traits.codebook[0]], [traits.codebook[-1]])
        return
    if name == "q8_0":  # signed
        assert (low.tolist(), high.tolist()) == ([0], [-1])
        return
    zero = {"m": 1, "dmin": -1}.get(next((f for f in traits.record.names or () if f in ("m", "dmin")), ""), 0)
    assert low.tolist() == [zero - traits.zero_point]
    assert high.tolist() == [zero - traits.zero_point + 2**traits.bits - 1]


@pytest.mark.parametrize("name", RUNNABLE_BLOCKS)
def test_every_runnable_block_type_has_cpu_decoders(name: str) -> None:
    assert name in vecdot.RECORD_TYPES
    assert name in vecdot._DECODERS
    assert vecdot.RECORD_TYPES[name].size == TYPE_TRAITS[name].block_bytes
    assert name in VEC_DOT_TYPE
    assert name in panel_bytes.DECODERS


def test_no_decoder_is_left_over() -> None:
    assert blocks.DECODERS.keys() == BLOCKS.keys()
    assert blocks.ENCODERS.keys() <= set(RUNNABLE_BLOCKS)
    assert vecdot._DECODERS.keys() == panel_bytes.DECODERS.keys() == set(RUNNABLE_BLOCKS) == VEC_DOT_TYPE.keys()
    assert activations._QUANTIZERS.keys() == ACTIVATION_QUANT.keys() == set(VEC_DOT_TYPE.values())
    for old, new in blocks.REPACKERS:
        assert TYPE_TRAITS[old].fallback == new


@pytest.mark.parametrize("name", LINEAR_TYPES)
def test_every_runnable_type_has_a_device_layout(name: str) -> None:
    payload = PAYLOAD_TYPE[name]
    assert ITEM_BYTES[payload] >= 1
    assert ELEMENTS_PER_16_BYTES[payload] in (4, 8, 16, 32)
    assert (payload in QUANTIZED) == (not TYPE_TRAITS[name].is_float)
    assert (name in LAYOUTS) == (name in BLOCKS)


@pytest.mark.skipif(bool(missing_packages()), reason=missing_packages())
@pytest.mark.parametrize("name", LINEAR_TYPES)
def test_every_payload_has_an_element_type_on_the_device(name: str) -> None:
    from numballama.cuda.quant_traits import ELEMENT_TYPES, PER_16_BYTES, SCALED

    payload = PAYLOAD_TYPE[name]
    element = ELEMENT_TYPES[payload].name
    assert PER_16_BYTES[element] == ELEMENTS_PER_16_BYTES[payload]
    assert (element in SCALED) == (payload in QUANTIZED)


@pytest.mark.parametrize("kind", ACTIVATION_QUANT)
def test_groups_of_activations_hold_whole_blocks_of_weights(kind: str) -> None:
    way = ACTIVATION_QUANT[kind]
    assert way.group % way.sum_group == 0
    for name, vec_dot_type in VEC_DOT_TYPE.items():
        if vec_dot_type == kind:
            assert way.group == TYPE_TRAITS[name].block_size
            assert way.sum_group <= TYPE_TRAITS[name].scale_group
