"""How a client reaches its node.

What: the interface alone; `local/`, `cluster/` and workers have an implementation each.
Who calls: `client.py` and what makes clients.
May touch: nothing.
Invariants: messages keep their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from poolray.ids import ObjectId
from poolray.protocol.actors import CallActor
from poolray.protocol.client import ObjectValues, RangeGranted, SubmitTasks


class WatchStep(NamedTuple):
    """A `wait` for a list that is waited for again and again."""

    number: int  #: of the list; 0: it is not waited for again
    left: list[int]  #: numbers of refs in it that have been taken
    is_front: bool  #: the next one is likely to be its first


#: The watch of a `wait` that is for no such list.
NO_WATCH = WatchStep(0, [], True)


class Link(Protocol):
    """How a client reaches its node."""

    def enter(self) -> None:
        """Hold Ctrl-C back: what is begun now is finished."""

    def leave(self) -> None:
        """The end of `enter`: an interrupt that came meanwhile is raised now."""

    def send(self, message: Any) -> None:
        """Tell the node something; it keeps the order."""

    def submit(self, message: SubmitTasks | CallActor) -> None:
        """The same for tasks and calls, which may be told together with others."""

    def peek(self, object_ids: list[ObjectId]) -> list[bytes] | None:
        """Values that are ready and small; None: some are not, or only `get` can tell."""

    def get(self, object_ids: list[ObjectId], timeout_s: float | None) -> ObjectValues | None:
        """Values once all are ready or one has failed; None when the time is up."""

    def wait(
        self,
        object_ids: list[ObjectId],
        count: int,
        timeout_s: float | None,
        fetch: bool = False,
        watch: WatchStep = NO_WATCH,
    ) -> list[int]:
        """Indexes of the ready ones, once there are `count` or the time is up; with `fetch`, of
        those that have been brought to this node. With `watch`, numbers of objects that it has
        been told of: the first ones.
        """

    def allocate(self, object_id: ObjectId, size_bytes: int) -> RangeGranted:
        """Where to write an object; waits while the node makes room.

        Raises
        ------
        KeyboardInterrupt
            Ctrl-C while it waited, in the main thread: nothing has been granted.
        """

    def when_ready(
        self, object_id: ObjectId, call: Callable[[ObjectValues], None]
    ) -> Callable[[], None]:
        """Call back once, from some thread, with the object's value; what it gives takes that
        back, as far as it has not happened.
        """

    def when_there(self, object_id: ObjectId, call: Callable[[], None]) -> Callable[[], None]:
        """The same for an object of which only the arrival matters."""

    def ask(self, make: Callable[[int], Any]) -> Any:
        """Send the request that `make` makes of its number; gives the answer, which comes soon."""
