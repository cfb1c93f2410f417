"""The runtime API: init, shutdown, remote, get, put, wait.

What: checks what users pass in, finds or makes the process's runtime, hands over to its client.
Who calls: users, as `poolray.init` and so on.
May touch: nothing by itself; `init` starts processes through the local shell.
Invariants: a process has one client; in a worker it is the worker's, and `init` is not needed.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar, final, overload

from poolray import cluster_connection
from poolray.client import Client, stale_ref_error
from poolray.config import Config
from poolray.exceptions import NotSupportedError
from poolray.generators import ObjectRefGenerator
from poolray.ids import is_actor_call
from poolray.local import process_state
from poolray.local import runtime as local_runtime
from poolray.local.fork_server import WorkerSetup
from poolray.local.machine import HEAD_RESOURCE, NODE_ADDRESS, Wishes, memory_bytes
from poolray.objects import spill_urls
from poolray.objects.object_ref import ObjectRef
from poolray.remote_function import RemoteFunction, check_options
from poolray.remote_placement import check_labels
from poolray.remote_signature import DefinitionOptions, Given_co, RemoteSignature

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from poolray.actor import ActorClass
    from poolray.cluster.driver import DriverRuntime
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

_default_namespace = ""


class RuntimeContextInfo:
    """What `init` returns: facts of the runtime; leaving it as a context shuts down.

    Attributes
    ----------
    address_info : dict
        `node_id` (hex), `address`, `session_dir`, `object_store_address`.
    dashboard_url : str
        Empty: there is no dashboard in local mode.
    python_version, poolray_version : str
    """

    def __init__(self, address_info: dict[str, Any]) -> None:
        from poolray._version import __version__

        self.address_info = address_info
        self.dashboard_url = ""
        self.python_version = ".".join(map(str, sys.version_info[:3]))
        self.poolray_version = __version__
        self.ray_version = __version__

    def __getitem__(self, key: str) -> Any:
        return self.address_info[key]

    def __enter__(self) -> RuntimeContextInfo:
        return self

    def __exit__(self, *_: object) -> None:
        shutdown()

    def disconnect(self) -> None:
        """Shut the runtime down."""
        shutdown()

    def __repr__(self) -> str:
        return f"RuntimeContext(node_id={self.address_info['node_id']!r})"


def init(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    resources: dict[str, float] | None = None,
    labels: dict[str, str] | None = None,
    object_store_memory: int | None = None,
    object_spilling_directory: str | os.PathLike[str] | Sequence[str] | None = None,
    ignore_reinit_error: bool = False,
    namespace: str | None = None,
    include_dashboard: bool | None = None,
    logging_level: Any = None,
    log_to_driver: bool = True,
    configure_logging: bool = True,
    _memory: int | None = None,
    _system_config: dict[str, Any] | None = None,
    **options: Any,
) -> RuntimeContextInfo:
    """Start the runtime in this process.

    Parameters
    ----------
    address : str, optional
        None or "local": this machine, no daemon. "HOST:PORT", as `poolray start --head` prints it:
        the cluster there, which has to have a node on this machine. "auto": the cluster that a
        daemon on this machine belongs to. None takes what `POOLRAY_ADDRESS` says, if it is set.
    num_cpus : int, default: CPUs that this process may run on
        CPUs that tasks may use at once.
    num_gpus : int, default: GPUs that this process may use
        GPUs that tasks may use at once; they are found by themselves, as `CUDA_VISIBLE_DEVICES`
        and its like allow. More than there are may be named, for tests.
    resources : dict of str to float
        Custom resources of this node, in whole numbers.
    labels : dict of str to str
        Labels of this node, for `label_selector`.
    object_store_memory : int, bytes, default 30 % of the machine's memory
        Capacity of the shared memory for large objects; pages are taken as they are used. When it
        is used up, objects that nobody looks at go to disk, and come back when they are needed.
    object_spilling_directory : str, path or sequence of str, default: the temporary folder
        Where to. Several folders, best on several disks, take turns. Each runtime makes a folder of
        its own in them when it writes its first file, and removes it at its end. URLs of storage
        that `fsspec` reaches will do too, with `poolray[fsspec]`; what lies there is read as a
        whole, for it cannot be mapped.
    ignore_reinit_error : bool, default False
        Return quietly when the runtime is up already (it stays as it is).
    namespace : str, optional
        Scope of names of actors.
    include_dashboard : bool, optional
        True is refused: there is no dashboard in this version.
    logging_level : int or str, optional
        Level of the `poolray` logger.
    log_to_driver : bool, default True
        Whether what tasks print arrives here, each line with the task's name and pid.
    configure_logging : bool, default True
        Whether `logging_level` is applied.
    _memory : int, bytes, default: the machine's, less `object_store_memory`
        What tasks with `memory=` share.
    _system_config : dict of str to value, optional
        Fields of `poolray.config.Config`, by name, as `**options`; they override the environment.
    **options
        Fields of `poolray.config.Config`, by name.

    Returns
    -------
    RuntimeContextInfo
        Facts of the runtime; a context manager that shuts it down.

    Raises
    ------
    RuntimeError
        The runtime is up already; an unknown keyword.
    ValueError
        A quantity is negative, fractional or too small; `object_store_memory` is more than the
        machine has; a spill directory cannot be made or written to; a cluster's address together
        with what only its nodes can be started with.
    ConnectionError
        There is no cluster at the address, or it does not answer within seconds.
    AuthenticationError
        The cluster has another token than this process.
    NotSupportedError
        An option that this version does not carry out.

    Notes
    -----
    Forks one small process before it starts any thread; workers are forked from that as tasks
    need them. Called by the first use of the API if you do not.

    Examples
    --------
    >>> import poolray
    >>> with poolray.init(num_cpus=2, ignore_reinit_error=True):
    ...     poolray.get(poolray.remote(lambda n: 2**n).remote(5))
    32
    """
    options = {**_checked_system_config(_system_config), **options}
    address = cluster_connection.resolve(address)
    _check_init(address, num_cpus, num_gpus, resources, object_store_memory, namespace, options)
    if address is not None:
        _check_no_node(labels, object_spilling_directory, _memory, options)
    directories = _spill_directories(object_spilling_directory)
    wishes = Wishes(
        num_gpus=int(num_gpus) if num_gpus is not None else None,
        memory_bytes=_memory,
        resources=resources or {},
        labels=check_labels(labels),
    )
    if include_dashboard:
        raise NotSupportedError("include_dashboard=True: this version of poolray has no dashboard.")
    with process_state.lock:
        if is_initialized():
            if ignore_reinit_error:
                return _context()
            raise RuntimeError(
                "Maybe you called ray.init twice by accident? This error can be suppressed by "
                "passing in 'ignore_reinit_error=True' or by calling 'ray.shutdown()' prior to "
                "'ray.init()'."
            )
        if logging_level is not None and configure_logging:
            import logging

            logging.getLogger("poolray").setLevel(logging_level)
        if address is not None:
            _connect(address, namespace, log_to_driver)
            return _context()
        config = Config.load(
            num_cpus=num_cpus, object_store_memory_bytes=object_store_memory, **options
        )
        _start(config, wishes, namespace, log_to_driver, directories)
        return _context()


def _check_no_node(
    labels: object, spill_directories: object, memory: object, options: dict[str, Any]
) -> None:
    """A cluster's nodes are started already: what they are made with cannot be said here."""
    given = {
        "labels": labels,
        "object_spilling_directory": spill_directories,
        "_memory": memory,
        **options,
    }
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise ValueError(
            f"When connecting to an existing cluster, {', '.join(names)} must not be provided: "
            "give it to `poolray start`."
        )


