"""Links between machines: who is let in, what is carried, and what is dropped."""

from __future__ import annotations

import os
import random
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import msgspec
import pytest
import zmq

from poolray.cluster import auth
from poolray.cluster.asking import ask
from poolray.cluster.auth import Credentials
from poolray.cluster.switch import PART_BYTES, Switch, pack, split_address, unpack
from poolray.exceptions import AuthenticationError, ClusterConnectionError
from poolray.node import peer_link
from poolray.protocol import PROTOCOL_VERSION
from poolray.protocol.cluster import AskWho, FrameKind, Who
from poolray.protocol.link import LinkFrame
from tests.integration.support import wait_until

TOKEN = "0123456789abcdef" * 4
CREDENTIALS = Credentials.of(TOKEN)
OTHERS = Credentials.of("fedcba9876543210" * 4)
ME = Who(role="head", pid=1, version="x", python="y", protocol_version=PROTOCOL_VERSION)


class End:
    """One process's switch, and what has come."""

    def __init__(self, name: bytes, credentials: Credentials | None = CREDENTIALS) -> None:
        self.received: list[tuple[bytes, bytes]] = []
        self.refusals: list[str] = []
        self.switch = Switch(
            own_id=name,
            session=time.time_ns(),
            credentials=credentials,
            resend_after_s=0.05,
            on_message=lambda peer, data: self.received.append((peer, data)),
        )
        self.switch.on_refused = lambda peer, reason: self.refusals.append(reason)
        self.switch.answer = lambda question: ME

    def turn(self) -> None:
        now = time.monotonic()
        self.switch.service(now)
        self.switch.tick(now)


