"""One end of a reliable link over a way that loses, delays, repeats and reorders.

    send ──▶ backlog ──▶ window ──frames──▶ ~~~ the way ~~~ ──frames──▶ early ──in order──▶ receive
                            ▲                                             │
                            └───────────────── acks ──────────────────────┘

What: numbers messages, repeats what is not acknowledged, puts what arrives in order, and tells a
peer that was started again from the one before.
Who calls: the shells of nodes and head, and the simulator, one object per peer.
May touch: nothing; sessions and time come in as arguments.
Invariants: while both ends live each message is handed over once and in order; at the most
`_WINDOW` messages are under way; no message of one session is ever taken for one of another.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import final

import msgspec

from poolray.protocol.link import LinkFrame

#: Messages under way at once; the receiver keeps no more than this many that came too early.
_WINDOW = 64
#: Messages that wait for the window; with more than this the peer counts as out of reach.
_BACKLOG_MAX = 100_000
#: And so many bytes, unless its owner says otherwise.
_BACKLOG_BYTES_MAX = 1 << 30
#: Repeats in one go, oldest first: after a pause the first few tell whether the way is open.
_RESEND_COUNT = 8
#: The pause between repeats grows up to this many times the first, no further: heartbeats go over
#: this link, and some in a row may get lost before a node counts as dead.
_BACK_OFF_MAX = 4.0


class LinkState(enum.IntEnum):
    """What an end knows of the other."""

    GREETING = 0  #: its session is not known: only greetings go out
    OPEN = 1
    BROKEN = 2  #: given up: too much waited for it


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """What came of one frame."""

    payloads: list[bytes]  #: messages that are due now, in order
    frames: list[LinkFrame]  #: what to send back
    #: The peer is not the process that it was: what was on its way to that one is lost …
    restarted: bool = False
    #: … namely this, if it did not arrive, which nobody can tell.
    lost: list[bytes] = []


@final
class PeerLink:
    """One end of a link.

    Parameters
    ----------
    session : int
        Number of this life of the process, at least 1 and larger than those of earlier ones.
    resend_after_s : float
        Pause before a message that is not acknowledged is sent again, at first.
    backlog_max_bytes : int
        With more than this waiting for the window the peer counts as out of reach.
    """

    __slots__ = (
        "_back_off",
        "_backlog",
        "_backlog_max_bytes",
        "_deadline_s",
        "_early",
        "_next_in",
        "_next_out",
        "_peer_session",
        "_resend_after_s",
        "_resent",
        "_session",
        "_state",
        "_suspect",
        "_unacked",
        "backlog_bytes",
    )

    def __init__(
        self, session: int, resend_after_s: float, backlog_max_bytes: int = _BACKLOG_BYTES_MAX
    ) -> None:
        self._session = session
        self._resend_after_s = resend_after_s
        self._state = LinkState.GREETING
        #: The peer's life that we speak with; 0 while GREETING.
        self._peer_session = 0
        #: Messages that the window has no room for.
        self._backlog: deque[bytes] = deque()
        #: Bytes of them.
        self.backlog_bytes = 0
        self._backlog_max_bytes = backlog_max_bytes
        #: number -> message that is under way, in order.
        self._unacked: dict[int, bytes] = {}
        self._next_out = 1
        #: number -> message that came before an earlier one.
        self._early: dict[int, bytes] = {}
        self._next_in = 1
        #: When to repeat; None: nothing is under way.
        self._deadline_s: float | None = None
        self._back_off = 1.0
        #: What was under way, up to this number, when no acknowledgement came in time …
        self._suspect = 0
        #: … and was repeated, up to this one.
        self._resent = 0

    @property
    def state(self) -> LinkState:
        """What is known of the peer."""
        return self._state

    @property
    def waiting(self) -> int:
        """Messages that have not been acknowledged."""
        return len(self._unacked) + len(self._backlog)

    def send(self, payload: bytes, now: float) -> list[LinkFrame]:
        """Accept a message for the peer; gives what to put on the way now."""
        if self._state is LinkState.BROKEN:
            return []
        self._backlog.append(payload)
        self.backlog_bytes += len(payload)
        if len(self._backlog) > _BACKLOG_MAX or self.backlog_bytes > self._backlog_max_bytes:
            self.give_up()
            return []
        if self._state is LinkState.GREETING:
            if self._deadline_s is not None:
                return []
            self._deadline_s = now + self._resend_after_s
            return [self._frame()]
        return self._fill_window(now)

    def receive(self, frame: LinkFrame, now: float) -> Arrival:
        """Take a frame that came from the peer, or from an earlier life of it."""
        if frame.session < self._peer_session or self._state is LinkState.BROKEN:
            return Arrival([], [])  # from before the restart, and late
        restarted = False
        lost: list[bytes] = []
        frames: list[LinkFrame] = []
        if frame.session > self._peer_session:
            restarted = self._peer_session != 0
            if restarted:
                lost = [*self._unacked.values(), *self._backlog]
            self._meet(frame.session, restarted)
        if frame.peer_session != self._session:
            # It speaks to an earlier life of ours, or does not know us: say who we are.
            frames.append(self._frame())
            frames.extend(self._fill_window(now))
            return Arrival([], frames, restarted, lost)
        if self._on_ack(frame.ack, now) and self._resent < self._suspect:
            frames.extend(self._repeat())  # the way is open: the rest was lost with the first
        payloads: list[bytes] = []
        if frame.sequence:
            payloads = self._take(frame)
            frames.append(self._frame())
        frames.extend(self._fill_window(now))
        return Arrival(payloads, frames, restarted, lost)

    def on_tick(self, now: float) -> list[LinkFrame]:
        """Repeat what is overdue."""
        if self._deadline_s is None or now < self._deadline_s:
            return []
        self._back_off = min(2.0 * self._back_off, _BACK_OFF_MAX)
        self._deadline_s = now + self._back_off * self._resend_after_s
        if self._state is LinkState.GREETING:
            return [self._frame()]
        self._suspect, self._resent = self._next_out - 1, 0
        return self._repeat()

    def next_deadline(self) -> float | None:
        """When to call `on_tick`; None: no need."""
        return self._deadline_s

    # ---- inside ----------------------------------------------------------------------------------

    def _frame(self, sequence: int = 0, payload: bytes = b"") -> LinkFrame:
        return LinkFrame(
            session=self._session,
            peer_session=self._peer_session,
            ack=self._next_in - 1,
            sequence=sequence,
            payload=payload,
        )

    def _repeat(self) -> list[LinkFrame]:
        """The oldest messages that were not acknowledged, nor repeated since the last time-out."""
        frames: list[LinkFrame] = []
        for sequence, payload in self._unacked.items():
            if sequence > self._suspect or len(frames) == _RESEND_COUNT:
                break
            if sequence > self._resent:
                frames.append(self._frame(sequence, payload))
                self._resent = sequence
        return frames

    def _meet(self, session: int, restarted: bool) -> None:
        """The peer's session is known now, or is another one than it was."""
        self._peer_session = session
        self._state = LinkState.OPEN
        self._early.clear()
        self._next_in = 1
        self._deadline_s = None
        self._back_off = 1.0
        if restarted:
            # Whether these arrived nobody can tell: who sends again decides, not the link.
            self._backlog.clear()
            self.backlog_bytes = 0
        self._unacked.clear()
        self._next_out = 1
        self._suspect = self._resent = 0

    def _on_ack(self, ack: int, now: float) -> bool:
        oldest = self._next_out - len(self._unacked)
        acknowledged = range(oldest, min(ack, self._next_out - 1) + 1)
        for sequence in acknowledged:
            del self._unacked[sequence]
        progress = len(acknowledged) > 0
        if progress:
            self._back_off = 1.0
            self._deadline_s = now + self._resend_after_s if self._unacked else None
        return progress

    def _take(self, frame: LinkFrame) -> list[bytes]:
        """Messages that can be handed over with this one."""
        if not self._next_in <= frame.sequence < self._next_in + _WINDOW:
            return []  # a repeat of what came already
        self._early[frame.sequence] = frame.payload
        due: list[bytes] = []
        while self._next_in in self._early:
            due.append(self._early.pop(self._next_in))
            self._next_in += 1
        return due

    def _fill_window(self, now: float) -> list[LinkFrame]:
        frames: list[LinkFrame] = []
        while self._backlog and len(self._unacked) < _WINDOW:
            sequence = self._next_out
            payload = self._backlog.popleft()
            self.backlog_bytes -= len(payload)
            self._next_out += 1
            self._unacked[sequence] = payload
            frames.append(self._frame(sequence, payload))
        if frames and self._deadline_s is None:
            self._deadline_s = now + self._resend_after_s
        return frames

    def give_up(self) -> None:
        """Nothing goes to the peer any more, or is taken from it."""
        self._state = LinkState.BROKEN
        self._backlog.clear()
        self.backlog_bytes = 0
        self._unacked.clear()
        self._early.clear()
        self._deadline_s = None

    def check_invariants(self) -> None:
        """Raise AssertionError when numbers or windows are wrong."""
        assert (self._peer_session == 0) == (self._state is LinkState.GREETING) or (
            self._state is LinkState.BROKEN
        )
        assert len(self._unacked) <= _WINDOW
        assert self.backlog_bytes == sum(map(len, self._backlog)) <= self._backlog_max_bytes
        numbers = list(self._unacked)
        assert numbers == list(range(self._next_out - len(numbers), self._next_out))
        assert all(self._next_in < n < self._next_in + _WINDOW for n in self._early)
        assert (self._deadline_s is None) <= (not self._unacked)
        assert not self._backlog or self._state is not LinkState.OPEN or len(numbers) == _WINDOW