def _check_init(
    address: str | None,
    num_cpus: float | None,
    num_gpus: float | None,
    resources: dict[str, float] | None,
    object_store_memory: int | None,
    namespace: str | None,
    options: dict[str, Any],
) -> None:
    unknown = [name for name in options if name not in Config.__dataclass_fields__]
    if unknown:
        raise RuntimeError(f"Unknown keyword argument(s): {', '.join(unknown)}")
    if address is not None:
        if num_cpus is not None or num_gpus is not None:
            raise ValueError(
                "When connecting to an existing cluster, num_cpus and num_gpus must not be "
                "provided."
            )
        if resources is not None:
            raise ValueError(
                "When connecting to an existing cluster, resources must not be provided."
            )
        if object_store_memory is not None:
            raise ValueError(
                "When connecting to an existing cluster, object_store_memory must not be provided."
            )
    for name, amount in (("CPU", num_cpus), ("GPU", num_gpus)):
        _check_whole(name, amount)
    _check_custom(resources)
    if object_store_memory is not None and object_store_memory < _STORE_MIN_BYTES:
        raise ValueError(
            f"Attempting to cap object store memory usage at {object_store_memory} bytes, but the "
            f"minimum allowed is {_STORE_MIN_BYTES} bytes."
        )
    if object_store_memory is not None and object_store_memory > memory_bytes():
        raise ValueError(
            f"object_store_memory is {object_store_memory} bytes, and this machine has "
            f"{memory_bytes()} bytes of memory: what the store has no room for goes "
            "to disk, so a smaller one will do."
        )
    if namespace is not None and not isinstance(namespace, str):
        raise TypeError("namespace must be None or a string.")
    if namespace == "":
        raise ValueError('"" is not a valid namespace. Pass None to not specify a namespace.')


