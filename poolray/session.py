"""The runtime of this process: started, found, ended.

What: `init`, `shutdown`, and the client that the calls of the API go through.
Who calls: users, as `poolray.init` and so on; `api.py` and its neighbours for the client.
May touch: nothing by itself; `init` starts processes through the local shell, or connects.
Invariants: a process has one client; in a worker it is the worker's, and `init` is not needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from poolray import cluster_connection, init_checks
from poolray.client import Client, stale_ref_error
from poolray.config import Config
from poolray.exceptions import NotSupportedError
from poolray.ids import NodeId
from poolray.local import process_state
from poolray.local import runtime as local_runtime
from poolray.local.fork_server import WorkerSetup
from poolray.local.machine import NODE_ADDRESS, Wishes
from poolray.objects.object_ref import ObjectRef
from poolray.plain_values import plain
from poolray.scheduling.labels import check_labels

if TYPE_CHECKING:
    from poolray.cluster.driver import DriverRuntime

_default_namespace = ""


class RuntimeContextInfo:
    """What `init` returns: facts of the runtime; leaving it as a context shuts down.

    Attributes
    ----------
    address_info : dict
        `node_id` (hex), `address`, `gcs_address`, `node_ip_address`, `session_dir`,
        `object_store_address`.
    dashboard_url : str
        Empty: there is no dashboard in local mode.
    python_version, poolray_version, ray_version : str
    ray_commit : str
        Empty: releases have a version only.
    """

    def __init__(self, address_info: dict[str, Any]) -> None:
        from poolray._version import __version__

        self.address_info = address_info
        self.dashboard_url = ""
        self.python_version = ".".join(map(str, sys.version_info[:3]))
        self.poolray_version = __version__
        self.ray_version = __version__
        self.ray_commit = ""

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
        the cluster there, which has to have a node on this machine. "poolray://HOST:PORT": the same
        from a machine that is none of the cluster's; values travel through the connection, which
        may be cut for `client_reconnect_grace_period_s` (30 s; the cluster's). "auto": the cluster
        that a daemon on this machine belongs to. None takes what `POOLRAY_ADDRESS` says, if it is
        set.
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
    options = {
        **init_checks.checked_system_config(_system_config),
        **init_checks.without_reference_only(options),
    }
    address = cluster_connection.resolve(address)
    init_checks.check_init(
        address, num_cpus, num_gpus, resources, object_store_memory, namespace, options
    )
    if address is not None:
        init_checks.check_no_node(labels, object_spilling_directory, _memory, options)
    directories = init_checks.find_spill_directories(object_spilling_directory)
    wishes = Wishes(
        num_gpus=int(num_gpus) if num_gpus is not None else None,
        memory_bytes=_memory,
        resources=plain(resources) or {},
        labels=plain(check_labels(labels)),
    )
    if include_dashboard:
        raise NotSupportedError("include_dashboard=True: this version of poolray has no dashboard.")
    namespace = plain(namespace)
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
            "gcs_address": "local",
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
        local_runtime.current() is not None  # first: there it matters how long this takes
        or process_state.is_worker()
        or cluster_connection.runtime() is not None
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


def ids_of_process() -> tuple[NodeId, bytes]:
    """Ids of the node and the job that this process belongs to; the runtime is up."""
    setup = process_state.setup()
    if setup is not None:
        return NodeId(setup.node_id), setup.job_id
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


def client_for_all(refs: list[Any]) -> Client:
    """The same for several refs (see `client_for`), none of which is looked at if all is well."""
    client = process_state.client()
    if client is None or not _is_up():
        raise stale_ref_error(refs[0])
    return client


def client_for(ref: ObjectRef[Any]) -> Client:
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
