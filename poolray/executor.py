"""`Executor`: `concurrent.futures.ProcessPoolExecutor`, without its limits.

What: the whole interface of the standard executor on a group of forked workers. Its futures are
real `concurrent.futures.Future`s; a worker that dies costs a retry of what it ran, not the
executor.
Who calls: users.
May touch: nothing by itself; processes belong to the runtime.
Invariants: the standard library is the contract; a future is set exactly once; a future that was
cancelled never ran.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor as StandardExecutor
from concurrent.futures import Future, InvalidStateError
from concurrent.futures.process import BrokenProcessPool, _RemoteTraceback
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast, final

from poolray import cluster_connection
from poolray.exceptions import (
    OutOfMemoryError,
    PoolrayError,
    TaskError,
    WorkerCrashedError,
    WorkerStartError,
)
from poolray.local import runtime as local_runtime
from poolray.local.calls import CallGroup, split_error
from poolray.local.fork_server import WorkerSetup
from poolray.local.reactor import Waitable
from poolray.local.standard_view import WorkerView, start_method, streams_are_replaced
from poolray.protocol.values import CallKind, Outcome

if TYPE_CHECKING:
    from poolray.local.progress import Progress

P = ParamSpec("P")
R = TypeVar("R")

__all__ = ["Executor", "WorkerDiedError"]

_DONE = ("CANCELLED", "CANCELLED_AND_NOTIFIED", "FINISHED")


class WorkerDiedError(WorkerCrashedError, BrokenProcessPool):
    """The worker that ran a call died, each time it was tried.

    Also a `BrokenProcessPool`, as code for the standard executor expects; other calls go on.
    """


class _EndedForMemoryError(OutOfMemoryError, BrokenProcessPool):
    """The worker that ran a call was ended because memory was short."""


#: Guards the fields of futures that have no condition of their own yet, and its making.
_futures_lock = threading.Lock()


@final
class _Future(Future[R]):
    """A future whose waiter works: `result` leads the runtime instead of sleeping.

    Its condition, and the lists that go with it, are made when somebody asks for them (`wait`,
    `as_completed`, a callback): most futures end without, and making, locking and collecting them
    would cost more than all the rest of a call (measured: 4 of 16 us).
    """

    def __init__(self, core: _Core) -> None:
        # As in Future.__init__, whose other fields appear with the condition.
        self._state = "PENDING"
        self._result: R | None = None
        self._exception: BaseException | None = None
        self._own_condition: threading.Condition | None = None
        self._done_callbacks: list[Any] | tuple[()] = ()
        self._core = core
        self._waited: Waitable | None = None

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        condition = self._own_condition
        return condition if condition is not None else self._make_condition()

    def _make_condition(self) -> threading.Condition:
        with _futures_lock:
            if self._own_condition is None:
                self._waiters: list[Any] = []
                self._done_callbacks = []
                self._own_condition = threading.Condition()
            return self._own_condition

    def done(self) -> bool:
        """Whether the call has ended or was cancelled."""
        return self._state in _DONE

    def result(self, timeout: float | None = None) -> R:
        """The value of the call; see `concurrent.futures.Future.result`."""
        if self._state not in _DONE:
            timeout = self._wait(timeout)
        if self._state == "FINISHED" and self._exception is None:
            return self._result  # type: ignore[return-value]
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the call raised; see `concurrent.futures.Future.exception`."""
        if self._state not in _DONE:
            timeout = self._wait(timeout)
        return super().exception(timeout)

    def cancel(self) -> bool:
        """Cancel the call if no worker has been given it."""
        cancelled = super().cancel()
        if cancelled:
            self._core.forget(self)
            self._wake()
        return cancelled

    def _wait(self, timeout: float | None) -> float | None:
        """Lead until done; gives what is left of the timeout."""
        waited = self._waited
        if waited is None:
            waited = self._waited = Waitable()
        if self._state in _DONE:
            return 0
        runtime = self._core.runtime
        if runtime is None:
            return timeout
        if runtime.closed:
            raise RuntimeError(
                f"This future will not be set: its runtime {runtime.ended}; make a new Executor."
            )
        if runtime.open_batches:
            runtime.flush_batches()
        started = time.monotonic()
        runtime.reactor.wait(waited, timeout)
        return None if timeout is None else max(0.0, timeout - (time.monotonic() - started))

    def _wake(self) -> None:
        waited = self._waited
        if waited is not None:
            waited.finish()
            runtime = self._core.runtime
            if runtime is not None:
                runtime.reactor.wake_if_other()

    # As a receiver of its call's result:

    def begin(self) -> bool:
        """A worker is about to get the call: False when it is not wanted any more."""
        with _futures_lock:
            if self._own_condition is None:  # nor can it have been cancelled
                self._state = "RUNNING"
                return True
        with self._condition:
            if self._state == "PENDING":
                self._state = "RUNNING"
                return True
        self.notify_cancelled()
        return False

    def notify_cancelled(self) -> None:
        """Tell those who wait for several futures that this one was cancelled."""
        with self._condition:
            if self._state != "CANCELLED":
                return
            self._state = "CANCELLED_AND_NOTIFIED"
            for waiter in self._waiters:
                waiter.add_cancelled(self)

    def on_result(self, result: bytes | Outcome) -> None:
        """The call has ended."""
        core = self._core
        if self._done_callbacks:
            # Users' code; a thread of its own, as a callback may wait for a lock that a thread
            # waiting in `result` holds.
            assert core.runtime is not None
            core.runtime.callbacks.run(lambda: self._settle(result))
        else:
            self._settle(result)

    def _settle(self, result: bytes | Outcome) -> None:
        core = self._core
        assert core.group is not None
        if self._state in _DONE:
            return  # failed meanwhile: the executor is broken
        try:
            success, value = core.group.load(result)
        except Exception as error:  # the value does not load here
            success, value = False, error
            error.__traceback__ = None
        try:
            if success:
                if not self._set_unwatched(value):
                    self.set_result(value)
            else:
                self.set_exception(core.exception_of(value))
        except InvalidStateError:
            pass  # the group has failed meanwhile, and told all its futures
        self._wake()
        core.forget(self)

    def _set_unwatched(self, value: R) -> bool:
        """Set the result of a future that nobody has a lock of; False when somebody has."""
        with _futures_lock:
            if self._own_condition is not None:
                return False
            if self._state not in _DONE:
                self._result = value
                self._state = "FINISHED"
            return True

    def fail(self, error: BaseException) -> None:
        """The call cannot run any more."""
        if self._state == "PENDING" and not self.set_running_or_notify_cancel():
            self._wake()
            return
        if self._state not in _DONE:
            self.set_exception(error)
        self._wake()
        self._core.forget(self)


