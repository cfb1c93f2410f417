"""What a Pool or an Executor is made of on a cluster: actors instead of workers of this process.

    Pool, Executor ──calls──▶ ClusterCalls ──methods──▶ _PoolWorker: actors, on all nodes
                   ◀─results── receivers  ◀──objects──┘

What: the same as `local/calls.py`: functions made known once, calls given to workers with room,
results handed to receivers.
Who calls: `pool.py`, `executor.py`, when they are given an address.
May touch: what the driver's runtime touches.
Invariants: a worker runs one call at a time; short calls wait with it a few at a time, long ones
never behind another, one whose time is limited neither before nor behind; each receiver gets
exactly one result; whoever leaves politely has been wound up.
"""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing.context
import os
import pickle
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, final

from poolray import api, cluster_connection
from poolray.client_functions import function_id_of
from poolray.cluster_insights import Measures, PoolWatch, WorkerWatch
from poolray.cluster_state import cluster_resources
from poolray.exceptions import (
    ActorError,
    CallTimeoutError,
    ClusterConnectionError,
    NotSupportedError,
    PoolrayError,
)
from poolray.local.fork_server import WorkerExtras
from poolray.local.reactor import Waitable
from poolray.objects.serialization import Serialized, Serializer, deserialize
from poolray.protocol.values import CallKind

if TYPE_CHECKING:
    from poolray.cluster.driver import DriverRuntime
    from poolray.local.pool_insights import PoolInsights
    from poolray.objects.object_ref import ObjectRef

#: Calls that are with one worker at a time, at the most.
_WINDOW_MAX = 64
#: Work that may wait with a worker: hides the way there and back.
_AHEAD_S = 5e-3
#: Longer calls never wait behind another one.
_PREFETCH_BELOW_S = 20e-3
_NEW_WEIGHT = 0.2


class _PoolWorker:
    """The actor that stands for a worker process."""

    def __init__(self, initializer: bytes, arguments: bytes, extras: bytes) -> None:
        self._functions: dict[bytes, Callable[..., Any]] = {}
        self._failure = b""
        #: What each call is given before its own arguments: the state, if there is one.
        self._given: tuple[Any, ...] = ()
        self._exit: Callable[..., Any] | None = None
        #: How long what takes, where somebody wants to know.
        self._measures: Measures | None = None
        try:
            if extras:
                make_state, init, self._exit, measures = deserialize(extras, True)
                self._measures = Measures() if measures else None
            if initializer:
                deserialize(initializer, True)(*deserialize(arguments, True))
            if extras:
                if make_state is not None:
                    self._given = (make_state(),)
                if init is not None:
                    init(*self._given)
        except BaseException as error:
            from poolray.local import worker_errors

            self._failure = worker_errors.encode_plain(error)
        if self._measures is not None:
            self._measures.on_ready()

    def facts(self) -> tuple[Any, ...]:
        """What it has done with its time."""
        assert self._measures is not None
        return self._measures.facts()

    def pid(self) -> int:
        """The process that it is."""
        return os.getpid()

    def wind_up(self) -> Any:
        """The worker leaves: (whether it is a result, as opposed to an error; what it left)."""
        began_s = time.perf_counter()
        left = None if self._exit is None or self._failure else self._leave(self._exit)
        if self._measures is None:
            return left
        if left is not None:
            self._measures.on_exit(time.perf_counter() - began_s)
        return left, self._measures.facts()

    def _leave(self, leave: Callable[..., Any]) -> tuple[bool, bytes]:
        from poolray.local import worker_errors

        try:
            serializer = Serializer(main_definitions={}, out_of_band_all=False, modules=frozenset())
            return True, _flat(serializer.dumps(leave(*self._given)))
        except BaseException as error:
            traceback.print_exc()
            return False, worker_errors.encode_plain(error)

    def run(
        self,
        key: bytes,
        function: bytes,
        kind: int,
        payload: bytes,
        refs: list[Any],
        limit_s: float = 0.0,
    ) -> Any:
        """Run one call; one that takes longer than its limit is the end of this process.

        Returns
        -------
        success : bool
        value : Any
            The call's value; without success the encoded exception.
        elapsed_s : float
            With measures these three are the first of two values; the others are the facts.
        """
        result = self._run(key, function, kind, payload, limit_s)
        return result if self._measures is None else (result, self._measures.facts())

    def _run(
        self, key: bytes, function: bytes, kind: int, payload: bytes, limit_s: float
    ) -> tuple[bool, Any, float]:
        from poolray.local import worker_errors

        if self._failure:
            return False, self._failure, 0.0
        started_s = time.perf_counter()
        try:
            with _Limit(limit_s):
                value = self._call(key, function, kind, payload)
            return True, value, time.perf_counter() - started_s
        except Exception as error:
            return False, worker_errors.encode_plain(error), time.perf_counter() - started_s

    def _call(self, key: bytes, function: bytes, kind: int, payload: bytes) -> Any:
        call = self._functions.get(key)
        if call is None and key:
            call = self._functions[key] = self._dressed(deserialize(function, True))
        arguments = deserialize(payload, True)
        if kind == CallKind.APPLY:
            call, args, kwargs = arguments
            return self._dressed(call)(*args, **kwargs)
        assert call is not None
        if kind == CallKind.CALL:
            args, kwargs = arguments
            return call(*args, **kwargs)
        if kind == CallKind.MAP:
            return list(map(call, arguments))
        return [call(*each) for each in arguments]

    def _dressed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        call = functools.partial(call, *self._given) if self._given else call
        return call if self._measures is None else self._measures.dress(call)


