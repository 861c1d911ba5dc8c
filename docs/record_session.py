"""Record a real terminal session as docs/session.svg, the picture of the README.

python docs/record_session.py        (where the command numballama is on the PATH)
"""

import io
import os
import pty
import re
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = ("numballama story --seed 7", "numballama bench --threads 2")


def on_a_terminal(command: str, folder: Path) -> str:
    """What a person would have seen: both streams of a command whose terminal is 100 columns wide."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, shell=True, cwd=folder, stdout=theirs, stderr=theirs, env=os.environ | {"COLUMNS": "100"}
    )
    os.close(theirs)
    seen = b""
    try:
        while more := os.read(ours, 4096):
            seen += more
    except OSError:  # Linux reports the end of a terminal so
        pass
    process.wait()
    return seen.decode().replace("\r\n", "\n").rstrip("\n")


def main() -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            on_a_terminal(command, Path(folder))  # the first run compiles; the picture shows the second
            console.print(Text(f"$ {command}", style="bold"))
            console.print(Text.from_ansi(on_a_terminal(command, Path(folder))))
            console.print()
    picture = console.export_svg(title="numballama")
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # a picture fetches nothing
    Path(__file__).with_name("session.svg").write_text(picture)


if __name__ == "__main__":
    main()
