"""`numballama` and `python -m numballama` run the command line."""

from __future__ import annotations

import sys

from .host.interrupts import ends_the_process, let_the_system_end_the_process


def main() -> int:
    """Run the command line; returns the exit code. Ctrl-C ends it while it is imported, and when Python ends, too."""
    try:
        with ends_the_process():
            from .cli.main import main as run
        return run()
    except MemoryError:  # while modules are imported
        print("numballama: memory is short: Python and NumPy do not fit in what this process may use", file=sys.stderr)
        return 1
    finally:
        let_the_system_end_the_process()


if __name__ == "__main__":
    sys.exit(main())
