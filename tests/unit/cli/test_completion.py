"""`numballama completion`: the script, and what bash makes of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from numballama.cli.completion import SHELLS
from tests.helpers.command_line import call

COMPLETE = """
source script.bash
complete_words() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _shtab_numballama numballama "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
    echo "${COMPREPLY[*]}"
}
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    (tmp_path / "script.bash").write_text(call(capsys, "completion", "bash").out)
    (tmp_path / "model.gguf").touch()
    words = {
        "st": "story",
        "story --te": "--temperature",
        "story --device c": "cpu cuda",
        "export a.gguf b.gguf --to g": "gguf",
        "generate mo": "model.gguf",
        "serve --tls-cert mo": "model.gguf",
        "completion z": "zsh",
        "export a.gguf b.gguf --dtype q4_": "q4_k q4_1 q4_0",
        "generate a.gguf --dtype q": "q8_0 q4_0",
    }
    code = COMPLETE + "".join(f"complete_words numballama {line}\n" for line in words)
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == list(words.values()), done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    pytest.importorskip("shtab")
    done = call(capsys, "completion", shell)
    assert done.code == 0 and all(word in done.out for word in ("doctor", "max-tokens", "q8_0"))


def test_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    done = call(capsys, "completion", "bash")
    assert done.code == 1 and done.err == 'numballama: completion needs shtab: pip install "numballama[completion]"\n'