@final
class _Core:
    """What outlives the executor object while calls are under way."""

    def __init__(
        self,
        max_workers: int,
        context: Any,
        setup: dict[str, Any],
        max_tasks: int,
        max_retries: int | None,
        break_on_death: bool,
        address: str | None,
    ) -> None:
        self._address = address
        self._max_workers = max_workers
        self._context = context
        self._setup = setup
        self._max_tasks = max_tasks
        self._max_retries = max_retries
        self._break_on_death = break_on_death
        self.runtime: local_runtime.LocalRuntime | None = None
        self.group: CallGroup | None = None
        self.lock = threading.Lock()
        #: Futures that have not ended.
        self.open: dict[_Future[Any], None] = {}
        self.shut_down = False
        #: Why nothing can be submitted any more; empty: it can.
        self.broken = ""
        self._group_closed = False

    def start(self) -> CallGroup:
        """Fork the group's server, or start actors on a cluster, at the first call."""
        if self._address is not None:
            return self._start_on_cluster(self._address)
        runtime = local_runtime.ensure()
        method = start_method(self._context)
        setup = WorkerSetup(
            config=runtime.config,
            name_prefix="ForkProcess" if method == "fork" else "SpawnProcess",
            daemon=False,
            forward_output=streams_are_replaced(),
            shared_globals=f"executor-{id(self)}",
            log_initializer_error=True,
            **self._setup,
        )
        handle = runtime.create_group(
            size=self._max_workers,
            start_now=method == "fork",  # as the standard executor; others as calls need them
            setup=setup,
            start_method=method,
            max_tasks_per_worker=self._max_tasks,
            break_on_death=self._break_on_death,
        )
        retries = runtime.config.max_retries if self._max_retries is None else self._max_retries
        self.runtime = runtime
        self.group = CallGroup(runtime, handle, retries, cancellable=True)
        handle.on_failed = self._on_group_failed
        _cores.add(self)
        return self.group

    def _start_on_cluster(self, address: str) -> CallGroup:
        from poolray.cluster_calls import make_calls

        calls = make_calls(
            address=address,
            processes=self._max_workers,
            initializer=self._setup["initializer"],
            initargs=self._setup["initargs"],
            max_retries=0 if self._break_on_death else self._max_retries,
            name=f"executor-{id(self)}",
            cancellable=True,
            max_tasks=self._max_tasks,
        )
        # (They have what this class uses of their local counterparts.)
        self.runtime, self.group = cast("Any", calls.runtime), cast("Any", calls)
        _cores.add(self)
        return cast("CallGroup", calls)

    def _on_group_failed(self, error: bytes) -> None:
        """The workers cannot be used: all that is under way fails, and all that comes."""
        self.broken = _BROKEN_WHILE_RUNNING
        assert self.group is not None
        self.group.drain()
        for future in list(self.open):
            future.fail(BrokenProcessPool(_BROKEN_WHILE_RUNNING))

    def exception_of(self, error: Any) -> BaseException:
        """The exception that a future of a failed call gets."""
        exception, text, _ = split_error(error)
        if isinstance(exception, WorkerStartError) or (
            isinstance(exception, TaskError) and exception.function_name == "initializer"
        ):
            self.broken = self.broken or _BROKEN_WHILE_RUNNING
            broken = BrokenProcessPool(_BROKEN_WHILE_RUNNING)
            broken.__cause__ = exception
            return broken
        if self._break_on_death and isinstance(exception, PoolrayError) and text is None:
            self.broken = self.broken or _BROKEN_WHILE_RUNNING
            broken = BrokenProcessPool(_BROKEN_WHILE_RUNNING)
            broken.__cause__ = exception
            return broken
        if isinstance(exception, OutOfMemoryError):
            return _EndedForMemoryError(**vars(exception))
        if isinstance(exception, WorkerCrashedError):
            return WorkerDiedError(
                task_name=exception.task_name,
                task_id=exception.task_id,
                pid=exception.pid,
                exit_code=exception.exit_code,
                signal=exception.signal,
                attempts=exception.attempts,
            )
        if text is not None:
            exception.__cause__ = _RemoteTraceback(f'\n"""\n{text}"""')  # type: ignore[arg-type]
        return exception

    def forget(self, future: _Future[Any]) -> None:
        """A future has ended; after a shutdown the last one lets the workers go."""
        self.open.pop(future, None)
        if self.shut_down and not self.open:
            self._close_group()

    def finish(self) -> None:
        """No more calls come: end the workers after those under way."""
        self.shut_down = True
        if not self.open:
            self._close_group()

    def wait_ended(self) -> None:
        """Block until the workers have ended, after `finish`."""
        runtime, group = self.runtime, self.group
        if runtime is None or group is None or runtime.closed or not runtime.in_this_process():
            return
        runtime.wait_group_ended(group.handle)
        runtime.callbacks.flush()

    def _close_group(self) -> None:
        with self.lock:
            if self._group_closed or self.group is None:
                return
            self._group_closed = True
        assert self.runtime is not None
        if not self.runtime.closed:
            self.runtime.close_group(self.group.handle)


