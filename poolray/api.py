"""The runtime API: remote, get, put, wait, cancel; `init` and its like come from `session.py`.

What: checks what users pass in, and hands it over to the process's client.
Who calls: users, as `poolray.get` and so on.
May touch: nothing by itself.
Invariants: what is wrong with a call is raised before anything of it is sent.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar, overload

from poolray.client_waits import WaitOptions, wait_and_rest
from poolray.generators import ObjectRefGenerator
from poolray.ids import is_actor_call, task_of
from poolray.objects.object_ref import ObjectRef
from poolray.remote_function import RemoteFunction, check_options
from poolray.remote_signature import DefinitionOptions, Given_co, RemoteSignature
from poolray.session import (
    RuntimeContextInfo,
    client_for,
    client_for_all,
    find_client,
    init,
    is_initialized,
    shutdown,
)
from poolray.wait_lists import check_wait

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from poolray.actor import ActorClass
    from poolray.remote_signature import ActorDefinitionOptions

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
W = TypeVar("W", bound="ObjectRef[Any] | ObjectRefGenerator[Any]")

__all__ = [
    "RuntimeContextInfo",
    "cancel",
    "get",
    "init",
    "is_initialized",
    "put",
    "remote",
    "shutdown",
    "wait",
]

_DECORATOR_USE = (
    "The @ray.remote decorator must be applied either with no arguments and no parentheses, for "
    "example '@ray.remote', or it must be applied using some of the arguments in the list "
    "['num_cpus', 'num_returns', 'resources', 'max_retries', 'retry_exceptions', 'max_calls', "
    "'name', …], for example '@ray.remote(num_returns=2, resources={\"CustomResource\": 1})'."
)


class _RemoteDecorator(Protocol):
    """What `remote(...)` with options gives."""

    @overload
    def __call__(self, actor_class: type[T], /) -> ActorClass[T]: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, function: Callable[P, R], /) -> RemoteFunction[P, R]: ...


class _ActorDecorator(Protocol):
    """What `remote(...)` with options that only actors have gives."""

    def __call__(self, actor_class: type[T], /) -> ActorClass[T]: ...


class _RemoteDecoratorOf(Protocol[Given_co]):
    """The same for `num_returns` other than 1."""

    def __call__(
        self, function: Callable[P, R], /
    ) -> RemoteSignature[P, R, Callable[P, R], Given_co]: ...


@overload
def remote(actor_class: type[T], /) -> ActorClass[T]: ...  # type: ignore[overload-overlap]


@overload
def remote(function: Callable[P, R], /) -> RemoteFunction[P, R]: ...


@overload
def remote(  # type: ignore[overload-overlap]
    *, num_returns: Literal[0], **options: Unpack[DefinitionOptions]
) -> _RemoteDecoratorOf[None]: ...


@overload
def remote(  # type: ignore[overload-overlap]
    *, num_returns: Literal[1] | None = None, **options: Unpack[DefinitionOptions]
) -> _RemoteDecorator: ...


@overload
def remote(
    *, num_returns: int, **options: Unpack[DefinitionOptions]
) -> _RemoteDecoratorOf[list[ObjectRef[Any]]]: ...


@overload
def remote(
    *, num_returns: Literal["streaming"], **options: Unpack[DefinitionOptions]
) -> _RemoteDecoratorOf[ObjectRefGenerator[Any]]: ...


@overload
def remote(
    *, num_returns: Literal["dynamic"], **options: Unpack[DefinitionOptions]
) -> _RemoteDecoratorOf[ObjectRef[Any]]: ...


@overload
def remote(**options: Unpack[ActorDefinitionOptions]) -> _ActorDecorator: ...


def remote(*args: Any, **options: Any) -> Any:
    """Make a function run in workers, or a class an actor: `@remote`, `@remote(num_cpus=2, …)`.

    Parameters
    ----------
    num_returns, num_cpus, resources, max_retries, retry_exceptions, name
        See `RemoteFunction.options`.
    max_calls : int
        Calls after which the worker is replaced; 0: never.
    name, namespace, lifetime, max_restarts, max_concurrency, …
        Of a class; see `poolray.actor.ActorClass.options`.
    concurrency_groups : dict of str to int
        Of a class: names of groups of its methods (`@poolray.method(concurrency_group=...)`), and
        how many calls of each run at once.

    Returns
    -------
    RemoteFunction or ActorClass
        Call it with `.remote(...)`.

    Raises
    ------
    TypeError
        Neither a function nor a class; a bad value.
    ValueError
        An unknown option, a value out of range, a coroutine function.

    Examples
    --------
    >>> import poolray
    >>> @poolray.remote
    ... def twice(x: int) -> int:
    ...     return 2 * x
    >>> poolray.get([twice.remote(i) for i in range(3)])
    [0, 2, 4]
    """
    if len(args) == 1 and not options and callable(args[0]):
        return _make_remote(args[0], {})
    if args or not options:
        raise AssertionError(_DECORATOR_USE)
    from poolray.actor_options import ACTOR_ONLY

    for name in options:
        if name not in ACTOR_ONLY and name != "object_store_memory":
            check_options({name: options[name]})  # the rest depends on what is decorated
    return lambda function: _make_remote(function, options)


def _make_remote(function: Any, options: dict[str, Any]) -> Any:
    if inspect.isclass(function):
        from poolray.actor import make_actor_class

        return make_actor_class(function, options)
    check_options(options)
    if not isinstance(function, types.FunctionType):
        raise TypeError(
            "The @ray.remote decorator must be applied to either a function or a class."
        )
    return RemoteFunction(function, options, find_client)


@overload
def get(
    object_refs: ObjectRef[R], *, timeout: float | None = None, writable: bool = False
) -> R: ...


@overload
def get(
    object_refs: list[ObjectRef[R]], *, timeout: float | None = None, writable: bool = False
) -> list[R]: ...


def get(object_refs: Any, *, timeout: float | None = None, writable: bool = False) -> Any:
    """The value of a ref, or the list of values of a list of refs.

    Parameters
    ----------
    object_refs : ObjectRef or list of ObjectRef
    timeout : float, seconds, optional
        None waits for ever.
    writable : bool, default False
        Large arrays are views of shared memory: read-only, unless this is true; then they are
        copied page by page as they are written to.

    Raises
    ------
    TaskError
        The task raised; the error is also an instance of the exception's own class, and the
        original, with its remote traceback, is its `__cause__`.
    GetTimeoutError
        The time is up.
    WorkerCrashedError
        The worker died, and `max_retries` further attempts failed as well.
    ValueError, TypeError
        Something else than a ref, or a list of refs, was passed; a ref of a runtime that has been
        shut down, or of the process that this one was forked from.

    Notes
    -----
    Blocks. In a list, the first error that arrives is raised without waiting for the rest. In a
    task, the task's CPUs serve others meanwhile. Ctrl-C interrupts it at once.

    Examples
    --------
    >>> import poolray
    >>> poolray.get([poolray.put(1), poolray.put(2)])
    [1, 2]
    """
    if timeout is not None:
        timeout = _check_get_timeout(timeout)
    if isinstance(object_refs, ObjectRef):
        return client_for(object_refs).get([object_refs], timeout, writable)[0]
    if isinstance(object_refs, ObjectRefGenerator):
        return object_refs  # as in the reference
    if not isinstance(object_refs, list):
        raise ValueError(
            f"Invalid type of object refs, {type(object_refs)}, is given. 'object_refs' must "
            "either be an ObjectRef or a list of ObjectRefs. "
        )
    for value in object_refs:
        if not isinstance(value, ObjectRef):
            raise TypeError(
                f"Attempting to call `get` on the value {value!r:.200}, which is not an "
                "ray.ObjectRef."
            )
    if not object_refs:
        find_client()
        return []
    return client_for(object_refs[0]).get(object_refs, timeout, writable)


def _check_get_timeout(timeout: Any) -> float | None:
    if not isinstance(timeout, (int, float)):
        from numbers import Real  # numpy's are

        if not isinstance(timeout, Real):
            raise TypeError(f"timeout must be a number of seconds, not {type(timeout).__name__}")
    if timeout == -1:
        return None  # as in the reference
    if timeout < 0:
        raise ValueError(f"The 'timeout' argument must be nonnegative. Received {timeout}")
    return float(timeout)


def put(value: T) -> ObjectRef[T]:
    """Store a value once, for any number of tasks.

    Raises
    ------
    TypeError
        The value is a ref, or cannot be serialized.
    ObjectStoreFullError
        There is no room for it.

    Notes
    -----
    Copies the value: later changes of the original are not seen.

    Examples
    --------
    >>> import poolray
    >>> poolray.get(poolray.put({"a": 1}))
    {'a': 1}
    """
    client = find_client()
    if isinstance(value, ObjectRef):
        raise TypeError(
            "Calling 'put' on an ray.ObjectRef is not allowed. If you really want to do this, you "
            "can wrap the ray.ObjectRef in a list and call 'put' on it."
        )
    return client.put(value)


def wait(
    ray_waitables: list[W],
    *,
    num_returns: int = 1,
    timeout: float | None = None,
    fetch_local: bool = True,
) -> tuple[list[W], list[W]]:
    """Wait until some of the refs are ready.

    Parameters
    ----------
    ray_waitables : list of ObjectRef and ObjectRefGenerator
        Different refs and generators. A generator is ready when `next()` would not wait; waiting
        takes no item.
    num_returns : int, default 1
        How many to wait for.
    timeout : float, seconds, optional
        None waits for ever.
    fetch_local : bool, default True
        Whether an object on another node counts as ready only once it has been fetched here; on
        one machine it is here.

    Returns
    -------
    ready, rest : lists of ObjectRef
        In input order; `ready` has at the most `num_returns`.

    Raises
    ------
    TypeError, ValueError
        Not a list of different refs; `num_returns` out of range; a negative timeout; a ref of a
        runtime that has been shut down, or of the process that this one was forked from.

    Examples
    --------
    >>> import poolray
    >>> ready, rest = poolray.wait([poolray.put(1), poolray.put(2)])
    >>> len(ready), len(rest)
    (1, 1)
    """
    if not check_wait(ray_waitables, num_returns, timeout):
        find_client()
        return [], []
    # (A generator counts as a ref of its next item.)
    options = WaitOptions(num_returns, timeout, bool(fetch_local))
    return wait_and_rest(client_for_all(ray_waitables), ray_waitables, options)


def cancel(
    ray_waitable: ObjectRef[Any] | ObjectRefGenerator[Any],
    *,
    force: bool = False,
    recursive: bool = True,
) -> None:
    """Stop the task that makes an object.

    A task that has not begun never runs. One that runs gets a KeyboardInterrupt; if it catches
    that, what it returns is its result. A task that has ended stays as it is, and an object of
    `put` too. A cancelled task is not tried again, whatever its `max_retries`.

    Parameters
    ----------
    ray_waitable : ObjectRef or ObjectRefGenerator
        The ref; of several return values of a task, any; of a generator its handle.
    force : bool, default False
        Kill the worker that runs the task instead of asking it: for code that does not return to
        the interpreter, or swallows every exception.
    recursive : bool, default True
        Stop the tasks that the task has submitted and that have not ended, by the same means.

    Raises
    ------
    TypeError
        It is no ObjectRef.
    ValueError
        `force` for a call of an actor: `kill` ends actors.

    Notes
    -----
    Calls of actors that have not begun never run either. One that runs is cancelled as asyncio
    cancels, where it is a coroutine; any other goes on, for the actor's state must not be torn, and
    may ask `get_runtime_context().is_canceled()`.

    Does not wait. `get` raises TaskCancelledError, unless the task had ended or ends in its own
    way; so do tasks that have the ref as an argument. The interrupt is raised in the worker's main
    thread: threads of the task are left alone.

    Examples
    --------
    >>> import time, poolray
    >>> ref = poolray.remote(lambda: time.sleep(60)).remote()
    >>> poolray.cancel(ref)
    >>> try:
    ...     poolray.get(ref)
    ... except poolray.exceptions.TaskCancelledError:
    ...     print("cancelled")
    cancelled
    """
    if type(ray_waitable) is ObjectRefGenerator:
        ray_waitable = ray_waitable.completed()
    if type(ray_waitable) is not ObjectRef:
        raise TypeError(
            "ray.cancel() only supported for object refs. For actors, try ray.kill(). "
            f"Got: {type(ray_waitable)}."
        )
    if force and is_actor_call(task_of(ray_waitable._id)):
        raise ValueError("force=True is not supported for actor tasks.")
    find_client().cancel(ray_waitable, bool(force), bool(recursive))