@final
class _Limit:
    """Ends this process when what is inside takes longer: also where it never lets others run."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s

    def __enter__(self) -> None:
        if self._limit_s:
            self._nowhere = open(os.devnull, "w")
            # A thread that needs no lock of the interpreter, and no cooperation of the call.
            faulthandler.dump_traceback_later(self._limit_s, exit=True, file=self._nowhere)

    def __exit__(self, *_: object) -> None:
        if self._limit_s:
            faulthandler.cancel_dump_traceback_later()
            self._nowhere.close()


class _Worker:
    """An actor as the driver sees it."""

    __slots__ = ("actor", "calls_left", "elapsed_s", "is_exclusive", "under_way", "watch")

    def __init__(self, actor: Any, calls_left: int, watch: WorkerWatch | None = None) -> None:
        self.actor = actor
        #: Told what it does with its time, if somebody wants to know.
        self.watch = watch
        #: Calls that it may still be given; below 0: any number.
        self.calls_left = calls_left
        #: It is at a call whose time is limited: its end may be the end of the process.
        self.is_exclusive = False
        #: Calls that have not come back.
        self.under_way = 0
        #: How long its calls take, about; None: none has come back.
        self.elapsed_s: float | None = None

    def window(self) -> int:
        """How many calls may be with it at a time."""
        if self.is_exclusive:
            return self.under_way
        if self.elapsed_s is None or self.elapsed_s > _PREFETCH_BELOW_S:
            wanted = 1
        else:
            wanted = min(_WINDOW_MAX, 2 + int(_AHEAD_S / max(self.elapsed_s, 1e-6)))
        return wanted if self.calls_left < 0 else min(wanted, self.under_way + self.calls_left)


class _Host:
    """What `repr` and tests ask of the workers."""

    def __init__(self, workers: list[_Worker]) -> None:
        self.workers = dict(enumerate(workers))


@final
class ClusterHandle(Waitable):
    """The group of workers, as faces hold it."""

    __slots__ = ("error", "host", "on_failed", "serializer")

    def __init__(self, workers: list[_Worker], serializer: Serializer) -> None:
        super().__init__()
        self.host = _Host(workers)
        self.serializer = serializer
        self.error: bytes | None = None
        self.on_failed: Callable[[bytes], None] | None = None


@final
class ClusterStream:
    """Calls of one function."""

    __slots__ = ("_calls", "function", "key", "kind", "limit_s", "name")

    def __init__(
        self,
        calls: ClusterCalls,
        kind: CallKind,
        key: bytes,
        function: Any,
        name: str = "",
        limit_s: float = 0.0,
    ) -> None:
        self._calls = calls
        self.name = name
        #: How long a call may run, from its beginning; 0: without end.
        self.limit_s = limit_s
        self.kind = kind
        self.key = key
        #: A ref to the serialized function, or empty bytes where calls bring theirs.
        self.function = function

    def add(self, payload: bytes, receiver: Any) -> None:
        """One more call."""
        self._calls.submit(self, payload, receiver)

    def add_many(self, payloads: list[bytes], receivers: list[Any]) -> None:
        """Many calls at once."""
        for payload, receiver in zip(payloads, receivers):
            self._calls.submit(self, payload, receiver)

    def add_large(self, payload: bytes | Serialized, receiver: Any) -> None:
        """A call with large arguments."""
        self._calls.submit(self, payload, receiver)


@final
class _Result:
    """What has come of a call."""

    __slots__ = ("ref", "reply")

    def __init__(self, ref: ObjectRef[Any], reply: Any) -> None:
        self.ref = ref
        self.reply = reply


@final
class ClusterRuntime:
    """The part of a runtime that Pool and Executor use, on a cluster."""

    def __init__(self, connection: DriverRuntime) -> None:
        self.connection = connection
        self.config = connection.config
        self.reactor = connection.reactor
        self.guard = connection.guard
        self.pid = connection.pid
        self.later = connection.later
        self.callbacks = connection.callbacks
        #: There are none: each call goes out, or waits here, at once.
        self.open_batches: dict[Any, None] = {}
        self.calls: ClusterCalls | None = None

    @property
    def closed(self) -> bool:
        """Whether the connection was shut down."""
        return self.connection.closed

    @property
    def ended(self) -> str:
        """What has become of it, as a verb."""
        return self.connection.ended or "has been shut down"

    def in_this_process(self) -> bool:
        """False in a fork of the process that made it."""
        return cluster_connection.runtime() is self.connection

    def flush_batches(self) -> None:
        """Nothing is collected."""

    def close_group(self, handle: ClusterHandle) -> None:
        """All calls are done: the workers end."""
        if self.calls is not None:
            self.calls.end(kill=False)

    def terminate_group(self, handle: ClusterHandle) -> None:
        """The workers end at once."""
        if self.calls is not None:
            self.calls.end(kill=True)

    def wait_group_ended(self, handle: ClusterHandle, timeout_s: float | None = None) -> bool:
        """Until the group has ended."""
        return self.reactor.wait(handle, timeout_s)

    def worker_pids(self, handle: ClusterHandle) -> list[int]:
        """Process ids of the workers, on whatever machines they are."""
        workers = list(handle.host.workers.values())
        found: list[int] = api.get([worker.actor.pid.remote() for worker in workers])
        return found


@final
class ClusterCalls:
    """Calls of one Pool or Executor."""

    def __init__(
        self,
        runtime: ClusterRuntime,
        handle: ClusterHandle,
        workers: list[_Worker],
        cancellable: bool,
        make_worker: Callable[[], _Worker],
        max_retries: int,
        has_exit: bool,
        watch: PoolWatch | None,
    ) -> None:
        self.runtime = runtime
        self.handle = handle
        self.inline_max_bytes = runtime.config.inline_max_bytes
        self._workers = workers
        self._cancellable = cancellable
        self._make_worker = make_worker
        self._max_retries = max_retries
        self._has_exit = has_exit
        #: What workers do with their time; None: nobody wants to know.
        self._watch = watch
        #: Workers that wind up.
        self._leaving = 0
        #: What those that have done so left: (whether it is a result; bytes).
        self._exits: list[tuple[bool, bytes]] = []
        #: The last is how often it was tried before.
        self._waiting: deque[tuple[ClusterStream, bytes | Serialized, Any, int]] = deque()
        #: (function id, kind, limit) -> stream.
        self._streams: dict[tuple[bytes, CallKind, float], ClusterStream] = {}
        self._apply = ClusterStream(self, CallKind.APPLY, b"", b"")
        self._ended = False
        self._pumping = False

    # ---- what faces ask --------------------------------------------------------------------------

    def dumps(self, value: object) -> bytes | Serialized:
        """Serialize something for the workers."""
        return self.handle.serializer.dumps(value)

    def dumps_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | Serialized:
        """Serialize the arguments of a call for the workers."""
        return self.handle.serializer.dumps_call(args, kwargs)

    def stream(
        self, function: Callable[..., Any], kind: CallKind, limit_s: float = 0.0
    ) -> ClusterStream:
        """Calls of a function; each may run for `limit_s`, if that is not 0.

        Raises
        ------
        TypeError, pickle.PicklingError, AttributeError
            It cannot be serialized.
        """
        data, _ = self.handle.serializer.dumps_function(function)
        blob = data if isinstance(data, bytes) else data.to_bytes()
        key = function_id_of(blob)
        found = self._streams.get((key, kind, limit_s))
        if found is None:
            function_ref = self.runtime.connection.client.put(blob)
            name = getattr(function, "__name__", repr(function))
            found = ClusterStream(self, kind, key, function_ref, name, limit_s)
            self._streams[key, kind, limit_s] = found
        return found

    limited_stream = stream

    def limited_apply_stream(self, limit_s: float) -> ClusterStream:
        """Calls that bring their callable along, and may take so long."""
        return ClusterStream(self, CallKind.APPLY, b"", b"", "apply", limit_s)

    def exits(self) -> list[tuple[bool, bytes]]:
        """What workers have left: (whether it is a result, as opposed to an error; bytes)."""
        return list(self._exits)

    def insights(self, *_: object) -> PoolInsights:
        """What the workers have done with their time (they have been made to measure it)."""
        assert self._watch is not None
        return self._watch.insights()

    def apply_stream(self) -> ClusterStream:
        """Calls that bring their callable along."""
        return self._apply

    def submit(self, stream: ClusterStream, payload: bytes | Serialized, receiver: Any) -> None:
        """One more call."""
        self._waiting.append((stream, payload, receiver, 0))
        self._pump()

    def drain(self) -> list[Any]:
        """Receivers of calls that no worker has been given; they will not be."""
        receivers = [receiver for _, _, receiver, _ in self._waiting]
        self._waiting.clear()
        return receivers

    def load(self, result: Any) -> tuple[bool, Any]:
        """A result: (True, value), or (False, what went wrong)."""
        if not isinstance(result, _Result):
            return False, result
        error, value = self.runtime.connection.client.read_reply(result.reply, result.ref, True)
        if error is not None:
            return False, error
        success, content, _ = value
        return success, content if success else pickle.loads(content)

    # ---- workers ---------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Give workers what they have room for."""
        if self._pumping:
            return  # a call that failed at once: whoever pumps goes on
        self._pumping = True
        try:
            while self._waiting and not self._ended:
                worker = min(self._workers, key=lambda each: each.under_way - each.window())
                if worker.under_way >= worker.window():
                    return
                try:
                    stream, payload, receiver, tried = self._waiting.popleft()
                except IndexError:
                    return  # another thread was faster
                if stream.limit_s and worker.under_way:
                    idle = [each for each in self._workers if each.window() > each.under_way == 0]
                    if not idle:
                        self._waiting.appendleft((stream, payload, receiver, tried))
                        return
                    worker = idle[0]
                if self._cancellable and not tried and not receiver.begin():
                    continue
                self._send(worker, stream, payload, receiver, tried)
        finally:
            self._pumping = False

    def _send(
        self,
        worker: _Worker,
        stream: ClusterStream,
        payload: bytes | Serialized,
        receiver: Any,
        tried: int,
    ) -> None:
        client = self.runtime.connection.client
        refs: list[Any] = []
        if isinstance(payload, Serialized):
            refs = [client.adopt(object_id) for object_id in dict.fromkeys(payload.refs)]
            frame = bytearray(payload.size_bytes)
            payload.write_into(memoryview(frame))
            payload = bytes(frame)
        run, watch, facts_ref = worker.actor.run, worker.watch, None
        if stream.limit_s:  # whether it is tried again is decided here
            run = run.options(max_task_retries=0)
        if watch is not None:
            run = run.options(num_returns=2)
        try:
            ref = run.remote(
                stream.key, stream.function, int(stream.kind), payload, refs, stream.limit_s
            )
            if watch is not None:
                ref, facts_ref = ref
        except PoolrayError as error:
            receiver.on_result(error)
            return
        sent_s = time.monotonic()
        worker.under_way += 1
        worker.calls_left -= 1 if worker.calls_left > 0 else 0
        worker.is_exclusive = bool(stream.limit_s)

        def arrive(reply: Any) -> None:
            worker.under_way -= 1
            worker.is_exclusive = False
            if watch is not None:
                watch.expect(self.runtime.connection.client, facts_ref)
            error = self._loss(ref, reply) if stream.limit_s and reply.errors else None
            if error is not None:
                self._replace(worker, politely=False)
                self._on_lost(stream, payload, receiver, tried, error, time.monotonic() - sent_s)
            else:
                receiver.on_result(_Result(ref, reply))
                self._note_time(worker, reply)
                if worker.calls_left == 0 and worker.under_way == 0:
                    self._replace(worker, politely=True)
            self._pump()

        client.link.when_ready(ref._id, arrive)

    def _loss(self, ref: ObjectRef[Any], reply: Any) -> ActorError | None:
        """The error of a call whose worker has ended; None: it has ended itself."""
        error, _ = self.runtime.connection.client.read_reply(reply, ref, True)
        return error if isinstance(error, ActorError) else None

    def _on_lost(
        self,
        stream: ClusterStream,
        payload: bytes | Serialized,
        receiver: Any,
        tried: int,
        error: ActorError,
        elapsed_s: float,
    ) -> None:
        """A call of limited time was lost with its worker."""
        if elapsed_s >= stream.limit_s:
            pid = getattr(error, "pid", 0)
            name, limit_s = stream.name, stream.limit_s
            receiver.on_result(CallTimeoutError(task_name=name, timeout_s=limit_s, pid=pid))
        elif self._max_retries < 0 or tried < self._max_retries:
            self._waiting.appendleft((stream, payload, receiver, tried + 1))
        else:
            receiver.on_result(error)

    def _replace(self, worker: _Worker, politely: bool) -> None:
        """Another worker takes the place of one that has run its calls, or is dead."""
        if self._ended:
            return
        index = self._workers.index(worker)
        self._workers[index] = self.handle.host.workers[index] = self._make_worker()
        self._let_go(worker, kill=not politely)

    def _let_go(self, worker: _Worker, kill: bool) -> None:
        from poolray.actor import kill as kill_actor

        actor, worker.actor = worker.actor, None  # the last handle: it ends after its calls
        watch = worker.watch
        if watch is not None and self._watch is not None:
            self._watch.end(watch)
        if kill:
            kill_actor(actor)
        elif self._has_exit or watch is not None:
            self._leaving += 1
            wind_up = actor.wind_up if watch is None else actor.wind_up.options(num_returns=2)
            found = wind_up.remote()
            ref = found if watch is None else found[0]

            def arrive(reply: Any) -> None:
                if watch is not None:
                    watch.expect(self.runtime.connection.client, found[1])
                self._leaving -= 1
                error, left = self.runtime.connection.client.read_reply(reply, ref, True)
                if error is None and left is not None:
                    self._exits.append(left)
                if self._ended and not self._leaving:
                    self.handle.finish()

            self.runtime.connection.client.link.when_ready(ref._id, arrive)

    def _note_time(self, worker: _Worker, reply: Any) -> None:
        """How long its calls take: told by small results only, which are read at no cost."""
        value = reply.values[0] if reply.values else b""
        if reply.errors or not isinstance(value, bytes):
            worker.elapsed_s = _PREFETCH_BELOW_S * 2
            return
        try:
            elapsed_s = deserialize(value)[2]
        except Exception:
            return  # its reader will say what is wrong with it
        known = worker.elapsed_s
        if known is not None:
            elapsed_s = known + _NEW_WEIGHT * (elapsed_s - known)
        worker.elapsed_s = elapsed_s

    def end(self, kill: bool) -> None:
        """The workers go."""
        if self._ended:
            return
        self._ended = True
        for worker in self._workers:
            try:
                self._let_go(worker, kill)
            except ClusterConnectionError:
                self._leaving = 0
                break  # the cluster is gone, and they with it
        self._waiting.clear()
        if kill or not self._leaving:
            self.handle.finish()


