"""A peer link over a way that loses, delays, repeats and reorders: once, in order, per session."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from poolray.node.peer_link import LinkState, PeerLink
from poolray.protocol.link import LinkFrame

RESEND_S = 0.2


class Way:
    """Two ends and what is on its way between them."""

    def __init__(self, seed: int, loss: float, repeat: float, delay_s: float) -> None:
        self.random = random.Random(seed)
        self.loss, self.repeat, self.delay_s = loss, repeat, delay_s
        self.now = 0.0
        self.ends = [PeerLink(1, RESEND_S), PeerLink(1, RESEND_S)]
        #: (time of arrival, order, receiver, frame)
        self.flying: list[tuple[float, int, int, LinkFrame]] = []
        self.got: list[list[bytes]] = [[], []]
        self.restarts = [0, 0]
        self.count = 0

    def carry(self, sender: int, frames: list[LinkFrame]) -> None:
        for frame in frames:
            copies = 0 if self.random.random() < self.loss else 1
            copies += self.random.random() < self.repeat
            for _ in range(copies):
                self.count += 1
                arrival = self.now + self.random.random() * self.delay_s
                self.flying.append((arrival, self.count, 1 - sender, frame))

    def send(self, sender: int, payload: bytes) -> None:
        self.carry(sender, self.ends[sender].send(payload, self.now))
        self.ends[sender].check_invariants()

    def restart(self, end: int, session: int) -> None:
        self.ends[end] = PeerLink(session, RESEND_S)
        self.got[end] = []

    def step(self) -> bool:
        """The next thing happens; False when nothing will any more."""
        deadlines = [
            (deadline, end)
            for end, link in enumerate(self.ends)
            if (deadline := link.next_deadline()) is not None
        ]
        arrival = min(self.flying, default=None)
        timer = min(deadlines, default=None)
        if arrival is None and timer is None:
            return False
        if arrival is not None and (timer is None or arrival[0] <= timer[0]):
            self.flying.remove(arrival)
            self.now = max(self.now, arrival[0])
            end = arrival[2]
            came = self.ends[end].receive(arrival[3], self.now)
            self.got[end] += came.payloads
            self.restarts[end] += came.restarted
            self.carry(end, came.frames)
        else:
            assert timer is not None
            end = timer[1]
            self.now = max(self.now, timer[0])
            self.carry(end, self.ends[end].on_tick(self.now))
        self.ends[end].check_invariants()
        return True

    def settle(self, steps: int = 200_000) -> None:
        for _ in range(steps):
            if not self.step():
                return
        raise AssertionError("the link does not come to rest")


ways = st.builds(
    Way,
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.1, 0.5, 0.8]),
    repeat=st.sampled_from([0.0, 0.3]),
    delay_s=st.sampled_from([0.0, 0.01, 1.0]),
)
orders = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), max_size=150)


@settings(max_examples=60, deadline=None)
@given(way=ways, orders=orders)
def test_every_message_arrives_once_and_in_order(way: Way, orders: list[tuple[int, int]]) -> None:
    sent: list[list[bytes]] = [[], []]
    for sender, steps in orders:
        payload = b"%d" % len(sent[sender])
        sent[sender].append(payload)
        way.send(sender, payload)
        for _ in range(steps):
            way.step()
    way.settle()
    assert way.got == [sent[1], sent[0]]
    assert way.restarts == [0, 0]
    assert [link.waiting for link in way.ends] == [0, 0]


@settings(max_examples=60, deadline=None)
@given(way=ways, before=orders, after=orders)
def test_a_restarted_peer_is_never_taken_for_the_one_before(
    way: Way, before: list[tuple[int, int]], after: list[tuple[int, int]]
) -> None:
    for sender, steps in before:
        way.send(sender, b"old")
        for _ in range(steps):
            way.step()
    way.restart(1, session=2)
    old = len(way.got[0])
    sent: list[list[bytes]] = [[], []]
    for number, (sender, steps) in enumerate(after):
        payload = b"new %d" % number
        sent[sender].append(payload)
        way.send(sender, payload)
        for _ in range(steps):
            way.step()
    way.settle()
    # What the new process sends all arrives; nothing of the old one is mixed in afterwards.
    fresh = [payload for payload in way.got[0][old:] if payload != b"old"]
    assert fresh == sent[1]
    assert all(payload == b"old" for payload in way.got[0][: len(way.got[0]) - len(fresh)])
    # What was sent to it before it was known to be another one may be lost, but only from the
    # beginning, and what arrives is in order.
    arrived = way.got[1]
    new = [payload for payload in arrived if payload != b"old"]
    assert new == sent[0][len(sent[0]) - len(new) :]


def test_a_peer_that_never_answers_is_given_up_in_the_end() -> None:
    link = PeerLink(1, RESEND_S)
    for number in range(100_001):
        link.send(b"%d" % number, 0.0)
    assert link.state is LinkState.BROKEN
    assert link.next_deadline() is None
    assert link.send(b"more", 1.0) == []


def test_repeats_become_rarer() -> None:
    link = PeerLink(1, RESEND_S)
    link.send(b"hello", 0.0)
    pauses = []
    for _ in range(8):
        deadline = link.next_deadline()
        assert deadline is not None
        pauses.append(deadline)
        link.on_tick(deadline)
    gaps = [round(later - earlier, 6) for earlier, later in itertools.pairwise(pauses)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == RESEND_S * 4


def test_all_that_was_lost_with_a_connection_is_repeated_within_one_pause() -> None:
    way = Way(seed=0, loss=0.0, repeat=0.0, delay_s=0.001)
    way.send(0, b"hello")
    while way.got[1] != [b"hello"] or way.flying:
        way.step()
    sent = [str(number).encode() for number in range(200)]
    way.loss = 1.0  # the cable is out
    for payload in sent:
        way.send(0, payload)
    way.loss = 0.0
    cut_s = way.now
    while len(way.got[1]) < 1 + len(sent):
        assert way.step(), "nothing is repeated any more"
    assert way.got[1][1:] == sent
    assert way.now - cut_s < 3 * RESEND_S


def test_an_acknowledgement_of_what_was_never_sent_does_no_harm() -> None:
    way = Way(seed=0, loss=0.0, repeat=0.0, delay_s=0.001)
    way.send(0, b"hello")
    while way.step():
        pass
    link = way.ends[0]
    link.receive(LinkFrame(session=1, peer_session=1, ack=1_000_000, sequence=0, payload=b""), 1.0)
    link.check_invariants()
    way.send(0, b"again")
    while way.step():
        pass
    assert way.got[1] == [b"hello", b"again"]
