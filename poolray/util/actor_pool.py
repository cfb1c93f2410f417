"""`ActorPool`: spreads calls over a fixed set of actors, one call at a time on each.

What: keeps which actor runs which call and which calls wait for an actor; hands out results in the
order of submission, or as they come.
Who calls: user code.
May touch: the public API only; no thread, no process of its own.
Invariants: an actor is idle, or runs one call, or has left the pool; a call that waits is sent as
soon as an actor is free and the caller is here (there is no thread that would do it meanwhile).
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar, final

from poolray.actor import ActorHandle
from poolray.api import get, wait
from poolray.exceptions import ActorDiedError, TaskError
from poolray.objects.object_ref import ObjectRef

V = TypeVar("V")

__all__ = ["ActorPool"]

#: Results per actor that `get_next` fetches ahead while it waits for an earlier one: enough to keep
#: the others busy beside a slow one, and a limit on the values that nobody has asked for yet.
_AHEAD_PER_ACTOR = 16


@dataclasses.dataclass(slots=True, eq=False)
class _Call(Generic[V]):
    """A call that was sent and whose result was not taken."""

    index: int
    #: What the caller's function returned: a ref, or a list of refs.
    refs: Any
    #: None: the result has come, and the actor does something else.
    actor: ActorHandle[Any] | None
    #: The result, once it was fetched ahead.
    outcome: _Outcome | None = None

    @property
    def last_ref(self) -> ObjectRef[Any]:
        """The ref whose readiness stands for the whole call's: an actor works in order."""
        return self.refs[-1] if isinstance(self.refs, list) else self.refs


@dataclasses.dataclass(frozen=True, slots=True)
class _Outcome:
    """A value, or the error to raise in its place."""

    value: Any = None
    error: BaseException | None = None


