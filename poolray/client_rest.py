"""`Rest`: the list that `wait` leaves; a step costs the same however long it is.

    wait(a) ─▶ b         wait(b) ─▶ c                wait(c) ─▶ d
    b: [1, 2, 3, …]      c: Older({2: ref}, d) ────▶ d: Remaining {1: ref, 3: ref, …}

What: who takes refs one by one drops each list when he has the next. So the content is handed over
(Baker's trick for persistent arrays): the newest list has it, an older one keeps what was taken
since, and lays itself out as an ordinary list when somebody looks at it.
Who calls: `api.py`, `client_waits.py`; users have it as a list.
May touch: nothing.
Invariants: a list that is laid out is needed by no older one, and needs no newer one; what a list
had and its successors have not is freed with it.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, final

from poolray.ids import ObjectId

#: Shorter lists are copied at each step, which costs less than handing them over.
LAZY_MIN = 128
#: Once somebody has looked at a list, so many that follow on it are copies: who looks at each of
#: them pays no more than if none were ever handed over.
_COPIES = 32

#: Held while lists change hands. (Reentrant: a finalizer may run in between.)
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]


@final
class Remaining:
    """What is left of a list, in order; of whoever is the newest of its owners."""

    __slots__ = ("keys", "next_place", "refs", "unchecked", "waits", "watch")

    def __init__(self, refs: Iterable[Any]) -> None:
        #: place in the order -> ref. (Of a plain dictionary the front is found by looking at
        #: everything that has been taken from there.)
        self.refs: OrderedDict[int, Any] = OrderedDict(enumerate(refs))
        self.next_place = len(self.refs)
        #: Places of what was appended and that `wait` has not looked at.
        self.unchecked: list[int] = []
        #: What tells refs apart, of all that were looked at; None: nothing was ever appended.
        self.keys: set[bytes] | None = None
        #: A thread waits for one of these refs.
        self.waits = False
        #: The node's record of who waits for them all, kept from one wait to the next.
        self.watch: Any = None

    def front(self, count: int) -> list[tuple[int, Any]]:
        """The first refs with their places."""
        with _lock:
            return list(islice(self.refs.items(), count))

    def end(self, index: int) -> list[Any]:
        """The first (0) or the last (-1) ref; empty: there is none."""
        with _lock:
            refs = self.refs
            return list(islice(reversed(refs.values()) if index else refs.values(), 1))

    def after(self, place: int) -> list[tuple[int, Any]]:
        """What was appended from a place on."""
        with _lock:
            refs = self.refs
            if not place:
                return list(refs.items())
            return [(each, refs[each]) for each in range(place, self.next_place) if each in refs]

    def note_checked(self, refs: list[tuple[int, Any]]) -> bool:
        """See `Rest.note_checked`."""
        if not refs:
            return True
        if self.keys is None:
            new = dict.fromkeys(self.unchecked)
            self.keys = {key_of(ref) for place, ref in self.refs.items() if place not in new}
        keys = {key_of(ref) for _, ref in refs}
        if len(keys) < len(refs) or not keys.isdisjoint(self.keys):
            return False
        self.keys |= keys
        looked_at = dict.fromkeys(place for place, _ in refs)
        self.unchecked = [place for place in self.unchecked if place not in looked_at]
        return True

    def append(self, items: Iterable[Any]) -> None:
        """Put something at the end, whatever it is."""
        for item in items:
            self.unchecked.append(self.next_place)
            self.refs[self.next_place] = item
            self.next_place += 1


class _NotHere:
    """What is in the memory of a list whose content is elsewhere.

    Nobody sees it but C code that reads lists' memory without asking (`operator.concat`, `heapq`):
    it gets something that no function of ours takes, not a list that seems to be empty.
    """

    def __repr__(self) -> str:
        return "<what wait() left is read by list(rest), not by looking into its memory>"


_NOT_HERE = _NotHere()
_make = list.__new__


@final
class Rest(list[Any]):
    """What `wait` leaves: a list of different refs, laid out when somebody looks at it.

    `wait` need not check the refs again while nobody changes it: who takes thousands of refs one
    by one would else have each of them looked at thousands of times.
    """

    __slots__ = ("__weakref__", "_copies", "_older", "_size", "_state", "_taken", "is_checked")

    #: Where the content is: in what is left, if this is the newest, or in a newer list; None: here.
    _state: Remaining | Rest | None
    #: With a newer list, place -> ref: what that one has not got, and how long this one is.
    _taken: dict[int, Any]
    _size: int
    #: The list whose newer one this is, while it lives.
    _older: weakref.ref[Rest] | None
    #: So many that follow on this one are copies.
    _copies: int
    #: `wait` has looked at all of it.
    is_checked: bool

    def __new__(cls, *_: Any) -> Rest:
        rest = _make(cls)
        rest._state = rest._older = None
        rest._copies = 0
        rest.is_checked = False
        return rest

    # ---- for those who wait ----------------------------------------------------------------------

    def take_ready(
        self, wanted: int, ready_ids: Mapping[ObjectId, None]
    ) -> tuple[list[Any], Rest] | None:
        """The first refs, if they are known to be ready, and what is left then."""
        with _lock:
            remaining = self._state
            if type(remaining) is not Remaining or remaining.waits:
                return None
            taken = dict(islice(remaining.refs.items(), wanted))
            for ref in taken.values():
                if ref._id not in ready_ids:
                    return None
            return list(taken.values()), self._without(remaining, taken)

    def remaining(self) -> Remaining | None:
        """What is left, if it is not laid out; for one thread, which says when it has waited."""
        with _lock:
            state = self._state
            if type(state) is not Remaining or state.waits:
                return None
            state.waits = True
            return state

    def without(self, remaining: Remaining, taken: dict[int, Any]) -> list[Any]:
        """What is left after a `wait` on `remaining`."""
        with _lock:
            if self._state is remaining:
                return self._without(remaining, taken)
            gone = {id(ref) for ref in taken.values()}  # somebody has looked at it meanwhile
            return [ref for ref in self if id(ref) not in gone]

    def _without(self, remaining: Remaining, taken: dict[int, Any]) -> Rest:
        refs = remaining.refs
        size = len(refs)
        if size - len(taken) < LAZY_MIN:
            return _laid_out([ref for place, ref in refs.items() if place not in taken], 0)
        rest = _handed_on(remaining)
        rest._older = weakref.ref(self)
        # In this order: should Ctrl-C come in between, what is there twice counts once.
        self._taken = taken
        self._size = size
        self._state = rest
        for place in taken:
            del refs[place]
        if remaining.keys is not None:
            remaining.keys.difference_update(map(key_of, taken.values()))
        if remaining.watch is not None:
            remaining.watch.note_left(taken)
        return rest

    def as_list(self) -> list[Any]:
        """A copy, which is no `Rest`."""
        self._lay_out()
        return list.copy(self)

    def follow(self, left: list[Any]) -> Rest:
        """What is left of a list that is laid out."""
        if len(left) < LAZY_MIN or self._copies:
            return _laid_out(left, max(0, self._copies - 1))
        return _handed_on(Remaining(left))

    def unchecked(self) -> list[tuple[int, Any]]:
        """With their places: what `wait` has not looked at yet."""
        with _lock:
            if self.is_checked:
                return []
            state = self._state
            if type(state) is Remaining:
                return [(place, state.refs[place]) for place in state.unchecked]
            return list(enumerate(self))

    def note_checked(self, refs: list[tuple[int, Any]]) -> bool:
        """`wait` has looked at these, which are refs; False: they are not all different."""
        with _lock:
            state = self._state
            if type(state) is Remaining:
                self.is_checked = state.note_checked(refs)
            else:
                self.is_checked = len({ref._id for _, ref in refs}) == len(refs)
            return self.is_checked

    # ---- laying out ------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Become an ordinary list; so do the older ones, which would need this one's content."""
        with _lock:
            if self._state is None:
                return
            content = self._content()
            pending = [(self, list(content.values()))]
            older = self._living_older()
            while older is not None:
                content = _merged(content, older._taken)
                pending.append((older, list(content.values())))
                older = older._living_older()
            # The oldest first: should Ctrl-C come in between, nobody needs what is laid out.
            for rest, refs in reversed(pending):
                list.clear(rest)
                list.extend(rest, refs)
                rest._copies = _COPIES
                rest._state = None
                rest._taken = _NOTHING

    def _content(self) -> dict[int, Any]:
        taken: dict[int, Any] = {}
        rest = self
        while type(rest._state) is Rest:
            taken.update(rest._taken)
            rest = rest._state
        assert type(rest._state) is Remaining
        return _merged(rest._state.refs, taken)

    def _living_older(self) -> Rest | None:
        """The list that needs this one's content, if it lives."""
        older = self._older() if self._older is not None else None
        return older if older is not None and older._state is self else None

    # ---- for users -------------------------------------------------------------------------------

    def __len__(self) -> int:
        state = self._state
        if state is None:
            return list.__len__(self)
        return len(state.refs) if type(state) is Remaining else self._size

    def __getitem__(self, index: Any, /) -> Any:
        state = self._state
        if state is not None:
            if type(state) is Remaining and type(index) is int and index in (0, -1):
                found = state.end(index)
                if found:
                    return found[0]
            self._lay_out()
        return list.__getitem__(self, index)

    def append(self, item: Any, /) -> None:
        """Append; the content need not be laid out."""
        self.extend((item,))

    def extend(self, items: Iterable[Any], /) -> None:
        """Append several; the content need not be laid out."""
        if self._state is None:
            self.is_checked = False
            list.extend(self, items)
            return
        items = list(items)
        with _lock:
            older = self._living_older()
            if older is not None:
                older._lay_out()
            state = self._state
            if type(state) is not Remaining:
                self._lay_out()
            self.is_checked = False
            if type(state) is Remaining:
                state.append(items)
            else:
                list.extend(self, items)

    def __iadd__(self, items: Iterable[Any], /) -> Rest:  # type: ignore[misc]
        self.extend(items)
        return self

    def __radd__(self, items: list[Any], /) -> list[Any]:
        if not isinstance(items, list):
            return NotImplemented
        return [*items, *self]

    def __reduce__(self) -> Any:
        return list, (list(self),)