def _checked_system_config(given: dict[str, Any] | None) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise TypeError(f"_system_config must be a dictionary of settings: {given!r}")
    unknown = [str(name) for name in given if name not in Config.__dataclass_fields__]
    if unknown:
        raise ValueError(
            f"_system_config names settings that there are none of: {', '.join(unknown)}. Those "
            "that there are, with their reasons, are the fields of poolray.config.Config."
        )
    return given


_STORE_MIN_BYTES = 1 << 20


def _spill_directories(
    given: str | os.PathLike[str] | Sequence[str] | None,
) -> tuple[str, ...]:
    """The folders that objects may be spilled to, by full path or URL; they are there and can be
    used.
    """
    if given is None:
        return ()
    names = [given] if isinstance(given, str | os.PathLike) else list(given)
    directories = []
    for name in names:
        text = os.fspath(name)
        if spill_urls.is_url(text):
            spill_urls.check(text)
            directories.append(text)
            continue
        if not text:
            raise ValueError("object_spilling_directory names no folder.")
        path = os.path.abspath(text)
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"object_spilling_directory {path} cannot be made: {error}. Name a folder that "
                "this user may write to."
            ) from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(
                f"object_spilling_directory {path} cannot be written to by this user: change its "
                "permissions, or name another folder."
            )
        directories.append(path)
    if not directories:
        raise ValueError("object_spilling_directory names no folder.")
    return tuple(dict.fromkeys(directories))


def _check_whole(name: str, amount: float | None) -> None:
    if amount is None:
        return
    if not isinstance(amount, (int, float)):
        raise TypeError(f"The quantity of {name} must be a number: {amount!r}")
    if amount < 0:
        raise ValueError(
            f"Resource quantities must be nonnegative. Violated by resource '{name}' in "
            f"{{'{name}': {amount}}}."
        )
    if amount != int(amount):
        raise ValueError(
            f"Resource quantities must all be whole numbers. Violated by resource '{name}' in "
            f"{{'{name}': {amount}}}."
        )


def _check_custom(resources: dict[str, float] | None) -> None:
    if resources is None:
        return
    if not isinstance(resources, dict):
        raise TypeError(f"resources must be a dictionary of names to quantities: {resources!r}")
    for name, amount in resources.items():
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            raise ValueError(
                f"`{name}` cannot be a custom resource because it is one of the default resources: "
                "use the parameter of init() for it."
            )
        if not isinstance(amount, (int, float)):
            raise TypeError(f"The quantity of resource {name} must be a number: {amount!r}")
        if name == HEAD_RESOURCE:
            raise ValueError(f"{name} is a reserved resource name, use another name instead.")
        _check_whole(name, amount)


