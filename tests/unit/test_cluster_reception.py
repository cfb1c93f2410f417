"""Drivers at the door of a daemon that has no room for them."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from poolray.cluster import places
from poolray.cluster.sessions import Reception


class Listener:
    """A listening socket for whose connections no descriptors are left, for a while."""

    def __init__(self) -> None:
        self.is_exhausted = True
        self.is_closed = False

    def accept(self) -> Any:
        raise OSError(errno.EMFILE if self.is_exhausted else errno.EAGAIN, "no")

    def close(self) -> None:
        self.is_closed = True


class Host:
    """A daemon: what it polls."""

    def __init__(self) -> None:
        self.watched: list[Any] = []

    def watch(self, channel: Any, _: Any) -> None:
        assert channel not in self.watched
        self.watched.append(channel)

    def unwatch(self, channel: Any) -> None:
        self.watched.remove(channel)


def test_a_door_that_cannot_take_anybody_in_is_not_polled_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener, host = Listener(), Host()
    monkeypatch.setattr(places, "listen", lambda _: listener)
    reception = Reception(host, "name")  # type: ignore[arg-type]
    assert host.watched == [listener]
    reception.answer()
    assert host.watched == [], "it would be readable all the time"
    reception.tick()
    assert host.watched == [listener]
    reception.answer()
    reception.close()
    assert listener.is_closed
    reception.tick()


def test_a_door_where_nobody_is_is_polled_on(monkeypatch: pytest.MonkeyPatch) -> None:
    listener, host = Listener(), Host()
    listener.is_exhausted = False
    monkeypatch.setattr(places, "listen", lambda _: listener)
    reception = Reception(host, "name")  # type: ignore[arg-type]
    reception.answer()
    assert host.watched == [listener]
