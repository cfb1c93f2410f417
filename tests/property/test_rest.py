"""What `wait` leaves behaves as a list does, whatever is done with it and with those before it.

What: a client whose node is a set of ready names waits on lists, users read, change and keep them;
each list is compared with an ordinary one.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from poolray import client_rest, client_waits
from poolray.client_link import NO_WATCH, WatchStep
from poolray.client_waits import WaitOptions, wait_and_rest
from poolray.ids import ObjectId
from poolray.objects.object_ref import ObjectRef, make_ref
from poolray.wait_lists import check_wait


class Node:
    """Knows which objects are ready; answers at once, as if the time were up."""

    def __init__(self) -> None:
        self.ready: set[ObjectId] = set()
        #: number -> objects of a watch, by number; None: taken.
        self.watches: dict[int, list[ObjectId | None]] = {}
        self.longest = 0

    def wait(
        self,
        object_ids: list[ObjectId],
        count: int,
        timeout_s: float | None,
        fetch: bool = False,
        watch: WatchStep = NO_WATCH,
    ) -> list[int]:
        self.longest = max(self.longest, len(object_ids))
        if watch.number:
            known = self.watches.setdefault(watch.number, [])
            for number in watch.left:
                assert known[number] is not None, "taken twice"
                known[number] = None
            known.extend(object_ids)
            asked = known
        else:
            asked = list(object_ids)
        return [n for n, o in enumerate(asked) if o in self.ready][:count]


class Client:
    """As much of a client as waiting needs."""

    def __init__(self) -> None:
        self.link = Node()
        self.direct = None
        self._ready: dict[ObjectId, None] = {}
        self.dropped: deque[ObjectId] = deque()
        self.dropped_watches: deque[int] = deque()
        self._numbers = itertools.count(1)

    def next_watch(self) -> int:
        return next(self._numbers)

    def sync_references(self) -> None:
        while self.dropped_watches:
            self.link.watches.pop(self.dropped_watches.popleft(), None)

    def _tell_node(self, object_ids: list[ObjectId]) -> None:
        """It knows all there are."""

    def _ids_of(self, refs: list[ObjectRef[Any]]) -> list[ObjectId]:
        return [ref._id for ref in refs]


def changes(item: Any) -> dict[str, Any]:
    """What users do to lists, by name."""
    return {
        "append": lambda refs, n: refs.append(item),
        "extend": lambda refs, n: refs.extend([item]),
        "add in place": lambda refs, n: refs.__iadd__((item,)),
        "insert": lambda refs, n: refs.insert(n, item),
        "set": lambda refs, n: refs.__setitem__(n, item) if n < len(refs) else None,
        "pop": lambda refs, n: refs.pop() if refs else None,
        "remove": lambda refs, n: refs.remove(refs[n]) if n < len(refs) else None,
        "delete a slice": lambda refs, n: refs.__delitem__(slice(n, n + 2)),
        "reverse": lambda refs, n: refs.reverse(),
        "sort": lambda refs, n: refs.sort(key=lambda ref: ref._id[::-1]),
        "clear": lambda refs, n: refs.clear(),
        "start again": lambda refs, n: refs.__init__([item]),
    }


READS: dict[str, Any] = {
    "list": list,
    "length": len,
    "truth": bool,
    "first": lambda refs: refs[0] if refs else None,
    "last": lambda refs: refs[-1] if refs else None,
    "slice": lambda refs: refs[1:-1],
    "contains": lambda refs: [ref in refs for ref in [*refs[:2], 1]],
    "index": lambda refs: refs.index(refs[-1]) if refs else None,
    "count": lambda refs: refs.count(None),
    "sum": lambda refs: [*refs, 1] == refs + [1] and [1] + refs == [1, *refs],  # noqa: RUF005
    "product": lambda refs: refs * 2 + 2 * refs,
    "reversed": lambda refs: list(reversed(refs)),
    "unpacked": lambda refs: (lambda *them: them)(*refs),
    "repr": repr,
    "sorted": lambda refs: sorted(refs, key=lambda ref: ref._id),
    "copied": copy.copy,
    "copied by itself": lambda refs: refs.copy(),
    "compared": lambda refs: (refs == list(refs), list(refs) == refs, refs != [], refs != []),
    "rebuilt": lambda refs: list(type(refs)(refs)),
}


class Lists(RuleBasedStateMachine):
    """Lists that followed on each other, each with what it is to contain."""

    @initialize(count=st.integers(1, 40))
    def start(self, count: int) -> None:
        self.client = Client()
        self.names = itertools.count()
        refs = [self.new_ref() for _ in range(count)]
        self.lists: list[tuple[list[Any], list[Any]]] = [(refs, list(refs))]

    def new_ref(self) -> ObjectRef[Any]:
        name = ObjectId(next(self.names).to_bytes(28, "big"))
        return make_ref(name, self.client)  # type: ignore[arg-type]

    def pick(self, data: st.DataObject) -> int:
        # (The newest one, mostly.)
        return data.draw(st.one_of(st.just(-1), st.integers(-len(self.lists), -1)))

    @rule(data=st.data(), wanted=st.integers(1, 9), are_known=st.booleans())
    def wait(self, data: st.DataObject, wanted: int, are_known: bool) -> None:
        which = self.pick(data)
        refs, model = self.lists[which]
        if not model:
            return
        ready = self.client.link.ready
        pending = [ref._id for ref in model if ref._id not in ready]
        if pending:
            ready |= data.draw(st.sets(st.sampled_from(pending), max_size=6))
        self.client._ready = dict.fromkeys(ready) if are_known else {}
        wanted = min(wanted, len(model))
        assert check_wait(refs, wanted, None) == len(model)
        found, rest = wait_and_rest(self.client, refs, WaitOptions(wanted, 0.0, True))  # type: ignore[arg-type]
        expected = [ref for ref in model if ref._id in ready][:wanted]
        assert found == expected
        left = [ref for ref in model if ref not in expected]
        self.lists.append((rest, left))
        if which == -1 and data.draw(st.integers(0, 3)):
            del self.lists[-2]

    @rule(data=st.data(), name=st.sampled_from(sorted(READS)))
    def read(self, data: st.DataObject, name: str) -> None:
        refs, model = self.lists[self.pick(data)]
        assert READS[name](refs) == READS[name](model)

    @rule(data=st.data(), name=st.sampled_from(sorted(changes(None))), place=st.integers(0, 9))
    def change(self, data: st.DataObject, name: str, place: int) -> None:
        refs, model = self.lists[self.pick(data)]
        item = self.new_ref()
        changes(item)[name](refs, place)
        changes(item)[name](model, place)

    @rule(data=st.data())
    def append_it_again(self, data: st.DataObject) -> None:
        refs, model = self.lists[self.pick(data)]
        if model:
            refs.append(model[0])
            with pytest.raises(ValueError, match="unique"):
                check_wait(refs, 1, None)
            refs.pop()
            check_wait(refs, 1, None)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        if len(self.lists) > 1:
            del self.lists[self.pick(data)]

    @rule(data=st.data())
    def compare(self, data: st.DataObject) -> None:
        one, two = self.lists[self.pick(data)], self.lists[self.pick(data)]
        assert (one[0] == two[0]) == (one[1] == two[1])
        assert one[0] + two[0] == one[1] + two[1]

    @invariant()
    def lengths_agree(self) -> None:
        for refs, model in self.lists:
            assert len(refs) == len(model)

    def teardown(self) -> None:
        if not hasattr(self, "lists"):
            return
        for refs, model in self.lists:
            assert list(refs) == model
        assert self.client.link.longest <= client_waits._MESSAGE_REFS_MAX
        self.lists.clear()
        self.client.sync_references()
        assert not self.client.link.watches, "what the node keeps for lists goes with them"


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that long lists do, short ones do too."""
    monkeypatch.setattr(client_rest, "LAZY_MIN", 3)
    monkeypatch.setattr(client_rest, "_COPIES", 1)
    monkeypatch.setattr(client_waits, "_BLOCK", 2)
    monkeypatch.setattr(client_waits, "_MESSAGE_REFS_MAX", 8)


def test_lists_that_wait_leaves_behave_as_lists() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Lists, settings=settings(max_examples=60, stateful_step_count=25, deadline=None)
    )