def _start(
    config: Config,
    wishes: Wishes,
    namespace: str | None,
    log_to_driver: bool,
    spill_directories: tuple[str, ...] = (),
) -> None:
    """Make the runtime and the group of plain tasks; the caller holds the lock."""
    global _default_namespace
    import uuid

    _default_namespace = namespace or str(uuid.uuid4())
    runtime = local_runtime.ensure(config, wishes, spill_directories)
    if runtime.default_group is None:
        _make_default_group(runtime, log_to_driver)
    assert runtime.default_group is not None
    client = runtime.client
    client.use_serializer(runtime.default_group.serializer)
    client.install()
    process_state.install_driver(client)


def _connect(address: str, namespace: str | None, log_to_driver: bool) -> None:
    """Become a driver of a cluster; the caller holds the lock."""
    global _default_namespace
    import uuid

    name = namespace or str(uuid.uuid4())
    cluster_connection.connect(address, name, log_to_driver)
    _default_namespace = name


def _make_default_group(runtime: local_runtime.LocalRuntime, log_to_driver: bool = True) -> None:
    """Make the group of plain tasks; the caller holds the lock."""
    setup = WorkerSetup(
        config=runtime.config,
        prefix_output=log_to_driver,
        discard_output=not log_to_driver,
        forward_output=_streams_are_replaced(),
        namespace=_default_namespace,
    )
    runtime.default_group = runtime.create_group(
        size=0, start_now=False, setup=setup, out_of_band_all=True, is_default=True
    )


local_runtime.make_default_group = _make_default_group


def _streams_are_replaced() -> bool:
    return sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__


def _context() -> RuntimeContextInfo:
    connection = cluster_connection.runtime()
    if connection is not None:
        facts = connection.welcome
        return RuntimeContextInfo(
            {
                "node_id": facts.node_id.hex(),
                "address": facts.head_address,
                "gcs_address": facts.head_address,
                "node_ip_address": facts.node_address,
                "session_dir": facts.session_folder,
                "object_store_address": "",
            }
        )
    runtime = local_runtime.current()
    setup = process_state.setup()
    node_id = runtime.node_id if runtime is not None else setup.node_id if setup else b""
    return RuntimeContextInfo(
        {
            "node_id": node_id.hex(),
            "address": "local",
            "node_ip_address": NODE_ADDRESS,
            "session_dir": "",
            "object_store_address": "",
        }
    )


def shutdown() -> None:
    """End the runtime: its workers, its objects, its pools.

    Notes
    -----
    Any number of times, also before `init`. Runs by itself when the interpreter ends. In a task it
    does nothing. Blocks until every process is gone.

    Examples
    --------
    >>> import poolray
    >>> ref = poolray.put(1)
    >>> poolray.shutdown()
    >>> poolray.is_initialized()
    False
    """
    if process_state.is_worker():
        return
    with process_state.lock:
        process_state.install_driver(None)
        cluster_connection.disconnect()
        local_runtime.shutdown()


def is_initialized() -> bool:
    """Whether this process can use the API without starting anything.

    Examples
    --------
    >>> import poolray
    >>> ref = poolray.put(1)
    >>> poolray.is_initialized()
    True
    """
    client = process_state.client()
    if client is None:
        return False
    return _is_up()


def _is_up() -> bool:
    """Whether this process's client is of use."""
    return (
        process_state.is_worker()
        or cluster_connection.runtime() is not None
        or local_runtime.current() is not None
    )


def runtime_of_driver() -> DriverRuntime | local_runtime.LocalRuntime:
    """What this driver's client speaks with; the runtime is up."""
    connection = cluster_connection.runtime()
    if connection is not None:
        return connection
    runtime = local_runtime.current()
    assert runtime is not None
    return runtime


def cluster_runtime() -> DriverRuntime | None:
    """The connection of this process to a cluster; None: it has none."""
    return cluster_connection.runtime()


def ids_of_process() -> tuple[bytes, bytes]:
    """Ids of the node and the job that this process belongs to; the runtime is up."""
    setup = process_state.setup()
    if setup is not None:
        return setup.node_id, setup.job_id
    runtime = runtime_of_driver()
    return runtime.node_id, runtime.job_id


def namespace_of_driver() -> str:
    """The namespace that `init` was given, or made."""
    return _default_namespace


