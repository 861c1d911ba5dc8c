"""Record a real terminal session as docs/session.svg, the README's picture.

python docs/record_session.py        (the command numballama must be on the PATH)
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

ERASED = re.compile(r"[^\n]*\r?\x1b\[2K")
"""A line up to where it is erased: bars of progress."""
COMMANDS = ("numballama story --seed 7", "numballama bench --threads 2")


def on_a_terminal(command: str, folder: Path) -> str:
    """Run a command in a terminal 100 columns wide; returns what it wrote to both streams."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        command, shell=True, cwd=folder, stdout=terminal, stderr=terminal, env=os.environ | {"COLUMNS": "100"}
    )
    os.close(terminal)
    output = b""
    try:
        while more := os.read(controller, 4096):
            output += more
    except OSError:  # on Linux this is the end of a terminal's output
        pass
    process.wait()
    text = output.decode().replace("\r\n", "\n")
    return ERASED.sub("", text).rstrip("\n")


def main() -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            on_a_terminal(command, Path(folder))  # the first run compiles; the picture shows the second
            console.print(Text(f"$ {command}", style="bold"))
            console.print(Text.from_ansi(on_a_terminal(command, Path(folder))))
            console.print()
    picture = console.export_svg(title="numballama")
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # no fonts from the network
    Path(__file__).with_name("session.svg").write_text(picture)


if __name__ == "__main__":
    main()
