"""What a Pool or an Executor is made of on a cluster: actors instead of workers of this process.

    Pool, Executor ──calls──▶ ClusterCalls ──methods──▶ _PoolWorker: actors, on all nodes
                   ◀─results── receivers  ◀──objects──┘

What: the same as `local/calls.py`: functions made known once, calls given to workers with room,
results handed to receivers.
Who calls: `pool.py`, `executor.py`, when they are given an address.
May touch: what the driver's runtime touches.
Invariants: a worker runs one call at a time; short calls wait with it a few at a time, long ones
never behind another; each receiver gets exactly one result.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, final

from poolray import api, cluster_connection
from poolray.client_functions import function_id_of
from poolray.cluster_state import cluster_resources
from poolray.exceptions import ClusterConnectionError, NotSupportedError, PoolrayError
from poolray.local.reactor import Waitable
from poolray.objects.serialization import Serialized, Serializer, deserialize
from poolray.protocol.values import CallKind

if TYPE_CHECKING:
    from poolray.cluster.driver import DriverRuntime
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

    def __init__(self, initializer: bytes, arguments: bytes) -> None:
        self._functions: dict[bytes, Callable[..., Any]] = {}
        self._failure = b""
        if initializer:
            from poolray.local import worker_errors

            try:
                deserialize(initializer, True)(*deserialize(arguments, True))
            except BaseException as error:
                self._failure = worker_errors.encode_plain(error)

    def pid(self) -> int:
        """The process that it is."""
        import os

        return os.getpid()

    def run(
        self, key: bytes, function: bytes, kind: int, payload: bytes, refs: list[Any]
    ) -> tuple[bool, Any, float]:
        """Run one call.

        Returns
        -------
        success : bool
        value : Any
            The call's value; without success the encoded exception.
        elapsed_s : float
        """
        from poolray.local import worker_errors

        if self._failure:
            return False, self._failure, 0.0
        started_s = time.perf_counter()
        try:
            call = self._functions.get(key)
            if call is None and key:
                call = self._functions[key] = deserialize(function, True)
            arguments = deserialize(payload, True)
            if kind == CallKind.CALL:
                args, kwargs = arguments
                assert call is not None
                value: Any = call(*args, **kwargs)
            elif kind == CallKind.APPLY:
                call, args, kwargs = arguments
                value = call(*args, **kwargs)
            elif kind == CallKind.MAP:
                assert call is not None
                value = list(map(call, arguments))
            else:
                assert call is not None
                value = [call(*each) for each in arguments]
            return True, value, time.perf_counter() - started_s
        except Exception as error:
            return False, worker_errors.encode_plain(error), time.perf_counter() - started_s


class _Worker:
    """An actor as the driver sees it."""

    __slots__ = ("actor", "elapsed_s", "under_way")

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        #: Calls that have not come back.
        self.under_way = 0
        #: How long its calls take, about; None: none has come back.
        self.elapsed_s: float | None = None

    def window(self) -> int:
        """How many calls may be with it at a time."""
        if self.elapsed_s is None or self.elapsed_s > _PREFETCH_BELOW_S:
            return 1
        return min(_WINDOW_MAX, 2 + int(_AHEAD_S / max(self.elapsed_s, 1e-6)))


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

    __slots__ = ("_calls", "function", "key", "kind")

    def __init__(self, calls: ClusterCalls, kind: CallKind, key: bytes, function: Any) -> None:
        self._calls = calls
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
    ) -> None:
        self.runtime = runtime
        self.handle = handle
        self.inline_max_bytes = runtime.config.inline_max_bytes
        self._workers = workers
        self._cancellable = cancellable
        self._waiting: deque[tuple[ClusterStream, bytes | Serialized, Any]] = deque()
        #: (function id, kind) -> stream.
        self._streams: dict[tuple[bytes, CallKind], ClusterStream] = {}
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

    def stream(self, function: Callable[..., Any], kind: CallKind) -> ClusterStream:
        """Calls of a function.

        Raises
        ------
        TypeError, pickle.PicklingError, AttributeError
            It cannot be serialized.
        """
        data, _ = self.handle.serializer.dumps_function(function)
        blob = data if isinstance(data, bytes) else data.to_bytes()
        key = function_id_of(blob)
        found = self._streams.get((key, kind))
        if found is None:
            function_ref = self.runtime.connection.client.put(blob)
            found = self._streams[key, kind] = ClusterStream(self, kind, key, function_ref)
        return found

    def limited_stream(self, *_: object) -> ClusterStream:
        """Calls that may take so long.

        Raises
        ------
        NotSupportedError
            On a cluster, by this version.
        """
        raise NotSupportedError(
            "timeout= of single calls is not supported by this version of poolray on clusters."
        )

    limited_apply_stream = limited_stream

    def apply_stream(self) -> ClusterStream:
        """Calls that bring their callable along."""
        return self._apply

    def submit(self, stream: ClusterStream, payload: bytes | Serialized, receiver: Any) -> None:
        """One more call."""
        self._waiting.append((stream, payload, receiver))
        self._pump()

    def drain(self) -> list[Any]:
        """Receivers of calls that no worker has been given; they will not be."""
        receivers = [receiver for _, _, receiver in self._waiting]
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
                    stream, payload, receiver = self._waiting.popleft()
                except IndexError:
                    return  # another thread was faster
                if self._cancellable and not receiver.begin():
                    continue
                self._send(worker, stream, payload, receiver)
        finally:
            self._pumping = False

    def _send(
        self, worker: _Worker, stream: ClusterStream, payload: bytes | Serialized, receiver: Any
    ) -> None:
        client = self.runtime.connection.client
        refs: list[Any] = []
        if isinstance(payload, Serialized):
            refs = [client.adopt(object_id) for object_id in dict.fromkeys(payload.refs)]
            frame = bytearray(payload.size_bytes)
            payload.write_into(memoryview(frame))
            payload = bytes(frame)
        try:
            ref = worker.actor.run.remote(
                stream.key, stream.function, int(stream.kind), payload, refs
            )
        except PoolrayError as error:
            receiver.on_result(error)
            return
        worker.under_way += 1

        def arrive(reply: Any) -> None:
            worker.under_way -= 1
            receiver.on_result(_Result(ref, reply))
            self._note_time(worker, reply)
            self._pump()

        client.link.when_ready(ref._id, arrive)

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
        from poolray.actor import kill as kill_actor

        for worker in self._workers:
            try:
                if kill:
                    kill_actor(worker.actor)
                worker.actor = None  # the last handle: it ends after its calls
            except ClusterConnectionError:
                break  # the cluster is gone, and they with it
        self._waiting.clear()
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
    cluster_connection.check_address(address)
    found = cluster_connection.runtime()
    if found is None:
        api.init(address=address)
        found = cluster_connection.runtime()
        if found is None:
            raise ValueError(f"address={address!r} names no cluster: leave it out")
    elif address not in ("auto", found.welcome.head_address):
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
) -> ClusterCalls:
    """Workers on a cluster for a Pool or an Executor.

    Raises
    ------
    ValueError
        More workers than the cluster has CPUs.
    ConnectionError, AuthenticationError
        There is no cluster, or it does not let us in.
    """
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
    retries = runtime.config.max_retries if max_retries is None else max_retries
    worker_class = api.remote(
        num_cpus=1, max_restarts=-1 if retries else 0, max_task_retries=retries
    )(_PoolWorker)
    workers = [_Worker(worker_class.remote(*prepared)) for _ in range(processes)]
    handle = ClusterHandle(workers, serializer)
    runtime.calls = ClusterCalls(runtime, handle, workers, cancellable)
    return runtime.calls


def _flat(data: bytes | Serialized) -> bytes:
    return data if isinstance(data, bytes) else data.to_bytes()
