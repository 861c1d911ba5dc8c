"""The small files of a Hugging Face directory: stop ids and chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from numballama.errors import FormatError
from numballama.formats.hf.text_files import read_text_files
from numballama.formats.hf.text_settings import TextSettings
from numballama.loader import open_checkpoint
from tests.helpers.hf_files import edit


def test_stop_ids_and_templates(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    edit(folder, {"eos_token_id": [2, 7, 9]}, "generation_config.json")
    assert open_checkpoint(folder).stop_token_ids == (2, 7, 9)
    edit(folder, {"eos_token_id": None}, "generation_config.json")
    assert open_checkpoint(edit(folder, {"eos_token_id": 5})).stop_token_ids == (5,)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ a }}"}')
    assert open_checkpoint(folder).chat_template == "{{ a }}"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert open_checkpoint(folder).chat_template == "yes"
    (folder / "chat_template.jinja").write_text("{{ ä }}", encoding="utf-8")
    assert open_checkpoint(folder).chat_template == "{{ ä }}"
    (folder / "chat_template.jinja").write_text("{{ b }}", encoding="utf-8-sig")
    assert open_checkpoint(folder).chat_template == "{{ b }}", "a byte order mark would begin every conversation"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="UTF-8"):
        open_checkpoint(folder)


def write(folder: Path, **files: object) -> TextSettings:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return TextSettings(folder)


def test_where_templates_are(tmp_path: Path) -> None:
    """As transformers 5 reads them: files in jinja2 in place of the config, chat_template.json only without these."""
    assert TextSettings(tmp_path).chat_templates == {}
    assert write(tmp_path, chat_template={"chat_template": "json"}).chat_templates == {"default": "json"}
    for nothing in (None, "", []):
        assert write(tmp_path, tokenizer_config={"chat_template": nothing}).chat_templates == {"default": "json"}
    assert write(tmp_path, chat_template={"chat_template": {"a": "A"}}).chat_templates == {"a": "A"}
    named = [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
    assert write(tmp_path, tokenizer_config={"chat_template": named}).chat_templates == {"tool_use": "T", "rag": "R"}
    assert write(tmp_path, tokenizer_config={"chat_template": "one"}).chat_templates == {"default": "one"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R2")
    (tmp_path / "additional_chat_templates" / "notes.txt").write_text("no")
    assert TextSettings(tmp_path).chat_templates == {"rag": "R2"}, "without a default, as transformers"
    (tmp_path / "chat_template.jinja").write_text("D")
    assert TextSettings(tmp_path).chat_templates == {"rag": "R2", "default": "D"}
    assert read_text_files(tmp_path).chat_template == "D"
    (tmp_path / "additional_chat_templates" / "default.jinja").write_text("D2")
    assert read_text_files(tmp_path).chat_template == "D2", "the later one, as in transformers"
    for path in tmp_path.rglob("*.jinja"):
        path.write_text("")
    assert TextSettings(tmp_path).chat_templates == {"default": "one"}, "empty files are none"


@pytest.mark.parametrize(
    "wrong", [7, [7], [{"name": "a"}], [{"template": "a"}], [{"name": 1, "template": "x"}], {"a": 1}]
)
@pytest.mark.parametrize("file", ["tokenizer_config", "chat_template"])
def test_templates_of_the_wrong_shape(tmp_path: Path, file: str, wrong: object) -> None:
    settings = write(tmp_path, **{file: {"chat_template": wrong}})
    with pytest.raises(FormatError, match=rf"{file}\.json.*key chat_template; expected a template, or a list of names"):
        _ = settings.chat_templates


def test_tokens_that_templates_see(tmp_path: Path) -> None:
    config = {
        "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": None, "add_bos_token": True,
        "extra_special_tokens": {"image_token": "<img>"}, "model_max_length": 5, "boi_token": "<boi>",
        "model_specific_special_tokens": {"audio_token": "<sound>"},
    }  # fmt: skip
    settings = write(
        tmp_path, tokenizer_config=config, special_tokens_map={"pad_token": "[PAD]", "bos_token": "<other>"}
    )
    expected = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "image_token": "<img>",
        "audio_token": "<sound>",
        "boi_token": "<boi>",
        "pad_token": "[PAD]",
    }
    assert settings.template_tokens == expected | {"bos_token": "<other>"}
    settings = write(tmp_path, tokenizer_config=config | {"added_tokens_decoder": {}})
    assert settings.template_tokens == expected
    assert write(tmp_path, tokenizer_config={"extra_special_tokens": ["<x>"]}).template_tokens == {
        "pad_token": "[PAD]",
        "bos_token": "<other>",
    }
