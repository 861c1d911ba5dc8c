"""Values of a model's graph by name: beside transformers', beside the reference's, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

import numballama
from numballama import Error
from numballama.explain import values
from numballama.explain.values import Segment, near_names, segments, tokens_of_a_run
from numballama.model import Model
from numballama.quantization.kv import round_to
from tests.helpers.hf_files import HF
from tests.helpers.tiny import CHUNK, ids_of

GOLDEN = dict(np.load(HF.parent / "hf_values.npz"))
"""What transformers computes inside some models (golden/make_hf_values.py)."""
CLOSE = 2e-4


@pytest.fixture(scope="module")
def tiny(tiny_file: Path, tiny_tokenizer: Path) -> Iterator[Model]:
    with numballama.compile(tiny_file, tiny_tokenizer, device="cpu", threads=1) as model:
        yield model


@pytest.mark.parametrize("name", sorted({key.partition("/")[0] for key in GOLDEN}))
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_values_are_those_of_transformers(name: str, device: str) -> None:
    expected = {key.partition("/")[2]: array for key, array in GOLDEN.items() if key.startswith(f"{name}/")}
    ids = np.load(HF / name / "expected.npz")["ids"][: len(expected["layers.0.x_out"])]
    assert sum(key.endswith("probabilities") for key in expected) == 2
    with numballama.compile(HF / name, device=device, threads=1) as model:
        for key, array in expected.items():
            ours = {"layers.0.lens": "layers.0.lens_logits", "layers.1.lens": "logits"}.get(key, key)
            found = model.values(ids, ours)
            if key.endswith("probabilities"):
                found = found.swapaxes(0, 1)  # transformers: [heads, T, T]
            assert found.shape == array.shape
            assert np.abs(found - array).max() <= CLOSE, key


def test_a_text_of_several_runs(tiny: Model) -> None:
    """Attention sees all runs before; rows of values are in the text's order."""
    ids = (np.arange(CHUNK + 9) * 7 % 300).tolist()
    found = tiny.values(ids, "layers.1.probabilities")
    assert found.shape == (len(ids), 4, len(ids))
    np.testing.assert_allclose(found.sum(axis=2), 1, atol=1e-5)
    assert not np.triu(found.swapaxes(0, 1), 1).any() and found[-1, :, :CHUNK].any()
    np.testing.assert_allclose(tiny.values(ids, "logits"), tiny.logits(ids), atol=1e-5)
    with patch.object(values, "RUN_BYTES", 1), numballama.compile(tiny.path, device="cpu", threads=1) as other:
        np.testing.assert_allclose(other.values(ids, "layers.1.probabilities"), found, atol=1e-5)
        assert len(other.value_reader.program.inputs["ids"]) == 1


def test_every_value_of_the_graph_can_be_read(tiny: Model) -> None:
    """Each by name, equal to the reference's; temporaries, states, inputs, weights and constants."""
    ids = [1, 270, 5, 40, 299]
    names = list(tiny.value_reader.graph.values)
    assert {"x", "layers.0.k_cache'", "layers.0.scores", "layers.0.lens_final", "next", "rope_frequencies"} <= {*names}
    with numballama.compile(tiny.path, device="reference") as reference:
        for name in names:
            if name == "page_table":
                continue
            found, expected = tiny.values(ids, name), reference.values(ids, name)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            finite = np.isfinite(expected)
            np.testing.assert_array_equal(np.isfinite(found), finite)
            np.testing.assert_allclose(found[finite], expected[finite], atol=1e-4, err_msg=name)
    np.testing.assert_array_equal(tiny.values(ids, "ids"), ids)
    np.testing.assert_array_equal(
        tiny.values(ids, "layers.0.k_cache").reshape(5, -1), tiny.values(ids, "layers.0.k_rope")
    )


