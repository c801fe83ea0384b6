"""`busway`, and `python -m trainer`: Ctrl-C while modules are read leaves no traceback either."""

from __future__ import annotations

import sys

from trainer.errors import EXIT_STOPPED_AT_ONCE


def main() -> int:
    """Run the command that the arguments name; its exit code."""
    try:
        from trainer.cli import main as command
    except KeyboardInterrupt:
        return EXIT_STOPPED_AT_ONCE
    return command()


if __name__ == "__main__":
    sys.exit(main())
