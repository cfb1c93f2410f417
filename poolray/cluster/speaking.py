"""What commands say: to standard output what was asked for, to standard error why not.

What: two ways to write a text.
Who calls: the commands of the command line.
May touch: standard streams.
Invariants: a text that fails gives the exit code of a failure.
"""

from __future__ import annotations

import sys

__all__ = ["fail", "say"]


def say(text: str) -> None:
    """Print a text."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def fail(text: str) -> int:
    """Say what is wrong; gives the exit code."""
    sys.stderr.write(f"poolray: {text}\n")
    return 1