_NOTHING: dict[int, Any] = {}


def without(refs: list[Any], taken: list[int]) -> Rest:
    """What is left of somebody's list after a `wait` that found these indexes in it."""
    return _laid_out(left_of(refs.copy(), taken), 0)


def left_of(refs: list[Any], taken: list[int]) -> list[Any]:
    """The others; of a list that nobody needs any more."""
    if len(taken) >= 8:
        chosen = dict.fromkeys(taken)
        return [ref for index, ref in enumerate(refs) if index not in chosen]
    for index in reversed(taken):
        del refs[index]
    return refs


def key_of(ref: Any) -> bytes:
    """What no other ref in a list has; a generator's next item is not its name."""
    return getattr(ref, "_task_id", None) or ref._id  # type: ignore[no-any-return]


def _laid_out(refs: list[Any], copies: int) -> Rest:
    """A list of its own, of refs that have been checked."""
    rest = _make(Rest)
    list.extend(rest, refs)
    rest._state = rest._older = None
    rest._copies = copies
    rest.is_checked = True
    return rest


def _handed_on(remaining: Remaining) -> Rest:
    """The newest list, of refs that have been checked."""
    rest = _make(Rest)
    list.append(rest, _NOT_HERE)
    rest._state = remaining
    rest._older = None
    rest._copies = 0
    rest.is_checked = True
    return rest


