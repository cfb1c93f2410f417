"""In which order the calls of an actor go to its worker.

What: keeps the calls that were not sent. Where order is promised, a call that waits for an argument
holds back later calls of the same caller, and of nobody else.
Who calls: the node machine.
May touch: nothing.
Invariants: a call is in `ready`, in its caller's line, or (where no order is promised) waits
outside of both; a line begins with a call that waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar, final

from poolray.ids import ClientId

C = TypeVar("C")


@final
class CallOrder(Generic[C]):
    """The calls of one actor that were not sent.

    Parameters
    ----------
    ordered : bool
        Whether calls of one caller go in the order in which they were made.
    """

    __slots__ = ("_lines", "_waiting", "ordered", "ready")

    def __init__(self, ordered: bool) -> None:
        self.ordered = ordered
        #: Calls that may be sent, the next one first.
        self.ready: deque[C] = deque()
        #: caller -> its calls from the first on that waits for an argument.
        self._lines: dict[ClientId, deque[C]] = {}
        #: Calls that wait for an argument.
        self._waiting: dict[C, None] = {}

    def add(self, caller: ClientId, call: C, waits: bool) -> None:
        """A new call; `waits` for an argument or not."""
        if waits:
            self._waiting[call] = None
        if not self.ordered:
            if not waits:
                self.ready.append(call)
            return
        line = self._lines.get(caller)
        if line is not None:
            line.append(call)
        elif waits:
            self._lines[caller] = deque((call,))
        else:
            self.ready.append(call)

    def on_ready(self, caller: ClientId, call: C) -> None:
        """The arguments of a call are there."""
        self._waiting.pop(call, None)
        if self.ordered:
            self._advance(caller)
        else:
            self.ready.append(call)

    def _advance(self, caller: ClientId) -> None:
        line = self._lines.get(caller)
        if line is None:
            return
        while line and line[0] not in self._waiting:
            self.ready.append(line.popleft())
        if not line:
            del self._lines[caller]

    def put_back(self, calls: Iterable[C]) -> None:
        """Calls that were sent come back before all others, in this order."""
        self.ready.extendleft(reversed(list(calls)))

    def remove(self, caller: ClientId, call: C) -> None:
        """A call is not wanted any more."""
        self._waiting.pop(call, None)
        line = self._lines.get(caller)
        if line is not None and call in line:
            line.remove(call)
            self._advance(caller)
        elif call in self.ready:
            self.ready.remove(call)

    def take_all(self) -> list[C]:
        """Every call there is, each caller's in its order; none is left."""
        calls = list(self.ready)
        self.ready.clear()
        for line in self._lines.values():
            calls.extend(line)
        self._lines.clear()
        if not self.ordered:
            calls.extend(self._waiting)
        self._waiting.clear()
        return calls

    def check_invariants(self) -> None:
        """Raise AssertionError when a call is lost between the tables."""
        for line in self._lines.values():
            assert line, "an empty line is kept"
            assert line[0] in self._waiting, "a line is held back by nobody"
        assert not any(call in self._waiting for call in self.ready)
        if self.ordered:
            lined = {call for line in self._lines.values() for call in line}
            assert all(call in lined for call in self._waiting)
