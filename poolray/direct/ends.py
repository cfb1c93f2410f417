"""One end of a connection of our own: from the first word to the last frame.

What: the handshake, step by step as bytes come, then frames both ways.
Who calls: both ends of direct calls.
May touch: its socket.
Invariants: nothing is read as a frame before the other end has proved who it is; reading never
waits.
"""

from __future__ import annotations

import os
import socket
from typing import final

from poolray.direct.addresses import Offer, handshake_for, peer_of
from poolray.direct.frames import Frames
from poolray.direct.seal import (
    ANSWER_BYTES,
    HELLO_BYTES,
    ID_BYTES,
    MAGIC,
    PROOF_BYTES,
    HandshakeError,
)


@final
class End:
    """One end.

    Parameters
    ----------
    channel : socket
        Connected.
    offer : Offer
        What both ends know of the connection.
    listens : bool
        This end has made the door.

    Raises
    ------
    HandshakeError
        Another user's process is at the other end.
    OSError
        Nobody is.
    """

    def __init__(self, channel: socket.socket, offer: Offer, *, listens: bool) -> None:
        peer = peer_of(channel)
        if peer is not None and peer[1] not in (os.getuid(), 0):
            raise HandshakeError("another user's process is at the other end")
        self.channel = channel
        self.connection_id = offer[3]
        #: The process at the other end, as far as it can be signalled; else 0.
        self.pid = 0 if peer is None else peer[0]
        #: It goes over the network.
        self.is_far = peer is None
        self.is_open = False
        self._frames = Frames(channel)
        self._handshake = handshake_for(offer)
        self._listens = listens
        self._greeted = False
        if not listens:
            channel.sendall(self._handshake.hello())

    @property
    def is_sealed(self) -> bool:
        """Whether what goes through is closed to others."""
        return self._frames.seals is not None

    def read(self, all_of_it: bool = False) -> list[bytes]:
        """The frames that have come; none while the handshake goes on.

        Parameters
        ----------
        all_of_it : bool
            The system gives what was sent up to urgent data and, asked again, the rest: ask again.

        Raises
        ------
        ConnectionLost, HandshakeError, OSError
            The other end is gone, or is not who it should be.
        """
        frames = self._frames
        while frames.receive() and all_of_it:
            pass
        if not self.is_open and not (self._welcome() if self._listens else self._prove()):
            return []
        return frames.take()

    def _welcome(self) -> bool:
        """The part of who listens; False while there is more to come."""
        frames, handshake = self._frames, self._handshake
        if not self._greeted:
            hello = frames.take_exactly(HELLO_BYTES)
            if hello is None:
                return False
            start = len(MAGIC)
            if hello[:start] != MAGIC or hello[start : start + ID_BYTES] != self.connection_id:
                raise HandshakeError("it names another connection")
            self.channel.sendall(handshake.answer(hello))
            self._greeted = True
        proof = frames.take_exactly(PROOF_BYTES)
        if proof is None:
            return False
        handshake.check(proof)
        frames.seals, frames.opens = handshake.seal(), handshake.seal_back()
        self.is_open = True
        return True

    def _prove(self) -> bool:
        """The part of who connects."""
        said = self._frames.take_exactly(ANSWER_BYTES)
        if said is None:
            return False
        self.channel.sendall(self._handshake.prove(said))
        self._frames.seals = self._handshake.seal_back()
        self._frames.opens = self._handshake.seal()
        self.is_open = True
        return True

    def send(self, body: bytes, flags: int = 0) -> None:
        """Send a frame, see `Frames.send`."""
        self._frames.send(body, flags)

    @property
    def has_unsent(self) -> bool:
        """Whether something waits for room."""
        return self._frames.has_unsent

    def push(self) -> None:
        """Send what waits for room, see `Frames.push`."""
        self._frames.push()