def find_client() -> Client:
    """The process's client; starts the runtime if there is none."""
    client = process_state.client()
    if client is not None and _is_up():
        return client
    with process_state.lock:
        if not is_initialized():
            address = cluster_connection.resolve(None)
            if address is not None:
                _connect(address, None, True)
            else:
                _start(Config.load(), Wishes(), None, True)
        client = process_state.client()
        assert client is not None
        return client


def _client_for(ref: ObjectRef[Any]) -> Client:
    """The process's client, which must have been there before the ref.

    Raises
    ------
    ValueError
        There is none: the ref's runtime has been shut down, or is another process's.
    """
    client = process_state.client()
    if client is None or not _is_up():
        raise stale_ref_error(ref)
    return client


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
        return _client_for(object_refs).get([object_refs], timeout, writable)[0]
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
    return _client_for(object_refs[0]).get(object_refs, timeout, writable)


def _check_get_timeout(timeout: Any) -> float | None:
    if not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds, not {type(timeout).__name__}")
    if timeout == -1:
        return None  # as in the reference
    if timeout < 0:
        raise ValueError(f"The 'timeout' argument must be nonnegative. Received {timeout}")
    return timeout


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
    _check_wait(ray_waitables, num_returns, timeout)
    if not ray_waitables:
        find_client()
        return [], []
    # (A generator counts as a ref of its next item.)
    refs: Any = ray_waitables
    ready = _client_for(refs[0]).wait(refs, num_returns, timeout)[:num_returns]
    return [ray_waitables[index] for index in ready], _without(ray_waitables, ready)


@final
class _Rest(list[Any]):
    """What `wait` leaves: different refs, which it need not look at again while nobody changes it.

    Who takes thousands of refs one by one would else have each of them checked thousands of times.
    """

    __slots__ = ("is_checked",)
    is_checked: bool

    def __reduce__(self) -> Any:
        return list, (list(self),)


def _changes(name: str) -> Any:
    change = getattr(list, name)

    @functools.wraps(change)
    def changed(self: _Rest, *args: Any, **kwargs: Any) -> Any:
        self.is_checked = False
        return change(self, *args, **kwargs)

    return changed


for _name in ("__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "extend", "insert"):
    setattr(_Rest, _name, _changes(_name))


def _without(refs: list[W], indexes: list[int]) -> list[W]:
    """The other refs, in order."""
    rest: _Rest
    if len(indexes) < 8:
        rest = _Rest(refs)
        for index in reversed(indexes):
            list.__delitem__(rest, index)
    else:
        chosen = dict.fromkeys(indexes)
        rest = _Rest(ref for index, ref in enumerate(refs) if index not in chosen)
    rest.is_checked = True
    return rest


def _check_wait(refs: Any, num_returns: Any, timeout: Any) -> None:
    if isinstance(refs, (ObjectRef, ObjectRefGenerator)):
        raise TypeError(
            "wait() expected a list of ray.ObjectRef or ray.ObjectRefGenerator, got a single "
            f"ray.ObjectRef or ray.ObjectRefGenerator {refs!r}"
        )
    if not isinstance(refs, list):
        raise TypeError(
            f"wait() expected a list of ray.ObjectRef or ray.ObjectRefGenerator, got {type(refs)}"
        )
    if timeout is not None and timeout < 0:
        raise ValueError(f"The 'timeout' argument must be nonnegative. Received {timeout}")
    is_known = type(refs) is _Rest and refs.is_checked
    for ref in () if is_known else refs:
        if not isinstance(ref, (ObjectRef, ObjectRefGenerator)):
            raise TypeError(
                "wait() expected a list of ray.ObjectRef or ray.ObjectRefGenerator, got list "
                f"containing {type(ref)}"
            )
    if not refs:
        return
    if not is_known and len({ref._id for ref in refs}) != len(refs):
        raise ValueError("Wait requires a list of unique ray_waitables.")
    if num_returns <= 0:
        raise ValueError(f"Invalid number of objects to return {num_returns}.")
    if num_returns > len(refs):
        raise ValueError(
            "num_returns cannot be greater than the number of ray_waitables provided to ray.wait."
        )


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
    if force and is_actor_call(ray_waitable.task_id()):
        raise ValueError("force=True is not supported for actor tasks.")
    find_client().cancel(ray_waitable, bool(force), bool(recursive))