@final
class ActorPool:
    """A fixed set of actors that share calls.

    Parameters
    ----------
    actors : iterable of ActorHandle

    Notes
    -----
    One call runs on each actor at a time; the others wait in the pool. They are sent while the
    caller is in one of the pool's methods. An actor that is found dead leaves the pool. Not
    thread-safe: use a pool from one thread.

    Examples
    --------
    >>> import poolray
    >>> from poolray.util import ActorPool
    >>> @poolray.remote
    ... class Doubler:
    ...     def double(self, value: int) -> int:
    ...         return 2 * value
    >>> pool = ActorPool([Doubler.remote(), Doubler.remote()])
    >>> list(pool.map(lambda actor, value: actor.double.remote(value), [1, 2, 3, 4]))
    [2, 4, 6, 8]
    """

    def __init__(self, actors: Iterable[ActorHandle[Any]]) -> None:
        self._idle: list[ActorHandle[Any]] = list(actors)
        #: Index of a call -> the call, from its sending until its result is taken.
        self._calls: dict[int, _Call] = {}
        #: (function, value) of calls that wait for an actor, in order.
        self._waiting: deque[tuple[Callable[[Any, Any], Any], Any]] = deque()
        self._next_index = 0
        #: Index of the call whose result `get_next` gives.
        self._next_return = 0

    # ---- many calls ------------------------------------------------------------------------------

    def map(self, fn: Callable[[ActorHandle[Any], V], Any], values: Iterable[V]) -> Iterator[Any]:
        """Results of `fn(actor, value)` for each value, in the order of the values.

        Parameters
        ----------
        fn : callable
            Takes an actor and a value, returns the ref (or a list of refs) of a call of the actor.
        values : iterable
            Read to its end at once.

        Returns
        -------
        iterator
            Waits for each result as it is taken.

        Notes
        -----
        Results of earlier calls that were not taken are forgotten.
        """
        self._start_all(fn, values)
        return self._in_order()

    def map_unordered(
        self, fn: Callable[[ActorHandle[Any], V], Any], values: Iterable[V]
    ) -> Iterator[Any]:
        """The same as `map`, with results as they come.

        Examples
        --------
        >>> import poolray
        >>> from poolray.util import ActorPool
        >>> @poolray.remote
        ... class Doubler:
        ...     def double(self, value: int) -> int:
        ...         return 2 * value
        >>> pool = ActorPool([Doubler.remote(), Doubler.remote()])
        >>> results = pool.map_unordered(lambda actor, v: actor.double.remote(v), [1, 2, 3])
        >>> sorted(results)
        [2, 4, 6]
        """
        self._start_all(fn, values)
        return self._as_they_come()

    def _start_all(self, fn: Callable[[Any, Any], Any], values: Iterable[Any]) -> None:
        self._forget_earlier()
        for value in values:
            self.submit(fn, value)

    def _forget_earlier(self) -> None:
        """Let go of what was submitted; what waits is sent all the same, for it was asked for."""
        members = [*self._idle, *(call.actor for call in self._calls.values() if call.actor)]
        for (fn, value), actor in zip(self._waiting, itertools.cycle(members)):
            fn(actor, value)
        if members:
            self._waiting.clear()
        self._calls.clear()
        self._idle = members
        self._next_return = self._next_index

    def _in_order(self) -> Iterator[Any]:
        while self.has_next():
            yield self.get_next()

    def _as_they_come(self) -> Iterator[Any]:
        while self.has_next():
            yield self.get_next_unordered()

    # ---- one call --------------------------------------------------------------------------------

    def submit(self, fn: Callable[[ActorHandle[Any], V], Any], value: V) -> None:
        """Have one call run by the next free actor; its result comes from `get_next`.

        Raises
        ------
        TypeError
            `fn` returned something else than a ref or a list of refs.

        Examples
        --------
        >>> import poolray
        >>> from poolray.util import ActorPool
        >>> @poolray.remote
        ... class Doubler:
        ...     def double(self, value: int) -> int:
        ...         return 2 * value
        >>> pool = ActorPool([Doubler.remote()])
        >>> pool.submit(lambda actor, value: actor.double.remote(value), 1)
        >>> pool.submit(lambda actor, value: actor.double.remote(value), 2)
        >>> pool.get_next(), pool.get_next(), pool.has_next()
        (2, 4, False)
        """
        if self._idle:
            self._send(self._idle.pop(), fn, value)
        else:
            self._waiting.append((fn, value))

    def _send(self, actor: ActorHandle[Any], fn: Callable[[Any, Any], Any], value: Any) -> None:
        try:
            refs = fn(actor, value)
            _check_refs(refs)
        except BaseException:
            self._idle.append(actor)
            raise
        self._calls[self._next_index] = _Call(self._next_index, refs, actor)
        self._next_index += 1

    def has_next(self) -> bool:
        """Whether there are results that were not taken."""
        return bool(self._calls) or bool(self._waiting)

    def get_next(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """The next result, in the order of submission.

        Parameters
        ----------
        timeout : float, seconds, optional
            None waits for ever.
        ignore_if_timedout : bool, default False
            Give the result up when the time is over; the next call gives the one after it.

        Raises
        ------
        StopIteration
            There are no results any more.
        TimeoutError
            The time is over.
        ValueError
            `get_next_unordered` has taken results behind the one that would be next; the timeout is
            negative.
        RuntimeError
            Calls wait, and every actor of the pool has died.
        """
        self._check_next()
        if self._next_return >= self._next_index:
            raise ValueError("It is not allowed to call get_next() after get_next_unordered().")
        if timeout is not None and timeout < 0:  # `wait` is not asked where the result is known
            raise ValueError(f"The 'timeout' argument must be nonnegative. Received {timeout}")
        call = self._calls[self._next_return]
        is_late = not self._wait_for(call, timeout)
        if is_late and not ignore_if_timedout:
            raise TimeoutError("Timed out waiting for result")
        self._next_return += 1
        return self._take(call, is_late)

    def get_next_unordered(
        self, timeout: float | None = None, ignore_if_timedout: bool = False
    ) -> Any:
        """Any result, the first that comes.

        Parameters
        ----------
        timeout, ignore_if_timedout
            As in `get_next`; with the latter some result is given up.

        Raises
        ------
        StopIteration
            There are no results any more.
        TimeoutError
            The time is over.
        RuntimeError
            Calls wait, and every actor of the pool has died.
        """
        self._check_next()
        call = self._find_ready(timeout)
        is_late = call is None
        if call is None:
            if not ignore_if_timedout:
                raise TimeoutError("Timed out waiting for result")
            call = next(iter(self._calls.values()))
        self._next_return = max(self._next_return, call.index + 1)
        return self._take(call, is_late)

    def _check_next(self) -> None:
        if not self.has_next():
            raise StopIteration("No more results to get")
        if not self._calls:
            raise RuntimeError(
                f"{len(self._waiting)} call(s) wait in this ActorPool, and every actor of it has "
                "died: push() another one."
            )

    def _take(self, call: _Call, is_late: bool) -> Any:
        """The call leaves the pool; gives its value."""
        del self._calls[call.index]
        if is_late:
            if call.actor is not None:
                self._give_back(call.actor)
            raise TimeoutError(
                f"Timed out waiting for result. The task {call.refs} has been ignored."
            )
        outcome = call.outcome or self._fetch(call)
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def _fetch(self, call: _Call) -> _Outcome:
        """The call's result; its actor is free again, unless it has died."""
        actor, call.actor = call.actor, None
        assert actor is not None
        is_alive = True
        try:
            return _Outcome(get(call.refs))
        except ActorDiedError as error:
            # An error of the call itself is a TaskError too: another actor has died, not this one.
            is_alive = isinstance(error, TaskError)
            return _Outcome(error=error)
        except Exception as error:
            return _Outcome(error=error)
        finally:
            if is_alive:
                self._give_back(actor)

    # ---- waiting ---------------------------------------------------------------------------------

    def _wait_for(self, wanted: _Call, timeout: float | None) -> bool:
        """Wait for one call; actors that finish others meanwhile are given what waits."""
        if wanted.actor is None:
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            others = self._others(wanted) if self._waiting else []
            if not others and deadline is None:
                return True  # `get` will wait
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            refs = [wanted.last_ref, *(call.last_ref for call in others)]
            ready, _ = wait(refs, timeout=left)
            if not ready:
                return False
            if ready[0] is refs[0]:
                return True
            done = next(call for call in others if call.last_ref is ready[0])
            done.outcome = self._fetch(done)

    def _others(self, wanted: _Call) -> list[_Call]:
        """Calls that run beside this one, as long as few enough have been fetched ahead."""
        running = [call for call in self._calls.values() if call.actor is not None]
        ahead = len(self._calls) - len(running)
        if ahead >= _AHEAD_PER_ACTOR * len(running):
            return []
        return [call for call in running if call is not wanted]

    def _find_ready(self, timeout: float | None) -> _Call | None:
        for call in self._calls.values():
            if call.actor is None:
                return call
        calls = {call.last_ref: call for call in self._calls.values()}
        ready, _ = wait(list(calls), timeout=timeout)
        return calls[ready[0]] if ready else None

    # ---- members ---------------------------------------------------------------------------------

    def _give_back(self, actor: ActorHandle[Any]) -> None:
        if self._waiting:
            self._send(actor, *self._waiting.popleft())
        else:
            self._idle.append(actor)

    def has_free(self) -> bool:
        """Whether an actor is idle and no call waits."""
        return bool(self._idle) and not self._waiting

    def pop_idle(self) -> ActorHandle[Any] | None:
        """Take an idle actor out of the pool; None when there is none.

        Examples
        --------
        >>> import poolray
        >>> from poolray.util import ActorPool
        >>> @poolray.remote
        ... class Idle: ...
        >>> actor = Idle.remote()
        >>> pool = ActorPool([actor])
        >>> pool.pop_idle() == actor, pool.pop_idle()
        (True, None)
        >>> pool.push(actor)
        >>> pool.has_free()
        True
        """
        return self._idle.pop() if self.has_free() else None

    def push(self, actor: ActorHandle[Any]) -> None:
        """Add an actor to the pool.

        Raises
        ------
        ValueError
            It is in the pool.
        """
        busy = (call.actor for call in self._calls.values())
        if actor in self._idle or actor in busy:
            raise ValueError("Actor already belongs to current ActorPool")
        self._give_back(actor)


def _check_refs(refs: Any) -> None:
    parts = refs if isinstance(refs, list) else [refs]
    if not parts or not all(isinstance(part, ObjectRef) for part in parts):
        raise TypeError(
            "The function of an ActorPool must return the ref of a call, or a list of refs, as in "
            f"lambda actor, value: actor.method.remote(value); it returned {refs!r:.200}"
        )