@pytest.mark.parametrize("kv_dtype", ["f16", "q8_0"])
def test_the_cache_holds_what_its_type_can(tiny: Model, kv_dtype: str) -> None:
    ids = list(range(3, 3 + 40))  # two pages
    with numballama.compile(tiny.path, device="cpu", threads=1, kv_dtype=kv_dtype) as model:
        written = model.values(ids, "layers.0.v").reshape(40, 2, 4)
        np.testing.assert_array_equal(model.values(ids, "layers.0.v_cache"), round_to(written, kv_dtype))  # type: ignore[arg-type]


def test_generation_goes_on_as_before(tiny: Model) -> None:
    before = tiny.generate("the story", 8, temperature=0)
    tiny.values(ids_of(tiny, "abc"), "layers.0.x_out")
    assert tiny.generate("the story", 8, temperature=0) == before


def test_steps_that_a_value_does_not_need_are_left_out(tiny: Model) -> None:
    graph = tiny.value_reader.graph
    kinds = [op.kind for op in graph.ops]
    parts = segments(graph, ["layers.1.x_out", "layers.0.x_out"])
    run = [index for part in parts for index in range(part.begin, part.end)]
    assert run == sorted(set(run)) and kinds.count("rmsnorm") == 6
    assert [kinds[index] for index in run].count("rmsnorm") == 4, "neither the norm of the lens nor the final one"
    assert [part.results for part in parts if part.results] == [("layers.0.x_out",), ("layers.1.x_out",)]
    assert segments(graph, ["angles"]) == [Segment(0, 1, ("angles",))]
    assert segments(graph, ["x"]) == [Segment(0, 2, ("x",))]


def test_a_run_takes_as_many_tokens_as_its_memory_allows(tiny: Model) -> None:
    graph = tiny.value_reader.graph
    assert tokens_of_a_run(graph, 64) == 64
    scores = graph.values["layers.0.scores"].nbytes
    with patch.object(values, "RUN_BYTES", 20 * scores):
        assert tokens_of_a_run(graph, 64) in (9, 10)  # scores and probabilities, and positions


def test_a_wrong_name_lists_near_ones(tiny: Model) -> None:
    with pytest.raises(Error, match=r"no value 'layers\.1\.probs'; did you mean layers\.1\.probabilities"):
        tiny.values([5], "layers.1.probs")
    assert set(near_names(tiny.value_reader.graph, "layers.9.probabilities")) == {
        "layers.0.probabilities", "layers.1.probabilities"
    }  # fmt: skip
    with pytest.raises(Error, match=r"no value 'zzz'; print\(model.graph\) lists all"):
        tiny.values([5], "zzz")
    with pytest.raises(Error, match="must be a string, found 3"):
        tiny.values([5], 3)  # type: ignore[arg-type]
    with pytest.raises(Error, match="page_table says where keys and values are"):
        tiny.values([5], "page_table")


def test_a_result_has_a_bound(tiny: Model) -> None:
    with patch.object(values, "MOST_BYTES", 6399):
        assert tiny.values(range(19), "layers.0.probabilities").nbytes == 4 * 19 * 19 * 4
        with pytest.raises(
            Error, match=r"layers.0.probabilities takes 6.2 KiB, values\(\) returns up to 6.2 KiB; give fewer"
        ):
            tiny.values(range(20), "layers.0.probabilities")
        with pytest.raises(Error, match=r"tok_embeddings takes 18.8 KiB, .*model.weights"):
            tiny.values([1], "tok_embeddings")
    with (
        patch("numballama.memory.available_bytes", lambda: 100),
        pytest.raises(Error, match=r"100 B are free; give few"),
    ):
        tiny.values(range(20), "layers.0.x_out")


def test_ids_are_checked(tiny: Model) -> None:
    with pytest.raises(Error, match="the vocabulary has 0 to 299"):
        tiny.values([300], "x")
    with pytest.raises(numballama.ContextError, match="the context"):
        tiny.values([1] * 1000, "x")


def test_a_closed_model_says_so(tiny: Model) -> None:
    with numballama.compile(tiny.path, device="reference") as model:
        model.values([1], "x")
    with pytest.raises(Error, match="closed"):
        model.values([1], "x")
