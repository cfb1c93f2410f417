"""What is to go over one link of a switch, held back while much is under way there.

What: a queue in front of a reliable link. The link gives a peer up for which too much waits; here
it may, for as long as the peer may come back, and small messages travel together once it has.
Who calls: the line of a driver outside of the cluster, and its session in the daemon.
May touch: a switch.
Invariants: messages keep their order.
"""

from __future__ import annotations

from collections import deque
from typing import final

from poolray.cluster.switch import Switch

#: Messages that the link is given at a time: as many as it has under way at the most.
_UNDER_WAY_MAX = 64


@final
class Outlet:
    """A queue of messages for one peer."""

    def __init__(self, switch: Switch, peer_id: bytes) -> None:
        self._switch = switch
        self._peer_id = peer_id
        self._bodies: deque[bytes] = deque()
        #: Bytes that have not been given to the link.
        self.waiting_bytes = 0

    def put(self, body: bytes) -> None:
        """Send a message when its turn comes; `flush` looks whether it has."""
        self._bodies.append(body)
        self.waiting_bytes += len(body)

    def flush(self) -> bool:
        """Give the link what it has room for; True when that was something: the switch is due."""
        bodies, moved = self._bodies, False
        room = _UNDER_WAY_MAX - self._switch.waiting(self._peer_id) if bodies else 0
        while bodies and room > 0:
            body = bodies.popleft()
            self.waiting_bytes -= len(body)
            self._switch.send(self._peer_id, body)
            room -= 1
            moved = True
        return moved

    def end(self, body: bytes) -> None:
        """Send a last message at once, in place of what has waited: nobody will look after it."""
        self._bodies.clear()
        self.waiting_bytes = 0
        self._switch.send(self._peer_id, body)

    @property
    def is_empty(self) -> bool:
        """Whether all was given to the link, and has arrived."""
        return not self._bodies and not self._switch.waiting(self._peer_id)
