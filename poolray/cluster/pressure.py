"""Nothing new is taken in while too much waits for a peer that does not take it.

    drivers, workers ──✗ (their sends wait) ── NodeDaemon ──▶ Switch: crowded ──▶ peer, stopped

What: stops reading from drivers and workers of this node while more bytes wait for a peer than may,
and goes on when half of them have left; gives a peer up that takes nothing for long.
Who calls: the node's daemon, on its one thread.
May touch: the reactor's list of what it polls.
Invariants: peers and the head are always read, so that two nodes that wait do not wait for each
other, and this node counts as alive; nothing is dropped; a pause ends with the peer's death, with
its first signs of life, or with this node's own end.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable
from typing import Protocol, final

_logger = logging.getLogger(__name__)

#: A peer that has acknowledged nothing for so long, while the head takes it for living, is not
#: reached by us: either of us is cut off.
_GIVE_UP_S = 60.0


class Ways(Protocol):
    """What is needed of the switch."""

    #: Peer for which too much waits -> when it acknowledged something last.
    crowded: dict[bytes, float]

    def give_up(self, peer_id: bytes) -> None:
        """Nothing will ever reach this peer again."""


class Poll(Protocol):
    """What is needed of the reactor."""

    def pause(self, channels: Iterable[socket.socket]) -> None:
        """Do not read these for now."""

    def resume(self) -> None:
        """Read them again."""


@final
class Pressure:
    """Keeps what waits for peers within bounds.

    Parameters
    ----------
    sources : callable
        The channels of drivers and workers.
    """

    def __init__(
        self, ways: Ways, poll: Poll, sources: Callable[[], Iterable[socket.socket]]
    ) -> None:
        self._ways = ways
        self._poll = poll
        self._sources = sources
        self.is_on = False

    def look(self, now: float) -> None:
        """It may be time to pause, to go on, or to give a peer up."""
        crowded = self._ways.crowded
        if crowded:
            if not self.is_on:
                names = ", ".join(peer.hex()[:12] for peer in crowded)
                _logger.warning("node=%s too much waits for it: drivers and workers wait", names)
            self.is_on = True
            self._poll.pause(self._sources())  # (new ones may have come)
        elif self.is_on:
            _logger.info("what waited for peers has left: drivers and workers go on")
            self.is_on = False
            self._poll.resume()
        for peer, since_s in list(crowded.items()):
            if now - since_s > _GIVE_UP_S:
                self._ways.give_up(peer)