# ---- making --------------------------------------------------------------------------------------


def connect(address: str) -> DriverRuntime:
    """The connection to a cluster; made where there is none.

    Raises
    ------
    ValueError
        This process is connected to another cluster already.
    ConnectionError, AuthenticationError
        There is no cluster, or it does not let us in.
    """
    cluster_connection.outside_address(address)  # what is wrong with its form is said first
    found = cluster_connection.runtime()
    if found is None:
        api.init(address=address)
        found = cluster_connection.runtime()
        if found is None:
            raise ValueError(f"address={address!r} names no cluster: leave it out")
    elif address not in ("auto", found.welcome.head_address, found.address):
        raise ValueError(
            f"This process works on the cluster at {found.welcome.head_address} already: call "
            f"shutdown() before you use the one at {address}."
        )
    return found


def cluster_size(address: str) -> int:
    """How many workers a cluster has room for: one per CPU.

    Raises
    ------
    ConnectionError, AuthenticationError
        There is no cluster, or it does not let us in.
    """
    connect(address)
    return max(1, int(cluster_resources().get("CPU", 0)))


def make_calls(
    *,
    address: str,
    processes: int,
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
    max_retries: int | None,
    name: str,
    cancellable: bool = False,
    context: Any = None,
    max_tasks: int = 0,
    extras: WorkerExtras | None = None,
) -> ClusterCalls:
    """Workers on a cluster for a Pool or an Executor.

    Raises
    ------
    NotSupportedError
        The context asks for forks of this process.
    ValueError
        More workers than the cluster has CPUs.
    ConnectionError, AuthenticationError
        There is no cluster, or it does not let us in.
    """
    check_context(context)
    runtime = ClusterRuntime(connect(address))
    cpus = int(cluster_resources().get("CPU", 0))
    if processes > cpus:
        raise ValueError(
            f"Tried to start a pool with {processes} processes on an existing cluster, but the "
            f"cluster only has {cpus} CPUs."
        )
    serializer = Serializer(
        main_definitions={},
        out_of_band_all=False,
        shared_globals=name,
        modules=frozenset(sys.builtin_module_names),
    )
    prepared = b"", b""
    if initializer is not None:
        prepared = (
            _flat(serializer.dumps_function(initializer)[0]),
            _flat(serializer.dumps(initargs)),
        )
    wanted = b""
    if extras is not None:
        wanted = _flat(
            serializer.dumps((extras.make_state, extras.init, extras.exit, extras.measures))
        )
    retries = runtime.config.max_retries if max_retries is None else max_retries
    worker_class = api.remote(
        num_cpus=1, max_restarts=-1 if retries else 0, max_task_retries=retries
    )(_PoolWorker)

    watch = PoolWatch() if extras is not None and extras.measures else None

    def make_worker() -> _Worker:
        begun = None if watch is None else watch.begin()
        actor = worker_class.remote(*prepared, wanted)
        if begun is not None:
            begun.expect(runtime.connection.client, actor.facts.remote())
        return _Worker(actor, max_tasks or -1, begun)

    workers = [make_worker() for _ in range(processes)]
    handle = ClusterHandle(workers, serializer)
    has_exit = extras is not None and extras.exit is not None
    runtime.calls = ClusterCalls(
        runtime, handle, workers, cancellable, make_worker, retries, has_exit, watch
    )
    return runtime.calls


def check_context(context: Any) -> None:
    """Refuse what workers on other machines cannot be: forks of this process.

    Raises
    ------
    NotSupportedError
        It is the context of the start method "fork".
    """
    if isinstance(context, multiprocessing.context.ForkContext):
        raise NotSupportedError(
            'With an address the workers cannot be forks of this process: leave the "fork" context '
            'out, or give a "spawn" one. Functions bring along what they refer to.'
        )


def _flat(data: bytes | Serialized) -> bytes:
    return data if isinstance(data, bytes) else data.to_bytes()
