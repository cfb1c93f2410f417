"""Handles: what they compare by, what is counted, what users cannot do."""

from __future__ import annotations

import copy
import gc
from collections import deque
from typing import Any

import pytest

from poolray.ids import OBJECT_ID_BYTES, ObjectId
from poolray.objects.object_ref import ObjectRef, make_ref


class Owner:
    """A client that remembers what it is told."""

    def __init__(self) -> None:
        self.dropped: deque[ObjectId] = deque()
        self.pinned: list[ObjectRef[Any]] = []

    def future_of(self, ref: ObjectRef[Any]) -> Any:
        return ("future", ref)

    def loop_future_of(self, ref: ObjectRef[Any]) -> Any:
        raise NotImplementedError

    def await_value(self, ref: ObjectRef[Any]) -> Any:
        yield ref

    def pin_forever(self, ref: ObjectRef[Any]) -> None:
        self.pinned.append(ref)


A = ObjectId(b"a" * OBJECT_ID_BYTES)
B = ObjectId(b"b" * OBJECT_ID_BYTES)


@pytest.mark.parametrize("arguments", [(), (A,), (A, Owner())])
def test_users_cannot_construct_one(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(
        TypeError, match=r"refs come from .remote\(\), put\(\) and tasks' arguments"
    ):
        ObjectRef(*arguments)
    gc.collect()  # a half-made handle would complain in its finalizer


def test_handles_of_one_object_are_equal_and_hash_equal() -> None:
    owner = Owner()
    assert make_ref(A, owner) == make_ref(A, Owner())
    assert len({make_ref(A, owner), make_ref(A, owner), make_ref(B, owner)}) == 2
    assert make_ref(A, owner) != make_ref(B, owner)
    assert make_ref(A, owner) != A


def test_the_death_of_a_handle_only_appends_its_id() -> None:
    owner = Owner()
    first, second = make_ref(A, owner), make_ref(B, owner)
    del second
    assert list(owner.dropped) == [B]
    del first
    assert list(owner.dropped) == [B, A]


def test_copies_are_the_handle_itself() -> None:
    owner = Owner()
    ref = make_ref(A, owner)
    assert copy.copy(ref) is ref
    assert copy.deepcopy([ref])[0] is ref
    assert not owner.pinned


def test_it_shows_its_id() -> None:
    ref = make_ref(A, Owner())
    assert ref.binary() == A
    assert ref.hex() == A.hex()
    assert repr(ref) == f"ObjectRef({A.hex()})"
    assert ref.task_id() == A[: len(ref.task_id())]
    assert ObjectRef.size() == len(A)
    assert not ref.is_nil()
    assert make_ref(ObjectId(bytes(OBJECT_ID_BYTES)), Owner()).is_nil()


def test_pickled_outside_of_a_call_it_is_pinned() -> None:
    owner = Owner()
    ref = make_ref(A, owner)
    ref.__reduce__()
    assert owner.pinned == [ref]
