"""Submissions that are told together, and the selector that polls before it sleeps."""

from __future__ import annotations

import selectors
import socket
from collections import deque
from collections.abc import Iterator

import pytest

from poolray.ids import ActorId, ClassId, TaskId
from poolray.local.collected import Submission, take_together
from poolray.local.spinning_selector import SpinningSelector
from poolray.protocol.actors import CallActor, CallActors
from poolray.protocol.client import SubmitTasks
from poolray.protocol.values import TaskSpec


def spec(name: bytes) -> TaskSpec:
    return TaskSpec(task_id=TaskId(name), class_id=ClassId(b"class"), calls=[b"call"])


def call(name: bytes) -> CallActor:
    return CallActor(actor_id=ActorId(b"actor"), task=spec(name))


def names_of(message: SubmitTasks | CallActors) -> list[bytes]:
    if isinstance(message, SubmitTasks):
        return [task.task_id for task in message.tasks]
    return [call.task.task_id for call in message.calls]


def test_submissions_are_told_together_as_far_as_their_order_allows() -> None:
    collected: deque[Submission] = deque(
        [call(b"1"), call(b"2"), SubmitTasks(tasks=[spec(b"3"), spec(b"4")])]
    )
    collected.extend([SubmitTasks(tasks=[spec(b"5")]), call(b"6")])
    told = []
    while collected:
        told.append(names_of(take_together(collected)))
    assert told == [[b"1", b"2"], [b"3", b"4", b"5"], [b"6"]]


@pytest.fixture
def selector() -> Iterator[SpinningSelector]:
    made = SpinningSelector(1e-3)
    yield made
    made.close()


@pytest.mark.parametrize("may_poll", [True, False])
def test_a_polling_selector_finds_what_is_ready(selector: SpinningSelector, may_poll: bool) -> None:
    selector.may_poll = may_poll
    near, far = socket.socketpair()
    with near, far:
        key = selector.register(near, selectors.EVENT_READ)
        assert selector.select(0) == []
        assert selector.select(1e-4) == []
        far.send(b"x")
        for timeout in (0, 10.0, None):
            assert selector.select(timeout) == [(key, selectors.EVENT_READ)]
        near.recv(1)
        assert selector.select(2e-3) == []
