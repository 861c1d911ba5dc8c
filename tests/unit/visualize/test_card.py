"""Cards: the same facts as HTML and as text, and nothing of a file is obeyed."""

from __future__ import annotations

from pathlib import Path

import pytest

import numballama
from numballama.config import ModelConfig, RopeScaling
from numballama.model import Model
from numballama.visualize import card
from numballama.visualize.card import Card
from numballama.visualize.parts import bytes_by_part
from tests.helpers.markup import Element, parsed, tags
from tests.unit.visualize.test_html import HOSTILE

CONFIG = ModelConfig(64, 96, 3, 4, 2, 50_000, 40)
PARTS = bytes_by_part([("tok_embeddings", "q8_0", (50_000, 64), 3_400_000), ("norm", "f32", (64,), 256)], tied=True)
MADE = Card(
    "a model",
    "about it",
    card.config_facts(CONFIG),
    PARTS,
    [("weights", 3_400_256, "mapped"), ("process", None, "unknown")],
    {"f32": {512: 1 << 20, 2048: 1 << 30}, "q8_0": {512: 1 << 19, 2048: 1 << 28}},
    1 << 29,
    ["a note"],
)


def cells(root: Element) -> list[list[str]]:
    return [[cell.text for cell in row.children] for row in root.all("tr")]


def test_a_card_as_html() -> None:
    root = parsed(card.as_html(MADE))
    found = cells(root)
    assert ["vocab_size", "50,000"] in found and ["rope_theta", "10000.0"] in found
    assert ["part", "parameters", "q8_0", "f32", "bytes", "share"] in found
    assert ["embedding, classifier", "3,200,000", "3.2 MiB", "", "3.2 MiB", "100.0%"] in found
    assert ["all", "3,200,064", "3.2 MiB", "256 B", "3.2 MiB", "100.0%"] in found
    assert ["process", "", "unknown"] in found
    assert ["2,048", "! 1.0 GiB", "256.0 MiB"] in found, "more than is free"
    assert "512.0 MiB are free, ! is more" in root.text and "a note" in root.text
    shares = [piece.attributes["style"] for piece in root.all("i")]
    assert len(shares) == 2 and shares[0].startswith("width:99.99%")


def test_a_card_as_text_has_the_same() -> None:
    lines = card.as_text(MADE).splitlines()
    assert lines[:3] == ["a model", "  about it", "  note: a note"]
    text = "\n".join(" ".join(line.split()) for line in lines)
    for row in cells(parsed(card.as_html(MADE))):
        assert " ".join(" ".join(row).split()).replace("configuration ", "configuration") in text
    assert max(map(len, lines)) <= 80


def test_a_config_shows_what_differs_from_its_defaults() -> None:
    names = [name for name, _ in card.config_facts(CONFIG)]
    assert "window" not in names and "rope_scaling" not in names and "n_kv_heads" in names
    other = ModelConfig(64, 96, 3, 4, 2, 50, 40, window=8, rope_scaling=RopeScaling("factors", factors=(1.5,) * 8))
    facts = dict(card.config_facts(other))
    assert facts["window"] == "8" and facts["rope_scaling"].endswith("…") and len(facts["rope_scaling"]) == 80


def test_a_hostile_file_is_only_text() -> None:
    made = Card(HOSTILE, HOSTILE, [("type", HOSTILE)], PARTS, [("weights", 1, HOSTILE)], notes=[HOSTILE])
    assert not tags(parsed(card.as_html(made))) & {"script", "img"}
    text = card.as_text(made)
    assert "\x1b" not in text and "\x00" not in text and r"\x1b[31m" in text


def test_a_path_of_a_model_is_only_text(tiny_file: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "<script>\x1b[31m.bin"
    path.write_bytes(tiny_file.read_bytes())
    with numballama.compile(path, tokenizer=tiny_tokenizer, device="cpu") as model:
        shown = model._repr_html_(), str(model), numballama.inspect(path)._repr_html_(), str(numballama.inspect(path))
    assert not any("\x1b" in text for text in shown)
    assert "script" not in tags(parsed(shown[0])) | tags(parsed(shown[2]))


def test_the_card_of_a_model_and_of_a_closed_one(tiny_file: Path, tiny_tokenizer: Path) -> None:
    model: Model = numballama.compile(
        tiny_file, tokenizer=tiny_tokenizer, device="cpu", threads=1, max_sequences=2, kv_dtype="q8_0"
    )
    made = card.of_model(model)
    assert made.title == tiny_file.name and made.about.startswith("llama2.c v0, ")
    facts = dict(made.facts)
    assert facts["device"] == "cpu" and facts["thread"] == "1" and facts["tokenizer"] == "300 tokens"
    memory = {what: nbytes for what, nbytes, _ in made.memory}
    assert memory["weights"] == sum(weight.nbytes for weight in model.weights.values())
    assert memory["weights"] == sum(part.nbytes for part in made.parts)
    assert memory["KV cache"] == model.kv.nbytes
    assert memory["arenas"] == model.arena_bytes > model.plan.arena_bytes, "that of prompts too"
    assert "q8_0; 2 sequences of up to " in str(model) and "2 sequences" in model._repr_html_()
    model.close()
    assert "llama2.c v0; closed" in str(model) and "n_layers" in model._repr_html_()
    assert "memory" not in str(model)
    with pytest.raises(numballama.Error, match="closed"):
        _ = model.arena_bytes