_BROKEN_WHILE_RUNNING = (
    "A process in the process pool was terminated abruptly while the future was running or pending."
)


class Executor(StandardExecutor):
    """An executor of worker processes; replaces `concurrent.futures.ProcessPoolExecutor`.

    Parameters
    ----------
    max_workers : int, default: CPUs that this process may run on
        Workers; forked ones start with the first call, others as calls need them.
    mp_context : multiprocessing context, optional
        Its start method is used ("fork" by default).
    initializer : callable, optional
        Run once in each worker as it starts; if it raises, the executor is broken.
    initargs : tuple
    max_tasks_per_child : int, optional
        Replace a worker after so many calls. Works with every start method.
    max_retries : int, default 3
        Further attempts of a call whose worker was killed.
    break_on_worker_death : bool, default False
        As in the standard library, let a worker's death break the whole executor.
    address : str, optional
        A cluster's, as `init` takes it: the workers are spread over its nodes, one per CPU by
        default. None takes what `POOLRAY_ADDRESS` says, if it is set; "local" is this machine.
        Workers are fresh processes there: a "fork" context is refused.

    Raises
    ------
    ValueError, TypeError
        A bad value, at once.

    Notes
    -----
    The first call forks the workers: they have the modules and globals of that moment.

    Examples
    --------
    >>> from poolray import Executor
    >>> with Executor(2) as executor:
    ...     executor.submit(pow, 2, 5).result()
    32
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        max_retries: int | None = None,
        break_on_worker_death: bool = False,
        address: str | None = None,
    ) -> None:
        self._core: _Core | None = None
        address = cluster_connection.pool_address(address)
        if address is not None:
            from poolray.cluster_calls import check_context, cluster_size

            check_context(mp_context)
            if max_workers is None:
                max_workers = cluster_size(address)
        if max_workers is None:
            max_workers = local_runtime.usable_cpus()
        elif max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if max_tasks_per_child <= 0:
                raise ValueError("max_tasks_per_child must be >= 1")
        if max_retries is not None and max_retries < -1:
            raise ValueError("max_retries must be -1 (for ever), 0 or a positive int")
        if mp_context is None:
            mp_context = multiprocessing.get_context()
            context = None
        else:
            context = mp_context
            start_method(context)
        self._max_workers = max_workers
        self._mp_context = mp_context
        self._core = _Core(
            max_workers,
            context,
            {"initializer": initializer, "initargs": tuple(initargs)},
            max_tasks_per_child or 0,
            max_retries,
            break_on_worker_death,
            address,
        )
        _executors.add(self)

    # ---- calls -----------------------------------------------------------------------------------

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Call `fn(*args, **kwargs)` in a worker.

        Returns
        -------
        concurrent.futures.Future

        Raises
        ------
        RuntimeError
            After `shutdown`; when the interpreter is ending.
        BrokenProcessPool
            The executor is broken.
        """
        core = self._core
        assert core is not None
        future: _Future[R] = _Future(core)
        try:
            with core.lock:
                self._check_usable(core)
                group = core.group or core.start()
                core.open[future] = None
            try:
                if type(fn) is types.FunctionType or type(fn) is types.BuiltinFunctionType:
                    stream = group.stream(fn, CallKind.CALL)
                    payload = group.dumps_call(args, kwargs)
                else:
                    stream = group.apply_stream()
                    payload = group.dumps((fn, args, kwargs))
                group.submit(stream, payload, future)
            except Exception as error:  # as in the standard executor, the future raises it
                future.fail(error)
        except BaseException as error:  # refused, or Ctrl-C: nobody will ask for it
            future.fail(error)
            raise
        return future

    def map(
        self,
        fn: Callable[..., R],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        progress: Progress = None,
    ) -> Iterator[R]:
        """`map(fn, *iterables)` in workers, in order.

        Parameters
        ----------
        timeout : float, seconds, optional
            From this call on, for all results.
        chunksize : int, default 1
            Items that a worker takes as one call. Short calls are fast with 1 as well.
        progress : bool or dict, optional
            Show a progress bar, in a terminal or a notebook; the dict has options for tqdm, which
            has to be installed (`poolray[progress]`).

        Raises
        ------
        ValueError
            `chunksize` below 1.
        TimeoutError
            From the iterator: the next result was not there in time.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        end = None if timeout is None else time.monotonic() + timeout
        items = zip(*iterables)
        if progress:
            futures = self._map_with_bar(fn, items, chunksize, progress)
            return _results(futures, end)
        futures = []
        while chunk := list(itertools.islice(items, chunksize)):
            futures.append(self._submit_chunk(fn, chunk))
        return _results(futures, end)

    def _map_with_bar(
        self,
        fn: Callable[..., R],
        items: Iterator[tuple[Any, ...]],
        chunksize: int,
        progress: Progress,
    ) -> list[Future[list[R]]]:
        from poolray.local.progress import make_bar

        bar = make_bar(progress, None)
        assert bar is not None
        futures = []
        count = 0
        try:
            while chunk := list(itertools.islice(items, chunksize)):
                future = self._submit_chunk(fn, chunk)
                futures.append(future)
                count += len(chunk)
                future.add_done_callback(bar.advancing(len(chunk)))
        finally:
            bar.expect(len(futures), count)
        return futures

    def _submit_chunk(self, fn: Callable[..., R], chunk: list[tuple[Any, ...]]) -> Future[list[R]]:
        core = self._core
        assert core is not None
        future: _Future[list[R]] = _Future(core)
        try:
            with core.lock:
                self._check_usable(core)
                group = core.group or core.start()
                core.open[future] = None
            try:
                stream = group.stream(fn, CallKind.STARMAP)
                group.submit(stream, group.dumps(chunk), future)
            except Exception as error:
                future.fail(error)
        except BaseException as error:
            future.fail(error)
            raise
        return future

    def _check_usable(self, core: _Core) -> None:
        if core.broken:
            raise BrokenProcessPool(core.broken)
        if core.shut_down:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if _exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if core.runtime is not None and core.runtime.closed:
            raise RuntimeError(
                f"cannot schedule new futures: the executor's runtime {core.runtime.ended}; make a "
                "new Executor"
            )

    # ---- end -------------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; workers end after those that were submitted.

        Parameters
        ----------
        wait : bool, default True
            Block until the workers have ended.
        cancel_futures : bool, default False
            Cancel the calls that no worker has been given.
        """
        core = self._core
        if core is None:
            return
        with core.lock:
            core.shut_down = True
        if cancel_futures:
            for future in list(core.open):
                if future.cancel():
                    future.notify_cancelled()
        core.finish()
        if wait:
            core.wait_ended()

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is None or core.shut_down:
            return
        core.shut_down = True
        runtime = core.runtime
        if runtime is not None and not runtime.closed and runtime.in_this_process():
            runtime.later.append(core.finish)
            runtime.reactor.ensure_background()

    # ---- what programs look into -----------------------------------------------------------------

    @property
    def _processes(self) -> dict[int, Any] | None:
        """The workers by pid; None after `shutdown`."""
        core = self._core
        if core is None or core.shut_down:
            return None
        if core.group is None or core.runtime is None:
            return {}
        pids = core.runtime.worker_pids(core.group.handle)
        return {pid: WorkerView(pid, f"ForkProcess-{n}") for n, pid in enumerate(pids, 1)}

    @property
    def _broken(self) -> str | bool:
        """Why the executor is broken, or False."""
        return (self._core.broken if self._core is not None else "") or False