def run(ends: list[End], until: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Let ends work until something holds."""
    deadline = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < deadline, "it does not happen"
        for end in ends:
            end.turn()
        time.sleep(0.0005)


@contextmanager
def listening(credentials: Credentials | None = CREDENTIALS) -> Iterator[tuple[End, int]]:
    """An end that is served by a thread."""
    end = End(b"server", credentials)
    port = end.switch.listen("127.0.0.1", 0)
    stop = Event()

    def serve() -> None:
        while not stop.is_set():
            end.turn()
            time.sleep(0.001)

    thread = Thread(target=serve)
    thread.start()
    try:
        yield end, port
    finally:
        stop.set()
        thread.join()
        end.switch.close()


def test_messages_arrive_once_and_in_order_both_ways() -> None:
    one, other = End(b"one"), End(b"other")
    port = other.switch.listen("127.0.0.1", 0)
    one.switch.connect(b"other", "127.0.0.1", port)
    for number in range(500):
        one.switch.send(b"other", b"%d" % number)
    run([one, other], lambda: len(other.received) == 500)
    assert other.received == [(b"one", b"%d" % number) for number in range(500)]
    for number in range(100):
        other.switch.send(b"one", b"%d" % number)
    run([one, other], lambda: len(one.received) == 100)
    assert one.received == [(b"other", b"%d" % number) for number in range(100)]
    one.switch.close()
    other.switch.close()


def test_messages_of_one_turn_travel_together_and_are_known_one_by_one_when_they_are_lost() -> None:
    one, other = End(b"one"), End(b"other")
    lost: list[bytes] = []
    one.switch.on_restarted = lambda peer, messages: lost.extend(messages)
    port = other.switch.listen("127.0.0.1", 0)
    one.switch.connect(b"other", "127.0.0.1", port)
    one.switch.send(b"other", b"hello")
    run([one, other], lambda: bool(other.received) and one.switch.waiting(b"other") == 0)
    messages = [b"%d" % number * number for number in range(100)]
    for message in messages:
        one.switch.send(b"other", message)
    one.turn()
    assert one.switch.waiting(b"other") == 1
    other.switch.close()
    again = End(b"other")
    again.switch.listen("127.0.0.1", port)
    run([one, again], lambda: len(lost) == 100)
    assert lost == messages
    one.switch.close()
    again.switch.close()


def test_a_message_larger_than_a_part_arrives_whole() -> None:
    one, other = End(b"one"), End(b"other")
    port = other.switch.listen("127.0.0.1", 0)
    one.switch.connect(b"other", "127.0.0.1", port)
    data = os.urandom(2 * PART_BYTES + 17)
    one.switch.send(b"other", data)
    run([one, other], lambda: bool(other.received))
    assert other.received == [(b"one", data)]
    one.switch.close()
    other.switch.close()


def test_a_connection_that_breaks_loses_nothing() -> None:
    one, other = End(b"one"), End(b"other")
    port = other.switch.listen("127.0.0.1", 0)
    one.switch.connect(b"other", "127.0.0.1", port)
    one.switch.send(b"other", b"before")
    run([one, other], lambda: len(other.received) == 1)
    dealer = next(iter(one.switch._dealers))
    dealer.disconnect(dealer.last_endpoint)
    for number in range(20):
        one.switch.send(b"other", b"%d" % number)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    run([one, other], lambda: len(other.received) == 21)
    assert [data for _, data in other.received[1:]] == [b"%d" % number for number in range(20)]
    one.switch.close()
    other.switch.close()


def test_who_has_the_token_is_answered() -> None:
    with listening() as (_, port):
        assert ask(f"127.0.0.1:{port}", AskWho(), Who, CREDENTIALS) == ME


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [(CREDENTIALS, OTHERS), (CREDENTIALS, None), (None, CREDENTIALS)],
    ids=["another token", "no token", "a token where there is none"],
)
def test_who_has_not_the_same_token_is_told_so_at_once(
    theirs: Credentials | None, mine: Credentials | None
) -> None:
    with listening(theirs) as (_, port):
        started = time.monotonic()
        with pytest.raises(AuthenticationError, match=f"127.0.0.1:{port}"):
            ask(f"127.0.0.1:{port}", AskWho(), Who, mine)
        assert time.monotonic() - started < 5


def test_a_server_key_alone_lets_nobody_in() -> None:
    half = Credentials(server=CREDENTIALS.server, client=OTHERS.client)
    with listening() as (_, port):
        with pytest.raises(AuthenticationError):
            ask(f"127.0.0.1:{port}", AskWho(), Who, half)


def test_an_address_where_nobody_listens_is_named_within_seconds() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ClusterConnectionError, match=address) as caught:
            ask(address, AskWho(), Who, CREDENTIALS)
        assert isinstance(caught.value, ConnectionError)
        assert time.monotonic() - started < 5


def test_without_a_token_only_this_machine_is_served() -> None:
    end = End(b"end", None)
    with pytest.raises(AuthenticationError, match=r"0\.0\.0\.0"):
        end.switch.listen("0.0.0.0", 0)
    end.switch.close()
    with listening(None) as (_, port):
        assert ask(f"127.0.0.1:{port}", AskWho(), Who, None) == ME


def test_a_port_that_is_taken_is_named() -> None:
    with listening() as (_, port):
        end = End(b"end")
        with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
            end.switch.listen("127.0.0.1", port)
        end.switch.close()


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:0", "host:99999", "a:b"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        split_address(address)


def test_a_peer_for_which_too_much_waits_is_given_up_and_told_of_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peer_link, "_BACKLOG_MAX", 50)
    given_up: list[bytes] = []
    end = End(b"client")
    end.switch.on_given_up = given_up.append
    try:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            end.switch.connect(b"server", "127.0.0.1", nobody.getsockname()[1])
            for number in range(60):
                assert bool(given_up) == (number > 50)
                end.switch.send(b"server", b"x")
                end.turn()
        assert given_up == [b"server"]
        assert end.switch.waiting(b"server") == 0, "nothing is kept for it"
    finally:
        end.switch.close()


def test_a_peer_is_crowded_while_too_many_bytes_wait_and_given_up_at_four_times_as_many() -> None:
    one, other = End(b"one"), End(b"other")
    one.switch._crowd_bytes = 10_000
    given_up: list[bytes] = []
    one.switch.on_given_up = given_up.append
    port = other.switch.listen("127.0.0.1", 0)
    one.switch.connect(b"other", "127.0.0.1", port)
    sent = 0

    def send() -> None:
        nonlocal sent
        one.switch.send(b"other", b"%05d" % sent + bytes(995))
        one.turn()
        sent += 1

    try:
        send()
        run([one, other], lambda: bool(other.received))
        while not one.switch.crowded:  # it is silent: the window fills, then the backlog
            send()
        assert 64 + 10 <= sent <= 64 + 13
        run([one, other], lambda: len(other.received) == sent)
        assert not one.switch.crowded
        assert [int(data[:5]) for _, data in other.received] == list(range(sent))
        while not given_up:
            send()
        assert sent <= 2 * (64 + 13) + 40
        assert one.switch.waiting(b"other") == 0
        assert not one.switch.crowded
    finally:
        one.switch.close()
        other.switch.close()


# ---- what makes no sense -------------------------------------------------------------------------


@contextmanager
def connected(port: int) -> Iterator[zmq.Socket[bytes]]:
    """A bare socket of somebody who has the token."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    auth.secure_client(dealer, CREDENTIALS)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    try:
        yield dealer
    finally:
        context.destroy(linger=0)


def test_rubbish_on_the_port_changes_nothing() -> None:
    chance = random.Random(1)
    with listening() as (end, port):
        for length in (0, 1, 10, 64, 200, 5000):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(chance.randbytes(length))
        idle = socket.create_connection(("127.0.0.1", port))
        assert ask(f"127.0.0.1:{port}", AskWho(), Who, CREDENTIALS) == ME
        idle.close()
        assert end.received == []


def test_messages_that_make_no_sense_are_dropped() -> None:
    chance = random.Random(2)
    encode = msgspec.msgpack.encode
    with listening() as (end, port), connected(port) as dealer:
        for _ in range(300):
            kind = chance.choice(list(FrameKind))
            frame = encode(LinkFrame(session=chance.randrange(9), peer_session=3, ack=7))
            body = chance.choice(
                [chance.randbytes(chance.randrange(60)), frame, frame[:-1], b"", encode([1] * 9)]
            )
            whole = pack(kind, chance.choice([b"liar", b"", b"x" * 99]), body)
            torn = [whole[: chance.randrange(len(whole))], chance.randbytes(10) + whole[10:]]
            parts = [[whole], [whole, body], [torn[0]], [torn[1]], [b"", whole]]
            dealer.send_multipart(chance.choice(parts))
        assert ask(f"127.0.0.1:{port}", AskWho(), Who, CREDENTIALS) == ME
        # (It comes by another connection than the answer did.)
        wait_until(lambda: end.switch.dropped > 50, "what makes no sense to be dropped")
        assert end.received == []


def test_numbers_of_frames_that_lie_change_nothing_for_others() -> None:
    encode = msgspec.msgpack.encode
    with listening() as (end, port), connected(port) as dealer:
        for session, sequence in [(1, 1), (1, 1), (1, 10**9), (2, 1), (1, 2), (2**62, 1), (5, 3)]:
            frame = LinkFrame(
                session=session, peer_session=1, ack=2**60, sequence=sequence, payload=b"\0x"
            )
            dealer.send(pack(FrameKind.LINK, b"liar", encode(frame)))
        client = End(b"client")
        client.switch.connect(b"server", "127.0.0.1", port)
        client.switch.send(b"server", b"hello")
        run([client], lambda: (b"client", b"hello") in end.received)
        client.switch.close()


def test_a_message_beyond_all_measure_costs_its_sender_the_connection_and_nobody_else() -> None:
    with listening() as (end, port), connected(port) as dealer:
        dealer.send(pack(FrameKind.LINK, b"giant", b"x" * (3 * PART_BYTES)))
        assert ask(f"127.0.0.1:{port}", AskWho(), Who, CREDENTIALS) == ME
        assert end.received == []


def test_another_version_is_told_in_words() -> None:
    with listening() as (end, port), connected(port) as dealer:
        message = bytearray(pack(FrameKind.LINK, b"newer", b"whatever it says"))
        message[8] = PROTOCOL_VERSION + 1
        dealer.send(bytes(message))
        assert dealer.poll(5_000)
        kind, _, _, reason = unpack(dealer.recv())
        assert kind is FrameKind.REFUSAL
        assert b"run the same version of poolray" in reason
        assert end.received == []


# ---- tokens --------------------------------------------------------------------------------------


def test_a_token_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = str(tmp_path / "deep" / "token")
    token, source = auth.ensure_token(path)
    assert source == path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert auth.ensure_token(path) == (token, path)
    assert auth.read_token(path) == token
    assert len(token) == 64


def test_a_token_is_taken_from_the_file_named_then_from_the_variables(tmp_path: Path) -> None:
    (tmp_path / "named").write_text("n" * 20 + "\n")
    (tmp_path / "variable").write_text("v" * 20)
    variables = {
        "POOLRAY_AUTH_TOKEN": "t" * 20,
        "POOLRAY_AUTH_TOKEN_PATH": str(tmp_path / "variable"),
    }
    found = auth.find_token(str(tmp_path / "named"), variables)
    assert found is not None
    assert found[0] == "n" * 20
    found = auth.find_token(None, variables)
    assert found is not None
    assert found[0] == "t" * 20
    del variables["POOLRAY_AUTH_TOKEN"]
    found = auth.find_token(None, variables)
    assert found is not None
    assert found[0] == "v" * 20


@pytest.mark.parametrize("content", ["", "   \n", "short"])
def test_what_is_no_secret_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(AuthenticationError, match=str(path)):
        auth.read_token(str(path))


def test_a_mode_that_does_not_exist_is_refused() -> None:
    assert auth.mode({}) is auth.AuthMode.TOKEN
    assert auth.mode({"POOLRAY_AUTH_MODE": "disabled"}) is auth.AuthMode.DISABLED
    with pytest.raises(ValueError, match="POOLRAY_AUTH_MODE"):
        auth.mode({"POOLRAY_AUTH_MODE": "none"})
