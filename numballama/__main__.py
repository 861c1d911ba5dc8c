"""`numballama` and `python -m numballama` run the command line."""

from __future__ import annotations

import sys

from .host.interrupts import ends_the_process


def main() -> int:
    """Run the command line; returns the exit code. Ctrl-C ends it while it is imported, too."""
    with ends_the_process():
        from .cli.main import main as run
    return run()


if __name__ == "__main__":
    sys.exit(main())
