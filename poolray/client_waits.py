"""How a client waits for refs: where it looks first, and what it keeps from one wait to the next.

    wait ─▶ known to be ready? ─▶ the front, in blocks ─▶ all of them: once, or by a watch

What: finds which refs of a list are ready, so that taking them one by one costs each time the same.
Who calls: `api.py`.
May touch: the node, through the client's link; the clock.
Invariants: of those that are ready the first in the list are found; a watch goes with the list that
it is for, and the node hears of it with the next message of that client.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, final

from poolray.client_link import WatchStep
from poolray.client_rest import Remaining, Rest, left_of, without
from poolray.objects.object_ref import ObjectRef

if TYPE_CHECKING:
    from poolray.client import Client

#: Refs that a `wait` looks at before it looks at all.
_BLOCK = 64
#: Refs in a message, at the most: those of a worker must fit a packet.
_MESSAGE_REFS_MAX = 4096


class WaitOptions(NamedTuple):
    """What is waited for."""

    wanted: int  #: so many are to be ready
    timeout_s: float | None
    fetch: bool

    def since(self, started_s: float) -> WaitOptions:
        """What is left of the time."""
        if self.timeout_s is None:
            return self
        passed_s = time.monotonic() - started_s
        return self._replace(timeout_s=max(0.0, self.timeout_s - passed_s))


@final
class Watch:
    """The client's end of a record that the node keeps: it waits for all refs of a list, for those
    who take them one after another. Else each wait would tell it of all of them again.
    """

    __slots__ = ("_client", "_is_front", "_left", "_number", "_places", "fetch")

    def __init__(self, client: Client, fetch: bool) -> None:
        self._client = client
        self._number = client.next_watch()
        self.fetch = fetch
        #: number at the node -> place in the list; ascending.
        self._places: list[int] = []
        #: Numbers that have left the list, of which the node has not heard.
        self._left: list[int] = []
        #: The last wait found the first ref of the list; the next one is likely to.
        self._is_front = True

    def is_for(self, client: Client, fetch: bool) -> bool:
        """Whether a wait can use it."""
        return self._client is client and self.fetch == fetch

    def next_place(self) -> int:
        """Behind all the places that the node knows of."""
        return self._places[-1] + 1 if self._places else 0

    def note_left(self, places: Iterable[int]) -> None:
        """These have been taken."""
        known = self._places
        for place in places:
            number = bisect_left(known, place)
            if number < len(known) and known[number] == place:
                self._left.append(number)

    def wait(
        self, new: Sequence[tuple[int, Any]], options: WaitOptions, first: int = 0
    ) -> list[int]:
        """Places of ready refs, ascending, beginning with the first; `new` are looked at as well
        from now on. `first` is the place of the first of all.
        """
        start = 0
        while len(new) - start > _MESSAGE_REFS_MAX:
            part = new[start : start + _MESSAGE_REFS_MAX]
            self._ask(part, options._replace(wanted=1, timeout_s=0.0))
            start += _MESSAGE_REFS_MAX
        numbers = self._ask(new[start:], options)
        found = [self._places[number] for number in numbers]
        self._is_front = bool(found) and found[0] == first
        return found

    def _ask(self, new: Sequence[tuple[int, Any]], options: WaitOptions) -> list[int]:
        object_ids = self._client._ids_of([ref for _, ref in new])
        self._client._tell_node(object_ids)
        self._places += [place for place, _ in new]
        left, self._left = self._left, []
        step = WatchStep(self._number, left, self._is_front)
        return self._client.link.wait(
            object_ids, options.wanted, options.timeout_s, options.fetch, step
        )

    def __del__(self) -> None:
        self._client.dropped_watches.append(self._number)


def _ask(client: Client, refs: Sequence[Any], options: WaitOptions) -> list[int]:
    """Indexes of ready refs, ascending, of a list of which all is told."""
    object_ids, direct, wanted = client._ids_of(refs), client.direct, options.wanted
    if direct is not None and direct.unknown:
        known = sum(map(direct.unknown.__contains__, object_ids))
        if known == len(object_ids):
            started_s = time.monotonic()
            own = direct.ready(object_ids, wanted, options.timeout_s)
            if own is not None:
                return own[:wanted]
            options = options.since(started_s)
        if known:
            client._tell_node(object_ids)
    ready = client.link.wait(object_ids, wanted, options.timeout_s, options.fetch)
    return ready[:wanted]


def wait_for_rest(
    client: Client, remaining: Remaining, options: WaitOptions
) -> dict[int, ObjectRef[Any]]:
    """Ready refs of a list that is not laid out, with their places."""
    count = options.wanted
    client.sync_references()
    watch: Watch | None = remaining.watch
    if watch is None or not watch.is_for(client, options.fetch):
        if count <= _BLOCK:
            front = remaining.front(_BLOCK)
            ready = _ask(client, [ref for _, ref in front], options._replace(timeout_s=0.0))
            if len(ready) >= count:
                return dict(front[index] for index in ready)
        if client.direct is not None and client.direct.unknown:
            items = remaining.after(0)
            object_ids = client._ids_of([ref for _, ref in items])
            if all(map(client.direct.unknown.__contains__, object_ids)):
                started_s = time.monotonic()
                own = client.direct.ready(object_ids, count, options.timeout_s)
                if own is not None:
                    return dict(items[index] for index in own[:count])
                options = options.since(started_s)
        watch = Watch(client, options.fetch)
    remaining.watch = None  # should we be interrupted, nobody knows what the node has heard
    new = remaining.after(watch.next_place())
    places = watch.wait(new, options, remaining.front(1)[0][0])
    # (What a generator's next item is called changes.)
    if all(type(ref) is ObjectRef for _, ref in new):
        remaining.watch = watch
    return {place: remaining.refs[place] for place in places[:count]}


def wait_for_list(client: Client, refs: list[Any], options: WaitOptions) -> list[int]:
    """Indexes of ready refs, ascending."""
    ready_ids, count = client._ready, options.wanted
    if ready_ids and all(ref._id in ready_ids for ref in refs[:count]):
        return list(range(count))  # what was dropped is told at a later call
    client.sync_references()
    # Who takes thousands of refs one by one finds the next one near the front, mostly: these
    # are looked at first, a few, then more, so that a call does not cost what all of them cost.
    start, size = 0, _BLOCK
    found: list[int] = []
    while len(found) < count and start + 2 * size < len(refs) and size <= _MESSAGE_REFS_MAX:
        wanted = count - len(found)
        if wanted > size:
            break
        now = options._replace(wanted=wanted, timeout_s=0.0)
        found.extend(start + index for index in _ask(client, refs[start : start + size], now))
        start, size = start + size, 2 * size
    if len(found) >= count:
        return found
    if len(refs) <= _MESSAGE_REFS_MAX:
        return _ask(client, refs, options)
    return Watch(client, options.fetch).wait(list(enumerate(refs)), options)[:count]


def wait_and_rest(
    client: Client, refs: list[Any], options: WaitOptions
) -> tuple[list[Any], list[Any]]:
    """What `wait` gives: the ready ones, and the others."""
    if type(refs) is not Rest:
        ready = wait_for_list(client, refs, options)
        return [refs[index] for index in ready], without(refs, ready)
    if client._ready:
        found = refs.take_ready(options.wanted, client._ready)
        if found is not None:
            return found  # what was dropped is told at a later call
    remaining = refs.remaining()
    if remaining is None:
        others = refs.as_list()
        ready = wait_for_list(client, others, options)
        chosen = [others[index] for index in ready]
        return chosen, refs.follow(left_of(others, ready))
    try:
        taken = wait_for_rest(client, remaining, options)
        return list(taken.values()), refs.without(remaining, taken)
    finally:
        remaining.waits = False