def _results(futures: list[Future[list[R]]], end: float | None) -> Iterator[R]:
    """Results of chunks one by one; what is left when the consumer stops is cancelled."""

    def iterate() -> Iterator[R]:
        try:
            futures.reverse()
            while futures:
                future = futures.pop()  # no reference to it while it is consumed
                try:
                    values = future.result(None if end is None else end - time.monotonic())
                finally:
                    future.cancel()
                    del future
                values.reverse()
                while values:
                    yield values.pop()
        finally:
            for future in futures:
                future.cancel()

    return iterate()


_executors: weakref.WeakSet[Executor] = weakref.WeakSet()
_cores: weakref.WeakSet[_Core] = weakref.WeakSet()
_exiting = False


def _at_exit() -> None:
    """The interpreter ends: calls that were submitted are finished first."""
    global _exiting
    _exiting = True
    for executor in list(_executors):
        executor.shutdown(wait=True)
    for core in list(_cores):  # of executors that were dropped with calls under way
        core.finish()
        core.wait_ended()


def _forget_executors() -> None:
    """In a forked child: executors are the parent's, and their locks may be held there."""
    global _executors, _futures_lock
    _futures_lock = threading.Lock()
    _executors = weakref.WeakSet()


os.register_at_fork(after_in_child=_forget_executors)
# Before the interpreter joins its threads and runs atexit handlers, which end the runtime; as
# concurrent.futures does.
threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
