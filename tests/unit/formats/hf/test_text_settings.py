"""The small files of a Hugging Face directory: stop ids and chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from numballama.errors import FormatError
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
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="UTF-8"):
        open_checkpoint(folder)
