"""Which objects a process holds, as handles and as views of memory, and what of that is news.

    made: own, unpickled ─▶ _adopted ─┐
                                      ├─▶ counts ──take_…_changes──▶ what the node is told
    died: finalizers ─────▶ dropped ──┘

What: counts handles and views per object; says what has changed since it was asked last.
Who calls: `client.py`, which is one of these; finalizers append.
May touch: nothing.
Invariants: the node counts this process once per object, from the first handle or view to the last;
a handle is counted before its death is. Finalizers only append to deques.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from poolray.direct.calls import DirectCalls
from poolray.ids import ObjectId, actor_of_handle, is_handle

T = TypeVar("T")


class References:
    """The references of one process."""

    def __init__(self) -> None:
        #: Ids of handles and views that died; drained by the next call.
        self._drops = _Dropped()
        self.dropped: deque[ObjectId] = self._drops
        #: object id -> small value that came with the item of a stream; while there are handles.
        self.prefetched: dict[ObjectId, bytes] = {}
        #: Objects that `wait` need not ask for: their values are there, and stay; while there are
        #: handles.
        self._ready: dict[ObjectId, None] = {}
        #: Ids of views of memory that died; each is in `dropped` too.
        self._unviewed: deque[ObjectId] = deque()
        #: Guards the maps and lists below, not the deques (handles are made and die on any thread).
        self._lock = threading.Lock()
        #: object id -> handles and views in this process.
        self.counts: dict[ObjectId, int] = {}
        #: object id -> how many of these are views; behind by `_dropped_views`.
        self._views: dict[ObjectId, int] = {}
        self._dropped_views: deque[ObjectId] = deque()
        #: Ids of handles made while unpickling, not counted yet: appended to without the lock, in
        #: `object_ref.py`; counted before drops are.
        self._adopted: deque[ObjectId] = deque()
        #: Objects met while unpickling that the node does not count us for yet.
        self._fresh: dict[ObjectId, None] = {}
        #: Delivered objects whose views died before the node's count was taken over.
        self._released_early: list[ObjectId] = []
        #: Questions under way whose answers count us for an actor, and actors' handles that died
        #: meanwhile: the node is told of these afterwards, unless they are ours again by then.
        self._lookups = 0
        self._postponed: list[ObjectId] = []
        #: object id -> views of what tasks have brought that the node has not been told of.
        self._fresh_views: dict[ObjectId, int] = {}
        #: Calls of actors past the node; None: this process makes none.
        self.direct: DirectCalls | None = None
        #: Held from the taking of changes to their sending: the node hears of them in their order.
        self._syncing = threading.Lock()

    def _count_adopted(self) -> None:
        """Count handles that were made while unpickling; the caller holds the lock."""
        adopted, counts, fresh = self._adopted, self.counts, self._fresh
        while True:
            try:
                object_id = adopted.popleft()
            except IndexError:
                return
            if object_id in counts:
                counts[object_id] += 1
            else:
                counts[object_id] = 1
                fresh[object_id] = None

    def _count(self, object_id: ObjectId, is_view: bool = False) -> None:
        with self._lock:
            if is_view:
                self._views[object_id] = self._views.get(object_id, 0) + 1
            count = self.counts.get(object_id, 0)
            self.counts[object_id] = count + 1
            if count == 0:
                self._fresh[object_id] = None

    def forget_fresh(self, object_id: ObjectId) -> None:
        """The node counts us for this object already (it was delivered to us)."""
        with self._lock:
            self._count_adopted()
            if object_id in self._fresh:
                del self._fresh[object_id]
            elif object_id not in self.counts:
                # Read and dropped within one call: nobody looks at it any more.
                self._released_early.append(object_id)

    @contextlib.contextmanager
    def looking_up(self) -> Iterator[None]:
        """While the node is asked for an actor, with whose answer it counts us.

        A handle to that actor may die meanwhile: told of it after its answer, the node would take
        the one that it has just given for dead.
        """
        with self._syncing, self._lock:
            self._lookups += 1
        try:
            yield
        finally:
            with self._lock:
                self._lookups -= 1
                again = []
                if not self._lookups:
                    again, self._postponed = self._postponed, []
            for object_id in again:
                self.dropped.append(object_id)

    def ring_when_dropped(self, ring: Callable[[], None]) -> None:
        """Call this when handles or views have died since the node was told last."""
        self._drops.ring = ring

    def unview(self, object_id: ObjectId) -> None:
        """This process was told where an object is, and will not look; safe in signal handlers."""
        self._unviewed.append(object_id)

    def take_view_changes(self) -> tuple[list[ObjectId], list[ObjectId]]:
        """Views that the node does not know of, and views that have died; once for each view."""
        if not self._unviewed and not self._fresh_views:
            return [], []
        with self._lock:
            fresh = self._fresh_views
            dead: list[ObjectId] = []
            while True:
                try:
                    object_id = self._unviewed.popleft()
                except IndexError:
                    break
                # Views of one object are alike: whichever died, the node need not hear of both.
                unknown = fresh.get(object_id, 0)
                if unknown > 1:
                    fresh[object_id] = unknown - 1
                elif unknown == 1:
                    del fresh[object_id]
                else:
                    dead.append(object_id)
            added = [object_id for object_id, count in fresh.items() for _ in range(count)]
            fresh.clear()
        return added, dead

    def take_reference_changes(self) -> tuple[list[ObjectId], list[ObjectId]]:
        """Objects that this process holds since the last call, and those it no longer holds."""
        if not self.dropped and not self._adopted and not self._fresh and not self._released_early:
            return [], []
        with self._lock:
            self._forget_dropped_views()
            counts, fresh, released = self.counts, self._fresh, self._released_early
            direct = self.direct
            self._released_early = []
            dropped = list(taken(self.dropped))
            # After those, before they are counted: a handle is made before it is let go of.
            self._count_adopted()
            for object_id in dropped:
                count = counts.get(object_id, 0) - 1
                if count > 0:
                    counts[object_id] = count
                elif count == 0 and self._lookups and actor_of_handle(object_id) is not None:
                    self._postponed.append(object_id)
                elif count == 0:
                    if direct is not None and direct.routes and is_handle(object_id):
                        if direct.keeps_handle(object_id):
                            continue
                        direct.gone.append(object_id)
                    del counts[object_id]
                    if self.prefetched:
                        self.prefetched.pop(object_id, None)
                    if self._ready:
                        self._ready.pop(object_id, None)
                    if object_id in fresh:
                        del fresh[object_id]  # the node never knew
                    elif (
                        direct is not None
                        and direct.unknown
                        and direct.unknown.pop(object_id, direct) is None
                    ):
                        direct.on_dropped(object_id)  # nor of this
                    else:
                        released.append(object_id)
            added = list(fresh)
            fresh.clear()
        return added, released

    def _forget_dropped_views(self) -> None:
        """Count views that have died; the caller holds the lock."""
        views = self._views
        while self._dropped_views:
            object_id = self._dropped_views.popleft()
            left = views.get(object_id, 0) - 1
            if left > 0:
                views[object_id] = left
            else:
                views.pop(object_id, None)

    def viewed_only(self, object_ids: Iterable[ObjectId]) -> list[ObjectId]:
        """Of these, the ones that this process has views of and no ref to."""
        with self._lock:
            self._forget_dropped_views()
            self._count_adopted()
            counts, views = self.counts, self._views
            return [o for o in object_ids if o in views and views[o] >= counts.get(o, 0)]

    def count_of(self, object_id: ObjectId) -> int:
        """Handles and views of an object here, those included that have died just now."""
        with self._lock:
            self._count_adopted()
            return self.counts.get(object_id, 0)

    def note_ready(self, object_ids: Iterable[ObjectId]) -> None:
        """`wait` need not ask for these any more, as long as there are handles."""
        with self._lock:
            self._ready.update((o, None) for o in object_ids if o in self.counts)


def taken(notes: deque[T]) -> Iterator[T]:
    """What finalizers have noted until now."""
    while True:
        try:
            yield notes.popleft()
        except IndexError:
            return


class _Dropped(deque[ObjectId]):
    """Notes of finalizers; the first one after each draining rings a bell.

    Memory is given back soon even if the program makes no further call.
    """

    #: Called when the first note is taken; must be safe in a finalizer.
    ring: Callable[[], None] | None = None

    def append(self, object_id: ObjectId, /) -> None:
        """Take a note."""
        super().append(object_id)
        if self.ring is not None and len(self) == 1:
            self.ring()
