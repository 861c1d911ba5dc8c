"""Hub ids: what is one, what is downloaded, and what the errors advise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import numballama
from numballama import hub
from numballama.errors import Error, FormatError
from numballama.loader import open_checkpoint


def test_hub_ids() -> None:
    for name in ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-0.5B", "a/b"):
        assert hub.is_id(name)
    for name in ("model", "a/b/c", "../b", "./b", "/a/b", "~/b", "a/..", "models/x.bin", "a/b.gguf", "a b/c", "", "a/"):
        assert not hub.is_id(name)


def test_a_hub_id_is_downloaded_once_it_is_no_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, copy: Callable[[str], Path]
) -> None:
    library = pytest.importorskip("huggingface_hub")
    folder, asked = copy("llama"), []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(library, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("owner/name").path == folder
    assert [name for name, _ in asked] == ["owner/name"]
    assert "config.json" in asked[0][1] and not any("pth" in pattern or "bin" in pattern for pattern in asked[0][1])
    shutil.copytree(folder, tmp_path / "owner" / "name")
    assert open_checkpoint("owner/name").path == Path("owner/name")
    assert len(asked) == 1
    with pytest.raises(FormatError, match="without a tokenizer"):
        numballama.load_tokenizer("other/name")
    assert asked[1][0] == "other/name" and not any("safetensors" in pattern for pattern in asked.pop()[1])
    with pytest.raises(Error, match="no such file"):
        open_checkpoint(tmp_path / "owner" / "other")
    assert len(asked) == 1


def test_offline_says_what_to_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Error) as caught:
        open_checkpoint("owner/name")
    text = str(caught.value)
    assert text.startswith("owner/name: no such file or directory, and the hub is switched off (HF_HUB_OFFLINE)")
    assert "config.json" in text and "https://huggingface.co/owner/name" in text and str(tmp_path) in text


def test_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Error, match=r"pip install 'numballama\[hub\]'; or download config\.json"):
        open_checkpoint("owner/name")
