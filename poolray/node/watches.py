"""Watches: what clients wait for one after another.

    WaitObjects(watch, new ids, numbers that left) ─▶ Watch ─▶ ready numbers, lowest first
                                   objects that become ready ──┘

What: keeps, for a list from which a client takes one ref after another, who is ready; a wait tells
only what has changed since the one before.
Who calls: `node/objects.py` with requests, and with objects that become ready.
May touch: nothing.
Invariants: each object of a watch is either among the ready ones or has the watch as a waiter; a
request is answered exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import final

from poolray.ids import ClientId, ObjectId
from poolray.node.effects import Reply
from poolray.node.state import NodeState
from poolray.objects.directory import READY, ClientRecord, ObjectRecord, Request, Watch
from poolray.protocol.client import WaitObjects, WaitReply


@final
class Watches:
    """The watches of all clients."""

    __slots__ = ("_pull", "_state")

    def __init__(self, state: NodeState, pull: Callable[[ObjectId], None]) -> None:
        self._state = state
        #: Asks another node for an object's bytes.
        self._pull = pull

    def on_wait(self, client: ClientRecord, client_id: ClientId, message: WaitObjects) -> None:
        """A client waits for what is left of its list, to which it has appended some."""
        watch = client.watches.get(message.watch)
        if watch is None:
            watch = client.watches[message.watch] = Watch(client_id, message.fetch)
        for number in message.left:
            object_id = watch.object_ids.pop(number, None)
            if object_id is not None:
                self._leave(watch, object_id)
        for object_id in message.object_ids:
            watch.object_ids[watch.next_number] = object_id
            self._look(watch, watch.next_number, object_id)
            watch.next_number += 1
        request = Request(client_id, message.request_id, [], message.count, False)
        request.watch, request.ahead = watch, message.ahead
        found = self._find(watch, message.count)
        if len(found) >= min(message.count, len(watch.object_ids)):
            self._answer(request, watch, found)
            return
        request.remaining = message.count - len(found)
        watch.requests[message.request_id] = request
        client.requests[message.request_id] = request

    def on_ready(self, watch: Watch, number: int) -> None:
        """An object that the watch was a waiter of is there."""
        heappush(watch.ready, number)
        for request in list(watch.requests.values()):
            request.remaining -= 1
            if request.remaining <= 0:
                found = self._find(watch, request.count)
                if len(found) < request.count:  # some were lost again meanwhile
                    request.remaining = request.count - len(found)
                else:
                    self._answer(request, watch, found)

    def answer(self, request: Request, watch: Watch) -> None:
        """A client waits no longer: tell it what there is."""
        self._answer(request, watch, self._find(watch, request.count))

    def end(self, client: ClientRecord, numbers: Iterable[int]) -> None:
        """Lists are gone, and who waited for them."""
        for number in numbers:
            watch = client.watches.pop(number, None)
            if watch is not None:
                for request in list(watch.requests.values()):
                    self._answer(request, watch, [])
                self._forget(watch)

    def drop_client(self, client: ClientRecord) -> None:
        """A client is gone."""
        for watch in client.watches.values():
            watch.requests.clear()
            self._forget(watch)
        client.watches.clear()

    def check_invariants(self) -> None:
        """Raise AssertionError when somebody would wait in vain."""
        objects = self._state.objects
        for client in self._state.clients.values():
            for watch in client.watches.values():
                ready = dict.fromkeys(watch.ready)
                for number, object_id in watch.object_ids.items():
                    record = objects.get(object_id)
                    waiters = (record.waiters or {}) if record is not None else {}
                    assert number in ready or waiters.get(watch.waiter) == number, "it is forgotten"
                for request in watch.requests.values():
                    assert client.requests.get(request.request_id) is request

    def _forget(self, watch: Watch) -> None:
        for object_id in watch.object_ids.values():
            self._leave(watch, object_id)

    def _leave(self, watch: Watch, object_id: ObjectId) -> None:
        record = self._state.objects.get(object_id)
        if record is not None and record.waiters is not None:
            record.waiters.pop(watch.waiter, None)
            if not record.waiters:
                record.waiters = None

    def _is_ready(self, watch: Watch, record: ObjectRecord | None) -> bool:
        if record is None:
            return True  # who gets it is told that it is lost
        return record.state is READY and not (watch.fetches and record.location() is not None)

    def _look(self, watch: Watch, number: int, object_id: ObjectId) -> None:
        """An object is ready, or will tell when it is."""
        record = self._state.objects.get(object_id)
        if record is None or self._is_ready(watch, record):
            heappush(watch.ready, number)
            return
        if record.waiters is None:
            record.waiters = {watch.waiter: number}
        else:
            record.waiters[watch.waiter] = number
        if record.state is READY:
            self._pull(object_id)

    def _find(self, watch: Watch, count: int) -> list[int]:
        """The first ready numbers, no more than that many."""
        objects, ready = self._state.objects, watch.ready
        found: list[int] = []
        while ready and len(found) < count:
            number = heappop(ready)
            object_id = watch.object_ids.get(number)
            if object_id is None:
                continue  # it has left
            if self._is_ready(watch, objects.get(object_id)):
                found.append(number)
            else:  # it was lost with another node, and comes back
                self._look(watch, number, object_id)
        for number in found:
            heappush(ready, number)
        return found

    def _find_ahead(self, watch: Watch, start: int, limit: int) -> list[ObjectId]:
        """What would be found next, of values that are here to stay."""
        objects = self._state.objects
        numbers = self._find(watch, start + limit)[start:]
        object_ids = [watch.object_ids[number] for number in numbers]
        return [o for o in object_ids if (record := objects.get(o)) and record.is_here_to_stay()]

    def _answer(self, request: Request, watch: Watch, found: list[int]) -> None:
        state = self._state
        for number in found:
            record = state.objects.get(watch.object_ids[number])
            if record is not None:
                record.seen = True
        watch.requests.pop(request.request_id, None)
        client = state.clients.get(request.client_id)
        if client is not None:
            client.requests.pop(request.request_id, None)
        ahead = self._find_ahead(watch, len(found), request.ahead) if request.ahead else []
        reply = WaitReply(request_id=request.request_id, ready=found, ahead_ids=ahead)
        state.effects.append(Reply(request.client_id, reply))
