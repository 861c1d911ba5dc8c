"""`numballama serve`: its options. `server/test_run.py` starts it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from numballama.cli import serve
from numballama.cli.main import parser
from numballama.errors import Error
from numballama.server.settings import Settings
from tests.helpers.command_line import call


def settings_of(*words: str) -> Settings:
    return serve.settings_of(parser().parse_args(["serve", *words]))


def test_defaults() -> None:
    assert settings_of() == Settings()


def test_options(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    found = settings_of(
        "--model-name", "m", "--queue", "3", "--queue-tokens", "9", "--request-timeout", "1", "--stall-timeout", "2",
        "--drain-timeout", "3", "--log-prompts", "--allowed-host", "Example.org", "--chat-template", str(template),
        "--template-arg", "enable_thinking=false",
    )  # fmt: skip
    assert found == Settings(
        model_name="m", queue_sequences=3, queue_tokens=9, request_timeout_s=1, stall_s=2, drain_s=3, log_prompts=True,
        allowed_hosts=("example.org",), chat_template="{{ messages }}", template_kwargs={"enable_thinking": False},
    )  # fmt: skip


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serve.KEY_VARIABLE, "c, d")
    file = tmp_path / "keys"
    file.write_text("e\n\nf\n", encoding="utf-8")
    found = settings_of("--api-key", "a", "--api-key", "b", "--api-key-file", str(file)).api_keys
    assert found == ("a", "b", "c", "d", "e", "f")
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(Error, match="no key"):
        settings_of("--api-key-file", str(file))
    with pytest.raises(Error, match="cannot be read"):
        settings_of("--api-key-file", str(tmp_path / "absent"))
    with pytest.raises(Error, match="--api-key must not be empty"):
        settings_of("--api-key", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "--port must be between"),
        (["--api-server-count", "0"], "--api-server-count must be between 1 and 64"),
        (["--ray", "--api-server-count", "2"], "with --ray use --replicas"),
        (["--queue", "-1"], "--queue must be at least 0"),
        (["--drain-timeout", "nan"], "--drain-timeout must be at least 0"),
        (["--request-timeout", "inf"], "--request-timeout must be at least 0 and finite"),
        (["--replicas", "2"], "--replicas and --max-replicas need --ray"),
        (["--max-replicas", "2"], "--replicas and --max-replicas need --ray"),
        (["--tls-cert", "x"], "--tls-cert and --tls-key go together"),
        (["--tls-cert", "x", "--tls-key", "y"], "x: there is no such file"),
    ],
)
def test_wrong_options(words: list[str], message: str) -> None:
    with pytest.raises(Error, match=message):
        settings_of(*words)


def test_without_the_extra(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "NEEDED", ("no_such_library",))
    called = call(capsys, "serve")
    assert called.code == 1 and 'pip install "numballama[serve]"' in called.err and not called.out


def test_ray_is_missing(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "numballama.server.ray_app", raising=False)
    called = call(capsys, "serve", "--ray")
    assert called.code == 1 and 'pip install "numballama[ray]"' in called.err and not called.out
