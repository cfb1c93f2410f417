"""The loop of an actor's main thread calls what is asked for, in order, and sleeps in between."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from poolray.local.poll_loop import PollLoop


@pytest.fixture
def seen() -> list[object]:
    return []


@pytest.fixture
def loop(seen: list[object]) -> Iterator[PollLoop]:
    before = signal.set_wakeup_fd(-1)
    made = PollLoop(0.0, lambda: seen.append("signal"))
    yield made
    signal.set_wakeup_fd(before)
    os.close(made._woken)
    os.close(made._waker)


def test_calls_come_in_the_order_in_which_they_were_asked_for(
    loop: PollLoop, seen: list[object]
) -> None:
    loop.call_later(0.002, seen.append, "late")
    loop.call_later(0.001, seen.append, "early")
    loop.call_later(0.003, loop.stop)
    loop.call_soon(seen.append, "soon")
    loop.call_soon(loop.call_soon, seen.append, "after")
    loop.run_forever()
    assert seen == ["soon", "after", "early", "late"]


def test_a_socket_is_read_while_there_is_something_and_written_while_asked_for(
    loop: PollLoop, seen: list[object]
) -> None:
    left, right = socket.socketpair()
    with left, right:

        def read() -> None:
            seen.append(left.recv(1))
            if len(seen) == 4:
                loop.remove_reader(left)
                loop.stop()

        def write() -> None:
            seen.append("room")
            loop.remove_writer(left)
            right.sendall(b"abcd")

        loop.add_reader(left, read)
        loop.add_writer(left, write)
        loop.run_forever()
        assert seen == ["room", b"a", b"b", b"c"]
        assert not loop._readers
        assert not loop._writers


def test_another_thread_wakes_it_and_so_does_a_signal(loop: PollLoop, seen: list[object]) -> None:
    handler = signal.signal(signal.SIGURG, lambda *_: seen.append("handler"))
    try:
        main = threading.get_ident()

        def other() -> None:
            loop.call_soon_threadsafe(seen.append, "thread")
            loop.call_soon_threadsafe(signal.pthread_kill, main, signal.SIGURG)

        loop._on_signal = lambda: (seen.append("signal"), loop.stop())
        thread = threading.Thread(target=other)
        thread.start()
        loop.run_forever()
        thread.join()
    finally:
        signal.signal(signal.SIGURG, handler)
    assert seen == ["thread", "handler", "signal"]
