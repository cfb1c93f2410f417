"""`Pool`: `multiprocessing.Pool`, without its limits.

What: the whole interface of the standard Pool on a group of forked workers; lambdas and closures
work, tiny calls are fast without a chunksize, large arrays travel through shared memory, a worker
that dies costs a retry.
Who calls: users.
May touch: nothing by itself; processes belong to the runtime.
Invariants: the standard library is the contract (its documentation and tests); each result is set
exactly once; input is read only as far ahead as the window allows.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import os
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar, cast

from poolray import cluster_connection
from poolray.exceptions import PoolrayError
from poolray.local import runtime as local_runtime
from poolray.local.calls import CallGroup, CallStream, check_timeout, split_error
from poolray.local.feed import PASSIVE, Feed, chunks_of
from poolray.local.fork_server import WorkerExtras, WorkerSetup
from poolray.local.pool_results import (
    ApplyResult,
    IMapIterator,
    IMapUnorderedIterator,
    MapResult,
    exception_of,
)
from poolray.local.reactor import Waitable
from poolray.local.standard_view import (
    WorkerView,
    start_method,
    streams_are_replaced,
    workers_are_daemons,
)
from poolray.objects.serialization import deserialize
from poolray.protocol.values import CallKind

if TYPE_CHECKING:
    from poolray.local.pool_insights import GroupWatch, PoolInsights
    from poolray.local.progress import Progress, ProgressBar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

__all__ = [
    "ApplyResult",
    "AsyncResult",
    "IMapIterator",
    "IMapUnorderedIterator",
    "MapResult",
    "Pool",
]

AsyncResult = ApplyResult

_RUN, _CLOSE, _TERMINATE = "RUN", "CLOSE", "TERMINATE"


class Pool:
    """A pool of worker processes; replaces `multiprocessing.Pool`.

    Parameters
    ----------
    processes : int, default: CPUs that this process may run on
        Workers.
    initializer : callable, optional
        Run once in each worker as it starts, with `initargs`. If it raises in each of them, calls
        fail with its error, as a `TaskError` (the standard Pool starts workers for ever).
    initargs : tuple
    maxtasksperchild : int, optional
        Replace a worker after so many calls (chunks, of a map).
    context : multiprocessing context, optional
        Its start method is used: "fork" (default: workers have the modules and globals of this
        moment), "spawn" or "forkserver" (a fresh interpreter that imports `__main__`).
    max_retries : int, default 3
        Further attempts of a call whose worker was killed.
    worker_state : bool or callable, optional
        Each worker has a state, which every call gets as its first argument: a dict (True), or
        what the callable returns in the worker.
    worker_init : callable, optional
        Called once in each worker, after the initializer, with the state if there is one.
    worker_exit : callable, optional
        Called likewise when a worker leaves politely: after `close`, or because of
        `maxtasksperchild`. `get_exit_results` gives what it returns.
    insights : bool, default False
        Measure what workers do with their time, for `insights()`.
    address : str, optional
        A cluster's, as `init` takes it: the workers are spread over its nodes, one per CPU by
        default. None takes what `POOLRAY_ADDRESS` says, if it is set; "local" is this machine.
        Functions go by value; workers are fresh processes, so a "fork" context is refused.

    Raises
    ------
    ValueError
        `processes` below 1; a bad `maxtasksperchild`.
    TypeError
        The initializer is not callable.

    Notes
    -----
    Lambdas, closures and functions of notebooks work. A function that can be imported, or that
    `__main__` had when the pool was made, goes by reference; any other by value, captured at its
    first use.

    Examples
    --------
    >>> from poolray import Pool
    >>> with Pool(2) as pool:
    ...     pool.map(lambda x: x * x, range(5))
    [0, 1, 4, 9, 16]
    """

    #: For objects whose making failed.
    _state = "INIT"

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        *,
        max_retries: int | None = None,
        worker_state: bool | Callable[[], Any] | None = None,
        worker_init: Callable[..., object] | None = None,
        worker_exit: Callable[..., Any] | None = None,
        insights: bool = False,
        address: str | None = None,
    ) -> None:
        address = cluster_connection.pool_address(address)
        if address is not None and processes is None:
            from poolray.cluster_calls import cluster_size

            processes = cluster_size(address)
        if processes is None:
            processes = local_runtime.usable_cpus()
        if not isinstance(processes, int):
            raise TypeError(f"processes must be an integer, not {type(processes).__name__}")
        if processes < 1:
            raise ValueError("Number of processes must be at least 1")
        if maxtasksperchild is not None and (
            not isinstance(maxtasksperchild, int) or maxtasksperchild <= 0
        ):
            raise ValueError("maxtasksperchild must be a positive int or None")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_retries is not None and max_retries < -1:
            raise ValueError("max_retries must be -1 (for ever), 0 or a positive int")
        self._processes = processes
        self._initializer = initializer
        self._initargs = tuple(initargs)
        self._maxtasksperchild = maxtasksperchild
        self._extras = _extras_of(worker_state, worker_init, worker_exit, insights)
        #: What workers tell of themselves; None: nothing that anybody asked for.
        self._watch: GroupWatch | None = None
        #: Bars that may be open.
        self._bars: dict[ProgressBar, None] = {}
        self._ctx = context or multiprocessing.get_context()
        #: id -> result or iterator that has not ended.
        self._cache: dict[int, Any] = {}
        if address is not None:
            self._start_on_cluster(address, context, max_retries)
        else:
            self._start(start_method(context), max_retries)

    def _start_on_cluster(self, address: str, context: Any, max_retries: int | None) -> None:
        from poolray.cluster_calls import make_calls

        calls = make_calls(
            address=address,
            processes=self._processes,
            initializer=self._initializer,
            initargs=self._initargs,
            max_retries=max_retries,
            name=f"pool-{id(self)}",
            context=context,
            max_tasks=self._maxtasksperchild or 0,
            extras=self._extras,
        )
        self._watch = cast("Any", calls)
        # (They have what this class uses of their local counterparts.)
        self._group, self._handle = cast("Any", calls), cast("Any", calls.handle)
        self._runtime = cast("Any", calls.runtime)
        self._state = _RUN

    def _start(self, method: str, max_retries: int | None) -> None:
        runtime = local_runtime.ensure()
        self._runtime = runtime
        if self._extras is not None:
            from poolray.local.pool_insights import GroupWatch

            self._watch = GroupWatch()
        setup = WorkerSetup(
            config=runtime.config,
            initializer=self._initializer,
            initargs=self._initargs,
            extras=self._extras,
            name_prefix="ForkPoolWorker" if method == "fork" else "SpawnPoolWorker",
            daemon=workers_are_daemons(self._ctx),
            forward_output=streams_are_replaced(),
            shared_globals=f"pool-{id(self)}",
        )
        handle = runtime.create_group(
            size=self._processes,
            start_now=True,
            setup=setup,
            start_method=method,
            max_tasks_per_worker=self._maxtasksperchild or 0,
            watch=self._watch,
        )
        retries = runtime.config.max_retries if max_retries is None else max_retries
        self._group = CallGroup(runtime, handle, retries)
        cache, bars = self._cache, self._bars

        def on_failed(error: bytes) -> None:
            import pickle

            _fail_all(cache, split_error(pickle.loads(error))[0])
            _close_all(bars)

        handle.on_failed = on_failed
        self._handle = handle
        self._state = _RUN

    # ---- calls -----------------------------------------------------------------------------------

    def apply(
        self,
        func: Callable[..., R],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        *,
        timeout: float | None = None,
    ) -> R:
        """Call `func(*args, **kwds)` in a worker and wait for the value; see `apply_async`."""
        return self.apply_async(func, args, kwds, timeout=timeout).get()

    def apply_async(
        self,
        func: Callable[..., R],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        callback: Callable[[R], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        *,
        timeout: float | None = None,
    ) -> ApplyResult[R]:
        """Call `func(*args, **kwds)` in a worker.

        Parameters
        ----------
        callback, error_callback : callable, optional
            Called with the value or the exception, in a thread of the pool, before `get` returns.
        timeout : float, seconds, optional
            How long the call may run, from its beginning in a worker; then it fails with
            `CallTimeoutError`, a `TimeoutError`. None is without end.

        Raises
        ------
        ValueError
            The pool is not running; a bad timeout.

        Examples
        --------
        >>> from poolray import Pool
        >>> with Pool(1) as pool:
        ...     pool.apply_async(pow, (2, 5)).get(timeout=10)
        32
        """
        self._check_running()
        if timeout is not None:
            timeout = check_timeout(timeout)
        result: ApplyResult[R] = ApplyResult(self, callback, error_callback)
        group = self._group
        try:
            self._cache[id(result)] = result  # here: Ctrl-C finds it registered and abandoned
            if type(func) is types.FunctionType or type(func) is types.BuiltinFunctionType:
                stream = (
                    group.stream(func, CallKind.CALL)
                    if timeout is None
                    else group.limited_stream(func, CallKind.CALL, timeout)
                )
                payload = group.dumps_call(tuple(args), kwds)
            else:
                stream = (
                    group.apply_stream() if timeout is None else group.limited_apply_stream(timeout)
                )
                payload = group.dumps((func, tuple(args), kwds))
            group.submit(stream, payload, result)
        except Exception as error:  # as in the standard Pool, `get` raises it
            result._set(False, error)
        except BaseException:
            self._abandon(result)
            raise
        return result

    def map(
        self,
        func: Callable[[T], R],
        iterable: Iterable[T],
        chunksize: int | None = None,
        *,
        timeout: float | None = None,
        progress: Progress = None,
    ) -> list[R]:
        """`[func(item) for item in iterable]`, in workers.

        Parameters
        ----------
        chunksize : int, optional
            Items that a worker takes as one task; by default a quarter of its share.
        timeout : float, seconds, optional
            How long each item may run, from its beginning in a worker. One that is late is ended
            and fails with `CallTimeoutError`, a `TimeoutError`; its worker is replaced, and all
            others are run to their ends. With a timeout each item is a task of its own, whatever
            the chunksize.
        progress : bool or dict, optional
            Show a progress bar, in a terminal or a notebook; the dict has options for tqdm, which
            has to be installed (`poolray[progress]`).

        Examples
        --------
        >>> from poolray import Pool
        >>> with Pool(2) as pool:
        ...     pool.map(str, [1, 2])
        ['1', '2']
        """
        return self._map(
            func, iterable, CallKind.MAP, chunksize, None, None, timeout, progress
        ).get()

    def map_async(
        self,
        func: Callable[[T], R],
        iterable: Iterable[T],
        chunksize: int | None = None,
        callback: Callable[[list[R]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        *,
        timeout: float | None = None,
        progress: Progress = None,
    ) -> ApplyResult[list[R]]:
        """`map` without waiting."""
        return self._map(
            func, iterable, CallKind.MAP, chunksize, callback, error_callback, timeout, progress
        )

    def starmap(
        self,
        func: Callable[..., R],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        *,
        timeout: float | None = None,
        progress: Progress = None,
    ) -> list[R]:
        """`[func(*arguments) for arguments in iterable]`, in workers; see `map`."""
        return self._map(
            func, iterable, CallKind.STARMAP, chunksize, None, None, timeout, progress
        ).get()

    def starmap_async(
        self,
        func: Callable[..., R],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[R]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        *,
        timeout: float | None = None,
        progress: Progress = None,
    ) -> ApplyResult[list[R]]:
        """`starmap` without waiting."""
        return self._map(
            func, iterable, CallKind.STARMAP, chunksize, callback, error_callback, timeout, progress
        )

    def _map(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        kind: CallKind,
        chunksize: int | None,
        callback: Callable[[Any], object] | None,
        error_callback: Callable[[BaseException], object] | None,
        timeout: float | None,
        progress: Progress,
    ) -> MapResult:
        self._check_running()
        items = iterable if hasattr(iterable, "__len__") else list(iterable)
        length = len(items)  # type: ignore[arg-type]
        if chunksize is None:
            chunksize, extra = divmod(length, self._processes * 4)
            if extra:
                chunksize += 1
        elif not isinstance(chunksize, int):
            raise TypeError(f"chunksize must be an integer, not {type(chunksize).__name__}")
        elif chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize:n}")
        if timeout is not None:
            timeout, chunksize = check_timeout(timeout), 1
        if length == 0:
            chunksize = 0
        bar = self._bar(progress, length) if progress else None
        result = MapResult(self, chunksize, length, callback, error_callback)
        if bar is not None:
            bar.expect(result._left)
        if result._left == 0:
            if length == 0 and callback is not None:
                self._runtime.callbacks.run(partial(callback, []))
            return result
        feed: Feed | None = None
        try:
            self._cache[id(result)] = result
            try:
                stream = self._stream(func, kind, timeout)
            except Exception as error:
                result._set(False, error)
                if bar is not None:
                    bar.close()
                return result
            feed = self._feed_of(result, stream, chunks_of(items, chunksize))
            if bar is not None:
                feed.on_chunk = bar.watching(feed.on_chunk, chunksize, length)
            feed.start()
        except BaseException:
            if feed is not None:
                feed.stop()
            self._abandon(result)
            raise
        return result

    def _bar(self, progress: Progress, items: int | None) -> ProgressBar | None:
        """The progress bar of a map that is about to begin."""
        from poolray.local.progress import make_bar

        bar = make_bar(progress, items)
        if bar is not None:
            for other in [other for other in self._bars if other.is_closed]:
                del self._bars[other]
            self._bars[bar] = None
        return bar

    def _stream(
        self, func: Callable[..., Any], kind: CallKind, timeout: float | None
    ) -> CallStream:
        if timeout is None:
            return self._group.stream(func, kind)
        return self._group.limited_stream(func, kind, timeout)

    def _feed_of(self, result: MapResult, stream: CallStream, chunks: Iterator[list[Any]]) -> Feed:
        feed = Feed(self, stream, chunks, True)

        def on_chunk(index: int, success: bool, value: Any) -> None:
            result.on_chunk(index, success, value)
            feed.consumed(index)
            if result._left == 0:
                feed.detach()

        feed.on_chunk = on_chunk
        return feed

    def imap(
        self,
        func: Callable[[T], R],
        iterable: Iterable[T],
        chunksize: int = 1,
        *,
        timeout: float | None = None,
        progress: Progress = None,
    ) -> IMapIterator[R]:
        """An iterator over `func(item)` in order; reads its input lazily.

        Parameters
        ----------
        chunksize : int, default 1
            Items that a worker takes as one task. Short calls are fast with 1 as well.
        timeout : float, seconds, optional
            How long each item may run; see `map`. `next` raises `CallTimeoutError` in the place
            of one that was late, and the iteration can go on.
        progress : bool or dict, optional
            Show a progress bar; see `map`. It counts items that have ended, taken or not.

        Raises
        ------
        ValueError
            `chunksize` below 1; the pool is not running; a bad timeout.

        Notes
        -----
        Reads ahead by a bounded number of items and bytes (`Config.imap_window_items`,
        `Config.imap_window_bytes`), results that were not taken included.
        """
        return self._imap(IMapIterator, func, iterable, chunksize, timeout, progress)

    def imap_unordered(
        self,
        func: Callable[[T], R],
        iterable: Iterable[T],
        chunksize: int = 1,
        *,
        timeout: float | None = None,
        progress: Progress = None,
    ) -> IMapIterator[R]:
        """`imap`, with results as they come."""
        return self._imap(IMapUnorderedIterator, func, iterable, chunksize, timeout, progress)

    def _imap(
        self,
        kind: type[IMapIterator[Any]],
        func: Callable[[Any], Any],
        iterable: Iterable[Any],
        chunksize: int,
        timeout: float | None,
        progress: Progress,
    ) -> IMapIterator[Any]:
        self._check_running()
        if chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize:n}")
        if timeout is not None:
            timeout, chunksize = check_timeout(timeout), 1
        passive = type(iterable) in PASSIVE
        failure: BaseException | None = None
        try:
            stream = self._stream(func, CallKind.MAP, timeout)
        except Exception as error:  # as in the standard Pool, each item fails with it
            stream, failure = self._group.apply_stream(), error
        try:
            chunks = chunks_of(iterable, chunksize)
        except TypeError as error:  # not iterable: told at the first `next`
            chunks, failure = iter([[]]), error
        feed = Feed(self, stream, chunks, passive, chunksize, failure)
        if not progress:
            return kind(self, feed, chunksize > 1)
        items = len(iterable) if isinstance(iterable, Sized) else None
        return kind(self, feed, chunksize > 1, self._bar(progress, items), chunksize, items)

    # ---- waiting ---------------------------------------------------------------------------------

    def _wait(self, waited: Waitable, timeout: float | None) -> None:
        runtime = self._runtime
        if runtime.open_batches:
            runtime.flush_batches()
        runtime.reactor.wait(waited, timeout)

    def _abandon(self, result: Any) -> None:
        """Ctrl-C came before the caller was given the result: nobody will ask for it."""
        self._cache.pop(id(result), None)

    def _on_idle(self) -> None:
        """A result is complete: a closed pool whose last one it was lets its workers go."""
        if self._state == _CLOSE and not self._cache:
            self._runtime.close_group(self._handle)

    def _check_running(self) -> None:
        if self._state != _RUN:
            raise ValueError("Pool not running")
        if self._runtime.closed:
            raise ValueError(
                f"Pool not running: its runtime {self._runtime.ended}; make a new Pool"
            )

    # ---- end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more calls; workers end after those that were submitted."""
        if self._state == _RUN:
            self._state = _CLOSE
            self._on_idle()

    def terminate(self) -> None:
        """Kill the workers now; results that have not come raise `PoolrayError`."""
        if self._state in ("INIT", _TERMINATE):
            return
        self._state = _TERMINATE
        self._runtime.terminate_group(self._handle)
        _fail_all(self._cache, PoolrayError("The pool was terminated before this call had ended."))
        _close_all(self._bars)

    def join(self) -> None:
        """Wait for the workers' end; after `close` or `terminate`.

        Raises
        ------
        ValueError
            The pool is still running.
        """
        if self._state == _RUN:
            raise ValueError("Pool is still running")
        if self._state not in (_CLOSE, _TERMINATE):
            raise ValueError("In unknown state")
        if self._runtime.closed:
            return
        if self._state == _CLOSE:
            for result in list(self._cache.values()):
                if isinstance(result, IMapIterator):
                    result.lift_window()  # nobody may come to take its results
        self._runtime.wait_group_ended(self._handle)
        self._runtime.callbacks.flush()

    # ---- what workers tell -----------------------------------------------------------------------

    def get_exit_results(self) -> list[Any]:
        """What `worker_exit` has returned, in the order in which workers ended.

        Returns
        -------
        list
            Of the workers that have left politely so far: after `close` and `join` it is
            complete. One that was killed, as by `terminate`, leaves nothing.

        Raises
        ------
        Exception
            What `worker_exit` raised, if it did in some worker.

        Examples
        --------
        >>> from poolray import Pool
        >>> def count(state, number):
        ...     state["calls"] = state.get("calls", 0) + 1
        >>> pool = Pool(2, worker_state=True, worker_exit=lambda state: state.get("calls", 0))
        >>> _ = pool.map(count, range(10), chunksize=1)
        >>> pool.close()
        >>> pool.join()
        >>> sum(pool.get_exit_results())
        10
        """
        found = []
        for is_result, data in self._watch.exits() if self._watch is not None else ():
            value = deserialize(data, True)
            if not is_result:
                raise exception_of(value)
            found.append(value)
        return found

    def insights(self) -> PoolInsights:
        """What the workers have done with their time up to now.

        Returns
        -------
        PoolInsights
            For each worker, also those that have ended: `tasks`, `start_up_s`, `init_s`,
            `working_s`, `waiting_s`, `exit_s`, and the `slowest` calls with their arguments. `str`
            of it is a table.

        Raises
        ------
        ValueError
            The pool was not made with `insights=True`.

        Examples
        --------
        >>> import time
        >>> from poolray import Pool
        >>> with Pool(2, insights=True) as pool:
        ...     _ = pool.map(time.sleep, [0.0, 0.05, 0.0, 0.0], chunksize=1)
        ...     found = pool.insights()
        >>> found.tasks, found.slowest[0].arguments
        (4, '0.05')
        """
        if self._watch is None or self._extras is None or not self._extras.measures:
            raise ValueError("this pool measures nothing: make it with Pool(insights=True)")
        return self._watch.insights(self._runtime, self._handle.host)

    def __enter__(self) -> Pool:
        self._check_running()
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    def __del__(self) -> None:
        if self._state == _RUN:
            warnings.warn(
                f"unclosed running multiprocessing pool {self!r}",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
        if self._state in (_RUN, _CLOSE):
            runtime = self._runtime
            if runtime.pid == os.getpid() and not runtime.closed:
                runtime.later.append(partial(runtime.terminate_group, self._handle))
                runtime.reactor.ensure_background()

    def __reduce__(self) -> NoReturn:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    def __repr__(self) -> str:
        cls = type(self)
        return (
            f"<{cls.__module__}.{cls.__qualname__} state={self._state} "
            f"pool_size={len(self._handle.host.workers) if self._state != 'INIT' else 0}>"
        )

    @property
    def _pool(self) -> list[WorkerView]:
        """The workers, as programs that look into the standard Pool expect them."""
        return [
            WorkerView(pid, f"ForkPoolWorker-{number}")
            for number, pid in enumerate(self._runtime.worker_pids(self._handle), 1)
        ]


def _extras_of(
    worker_state: bool | Callable[[], Any] | None,
    worker_init: Callable[..., object] | None,
    worker_exit: Callable[..., Any] | None,
    insights: bool,
) -> WorkerExtras | None:
    """What workers do beyond running calls; None: nothing."""
    if not (worker_state is None or isinstance(worker_state, bool) or callable(worker_state)):
        raise TypeError(
            "worker_state must be True (each worker has a dict) or a callable that makes the "
            f"state in each worker, not {type(worker_state).__name__}"
        )
    for name, function in (("worker_init", worker_init), ("worker_exit", worker_exit)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a callable, not {type(function).__name__}")
    if not (worker_state or worker_init or worker_exit or insights):
        return None
    return WorkerExtras(
        make_state=dict if worker_state is True else worker_state or None,
        init=worker_init,
        exit=worker_exit,
        measures=bool(insights),
    )


def _close_all(bars: dict[ProgressBar, None]) -> None:
    while bars:
        bars.popitem()[0].close()


def _fail_all(cache: dict[int, Any], error: BaseException) -> None:
    for result in list(cache.values()):
        result._set(False, error)