def _merged(content: dict[int, Any], taken: dict[int, Any]) -> dict[int, Any]:
    """Both in the order of places."""
    if not taken:
        return content
    both = {**content, **taken}
    return {place: both[place] for place in sorted(both)}


def _reads(name: str) -> Any:
    method = getattr(list, name)

    @functools.wraps(method)
    def laid_out(self: Rest, *args: Any, **kwargs: Any) -> Any:
        if self._state is not None:
            self._lay_out()
        return method(self, *args, **kwargs)

    return laid_out


def _changes(name: str) -> Any:
    change = getattr(list, name)

    @functools.wraps(change)
    def changed(self: Rest, *args: Any, **kwargs: Any) -> Any:
        if self._state is not None:
            self._lay_out()
        self.is_checked = False
        return change(self, *args, **kwargs)

    return changed


def _of_two(name: str) -> Any:
    method = getattr(list, name)

    @functools.wraps(method)
    def of_two(self: Rest, other: Any) -> Any:
        for each in (self, other):
            if type(each) is Rest and each._state is not None:
                each._lay_out()
        return method(self, other)

    return of_two


for _name in (
    *("__contains__", "__iter__", "__mul__", "__repr__", "__reversed__", "__rmul__"),
    *("copy", "count", "index"),
    # What is different stays so:
    *("__delitem__", "clear", "pop", "remove", "reverse", "sort"),
):
    setattr(Rest, _name, _reads(_name))
for _name in ("__imul__", "__init__", "__setitem__", "insert"):
    setattr(Rest, _name, _changes(_name))
for _name in ("__add__", "__eq__", "__ge__", "__gt__", "__le__", "__lt__", "__ne__"):
    setattr(Rest, _name, _of_two(_name))
