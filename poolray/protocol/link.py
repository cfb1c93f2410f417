"""The frames of a link between two processes that live on different machines.

What: what `node/peer_link.py` puts around each message to make a lossy way reliable.
Who calls: the peer link makes and takes them, shells carry them.
May touch: nothing.
Invariants: a frame is of use only to the session that it names.
"""

from __future__ import annotations

import msgspec


class LinkFrame(msgspec.Struct, frozen=True, array_like=True, tag=401, kw_only=True):
    """One frame: a message, an acknowledgement, or both."""

    session: int  #: the sender's life; a later one has a larger number
    peer_session: int  #: the receiver's life as the sender knows it; 0: not known yet
    ack: int  #: all messages of `peer_session` up to this one have arrived
    sequence: int = 0  #: number of the message, from 1; 0: there is none
    payload: bytes = b""
