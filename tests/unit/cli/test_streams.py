"""stdin, stdout and stderr that are closed, full or no text: one line on stderr, the right exit code, no traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from numballama.cli import streams
from numballama.errors import Error
from tests.helpers.bpe import chat_model
from tests.helpers.command_line import call

LONG = 300


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat"))


def shell(command: str, **names: object) -> tuple[int, bytes, str]:
    """Exit code, stdout and stderr of a shell command; "NUMBALLAMA" in it is the program."""
    script = command.replace("NUMBALLAMA", f"{sys.executable} -m numballama")
    for name, value in names.items():
        script = script.replace(name, str(value))
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, timeout=LONG)
    return done.returncode, done.stdout, done.stderr.decode()


FEW = "--max-tokens 3 --temperature 0"
COMMANDS = {
    "story": f"NUMBALLAMA story {FEW}",
    "generate": f"NUMBALLAMA generate MODEL hello {FEW}",
    "chat": f"echo hello | NUMBALLAMA chat MODEL {FEW}",
    "inspect": "NUMBALLAMA inspect MODEL",
    "export": "NUMBALLAMA export MODEL FOLDER/out.gguf --to gguf",
    "bench": "NUMBALLAMA bench MODEL --prompt-tokens 4 --max-tokens 2 --repeats 1",
    "perplexity": "printf 'the story' > FOLDER/text; NUMBALLAMA perplexity MODEL FOLDER/text --context 3",
    "help": "NUMBALLAMA --help",
    "help of a command": "NUMBALLAMA chat --help",
    "version": "NUMBALLAMA --version",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_and_a_closed_stdout(name: str, path: Path, tmp_path: Path) -> None:
    full = "numballama: stdout cannot be written: No space left on device\n"
    for how, unbuffered, expected in (
        (">/dev/full", "", full),
        (">/dev/full", "1", full),
        (">&-", "", "numballama: stdout is closed, and the text of this command goes there: redirect it"),
    ):
        if unbuffered and name not in ("story", "version"):
            continue
        command = f"export PYTHONUNBUFFERED={unbuffered}; {COMMANDS[name]} {how}"
        code, out, err = shell(command, MODEL=path, FOLDER=tmp_path)
        assert (code, out) == (1, b"") and err.startswith(expected) and err.count("\n") == 1, (how, err)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_that_is_gone(name: str, path: Path, tmp_path: Path) -> None:
    code, out, err = shell(f"({COMMANDS[name]}; echo $? >&2) | (exec <&-; sleep 1)", MODEL=path, FOLDER=tmp_path)
    assert out == b"" and [line for line in err.splitlines() if line.isdigit()] == ["141"], (code, err)
    assert "Traceback" not in err and "Exception" not in err


@pytest.mark.slow
def test_closed_stdin_and_stderr(path: Path) -> None:
    code, out, err = shell("NUMBALLAMA generate MODEL hello --max-tokens 3 <&-", MODEL=path)
    assert code == 0 and out and not err, "nothing is read"
    for command in ("NUMBALLAMA chat MODEL <&-", "NUMBALLAMA generate MODEL - <&-"):
        code, out, err = shell(command, MODEL=path)
        assert (code, out, err.count("\n")) == (1, b"", 1) and "stdin is closed" in err
    for command, expected in (("NUMBALLAMA story --max-tokens 3 2>&-", 0), ("NUMBALLAMA story --top-p 7 2>&-", 1)):
        code, out, err = shell(command)
        assert (code, err) == (expected, "") and (out == b"") == bool(code), "no error is printed to stdout"
    code, _, err = shell("NUMBALLAMA story --top-p 7 2>/dev/full")
    assert (code, err) == (1, "")


@pytest.mark.slow
def test_bytes_that_are_no_text(path: Path) -> None:
    for command, expected in (
        (r"printf 'a\xffb' | NUMBALLAMA generate MODEL -", "stdin is not UTF-8 text: 0xff at byte 1"),
        (r"printf 'a\n\xc3\n' | NUMBALLAMA chat MODEL " + FEW, "stdin is not UTF-8 text: 0xc3 at byte 0 of line 2"),
        (r"NUMBALLAMA generate MODEL $'a\xff'", "the prompt is not valid text"),
        (r"NUMBALLAMA generate MODEL a --stop $'\xff'", "--stop is not valid text"),
        (r"echo a | NUMBALLAMA chat MODEL --system $'\xff'", "--system is not valid text"),
        (r"echo a | NUMBALLAMA chat MODEL --template-arg $'a=\xff'", "--template-arg is not valid text"),
        (r"NUMBALLAMA inspect $'\xff'", "no such file"),
    ):
        code, out, err = shell(command, MODEL=path)
        assert code == 1 and expected in err and err.count("\n") == 1 and err.startswith("numballama: "), (command, err)
        assert (out != b"") == ("line 2" in expected), "messages before the damage are answered"
    latin = r"printf 'caf\xe9\n' | PYTHONUTF8=0 PYTHONIOENCODING=latin-1 NUMBALLAMA chat MODEL " + FEW
    assert shell(latin, MODEL=path)[0] == 0, "the encoding that was asked for"


# In this process


def text_stream(data: bytes, encoding: str = "utf-8") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding=encoding)


def test_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", text_stream("\ufeffa\r\nb\rc\n ü\n".encode()))
    assert streams.read_stdin() == "a\nb\nc\n ü\n"
    monkeypatch.setattr(sys, "stdin", text_stream("\ufeffa\r\n\n ü \nlast".encode()))
    assert list(streams.read_lines()) == ["a", "", " ü ", "last"]
    for read in (streams.read_stdin, lambda: list(streams.read_lines())):
        monkeypatch.setattr(sys, "stdin", text_stream(b"ok\n\xe9\n"))
        with pytest.raises(Error, match=r"stdin is not UTF-8 text: 0xe9 at byte \d"):
            read()
        monkeypatch.setattr(sys, "stdin", None)
        with pytest.raises(Error, match="stdin is closed"):
            read()
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb"))
    assert list(streams.read_lines()) == ["a", "b"] and not streams.is_terminal()

    class Broken(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(5, "Input/output error")

        readline = read

    for read in (streams.read_stdin, lambda: list(streams.read_lines())):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Broken()))
        with pytest.raises(Error, match=r"stdin cannot be read: Input/output error"):
            read()


def test_descriptors_of_closed_streams_are_taken() -> None:
    """Else the next file that is opened would be stdout for C code."""
    script = (
        "import os; os.close(0)\nfrom numballama.cli import streams; streams.prepare()\n"
        "assert os.open('/dev/null', os.O_RDONLY) > 2\nassert os.readlink('/proc/self/fd/0') == '/dev/null'"
    )
    if sys.platform != "linux":
        pytest.skip("looks into /proc")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_errors_of_the_system_name_their_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("numballama.doctor.report.Report.make", fails)
    done = call(capsys, "doctor")
    assert (done.code, done.out, done.err) == (1, "", "numballama: /some/file: Permission denied\n")
    streams.say("a line")
    assert capsys.readouterr().err == "a line\n"
