"""What workers print, as the driver shows it.

What: begins each line with `(name pid=…)`, adds the address of other nodes, and shows a line that
many workers print once, with how many they were.
Who calls: the driver's runtime.
May touch: standard streams, the clock.
Invariants: a line is shown at once or, if another process has just printed the same, counted, and
told of within `_WINDOW_S`; nothing is kept for longer, or beyond `_KEPT_MAX` lines.
"""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Any, final

from poolray.protocol.cluster import Output

#: Lines that differ in numbers only count as the same.
_NUMBERS = re.compile(r"\d+")
_WINDOW_S = 5.0
_KEPT_MAX = 10_000
_CYAN, _GREEN, _PLAIN = "\x1b[36m", "\x1b[32m", "\x1b[0m"


@final
class _Line:
    """A line that was shown, and what has come of the same since."""

    __slots__ = ("count", "last", "pid", "shown_s", "stream")

    def __init__(self, pid: tuple[str, int], stream: int, shown_s: float) -> None:
        self.pid = pid
        self.stream = stream
        self.shown_s = shown_s
        self.count = 0
        self.last = ""


@final
class OutputFilter:
    """Shows lines of workers.

    Parameters
    ----------
    own_address : str
        Lines of nodes with another one name it.
    """

    def __init__(self, own_address: str) -> None:
        self._own_address = own_address
        #: Switched off as in the reference, by a variable; who debugs wants to see every line.
        self._counts = os.environ.get("POOLRAY_DEDUP_LOGS", "1") != "0"
        self._lines: dict[str, _Line] = {}

    def show(self, output: Output) -> None:
        """Show a text, or count its lines."""
        where = "" if output.address == self._own_address else f", ip={output.address}"
        name = f"{output.label} " if output.label else ""
        head = f"{_CYAN}({name}pid={output.pid}{where}){_PLAIN} "
        shown: list[str] = []
        now = time.monotonic()
        for line in output.text.splitlines(keepends=True):
            if not self._counts or self._is_new(line, output, head, now):
                shown.append(head + line)
        if shown:
            _write(output.stream, "".join(shown))

    def _is_new(self, line: str, output: Output, head: str, now: float) -> bool:
        key = _NUMBERS.sub("", line)
        pid = (output.address, output.pid)
        known = self._lines.get(key)
        if known is None or known.pid == pid:
            # What one process repeats is its way to say it: only echoes of others are counted.
            if known is None:
                self._lines[key] = _Line(pid, output.stream, now)
                if len(self._lines) > _KEPT_MAX:
                    self._end(next(iter(self._lines)))
            return True
        known.count += 1
        known.last = head + line.rstrip("\n")
        return False

    def _end(self, key: str) -> None:
        line = self._lines.pop(key)
        if line.count == 1:
            _write(line.stream, f"{line.last}\n")
        elif line.count:
            told = f"{_GREEN} [repeated {line.count}x across cluster]{_PLAIN}"
            _write(line.stream, f"{line.last}{told}\n")

    def flush_due(self) -> None:
        """Tell of lines whose time is up."""
        if not self._lines:
            return
        before = time.monotonic() - _WINDOW_S
        for key, line in list(self._lines.items()):
            if line.shown_s > before:
                break  # those behind it are younger
            self._end(key)

    def flush_all(self) -> None:
        """Tell of all of them."""
        for key in list(self._lines):
            self._end(key)

    def next_timeout(self) -> float | None:
        """Seconds until `flush_due` has something to do."""
        for line in self._lines.values():
            return line.shown_s + _WINDOW_S - time.monotonic()
        return None

    def say(self, text: str) -> None:
        """Show a text of our own."""
        _write(2, text)


def _write(stream: int, text: str) -> None:
    target: Any = sys.stdout if stream == 1 else sys.stderr
    try:
        target.write(text)
        target.flush()
    except Exception:
        pass  # closed, absent, full: whoever waits for something else must not fail for it
