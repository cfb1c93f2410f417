"""A cluster on one machine, for tests and for trying things out: real daemons, real links.

What: starts a head and any number of nodes as processes of their own, and ends them.
Who calls: users' tests, and ours.
May touch: processes, the temporary folder.
Invariants: what a `Cluster` has started ends with `shutdown()`, with the process that made it, and
when that is killed.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
import time
from typing import Any, final

from poolray import session
from poolray.cluster import launch, places
from poolray.cluster.asking import ask
from poolray.cluster.auth import (
    TOKEN_VARIABLE,
    AuthMode,
    Credentials,
    find_named_token,
    make_token,
    mode,
    write_token,
)
from poolray.cluster.options import HeadOptions, NodeOptions
from poolray.config import Config
from poolray.exceptions import PoolrayError
from poolray.local.machine import check_amounts
from poolray.local.session_folder import lock_folder
from poolray.protocol.cluster import AskNodes, Nodes
from poolray.protocol.directory import NodeRow, NodeStatus
from poolray.scheduling.labels import check_labels

__all__ = ["Cluster", "ClusterNode"]

_STORE_BYTES = 150 << 20


@final
class _Tokens:
    """The token of this process's clusters, where its children look for it."""

    def __init__(self) -> None:
        #: Put into the environment by us; empty: it had one, or there is no cluster.
        self._made = ""
        self._clusters = 0

    def take(self) -> str:
        """The token for one more cluster; empty: it is to have none."""
        if mode() is AuthMode.DISABLED:
            return ""
        found = find_named_token()
        if found is None:
            self._made = os.environ[TOKEN_VARIABLE] = make_token()
        self._clusters += 1
        return self._made if found is None else found[0]

    def give_back(self) -> None:
        """A cluster with a token has ended."""
        self._clusters -= 1
        if not self._clusters and self._made:
            if os.environ.get(TOKEN_VARIABLE) == self._made:
                del os.environ[TOKEN_VARIABLE]
            self._made = ""


_tokens = _Tokens()


@final
class ClusterNode:
    """A node of a `Cluster`. Made by `add_node`.

    Attributes
    ----------
    node_id : str
        Its id in hexadecimal digits, as `poolray.nodes()` shows it.
    pid : int
        The process id of its daemon.
    address : str
        HOST:PORT where other nodes reach it.
    """

    def __init__(self, daemon: launch.Daemon) -> None:
        self._daemon = daemon
        self.node_id = daemon.ready.node_id
        self.pid = daemon.pid
        self.address = daemon.ready.address

    @property
    def unique_id(self) -> str:
        """The same as `node_id`."""
        return self.node_id

    def is_alive(self) -> bool:
        """Whether its daemon has not ended."""
        return self._daemon.is_alive()

    def kill(self) -> None:
        """End the daemon as a crash of the machine would: its workers end with it."""
        self._daemon.kill()

    def stop(self) -> None:
        """End the daemon politely."""
        self._daemon.stop()

    def __repr__(self) -> str:
        return f"ClusterNode({self.node_id[:12]}, {self.address})"


class Cluster:
    """Several nodes on one machine, each with a daemon and workers of its own.

    Parameters
    ----------
    initialize_head : bool, default False
        Start the head and its node at once; else the first `add_node` does.
    connect : bool, default False
        Call `init` with the cluster's address too.
    head_node_args : dict, optional
        Arguments of `add_node` for the head's node; of the head itself `port`, `storage` and
        `_system_config` (fields of `poolray.config.Config`, for all nodes).
    shutdown_at_exit : bool, default True
        End everything when this process ends.

    Notes
    -----
    Every cluster has a temporary folder of its own. Its token is the one that the environment
    names; where it names none, a new one is there, in `POOLRAY_AUTH_TOKEN`, as long as a cluster of
    this process lives, so that programs that it starts can connect as well. With
    `POOLRAY_AUTH_MODE=disabled` there is no token.

    Examples
    --------
    >>> import poolray
    >>> from poolray.cluster_utils import Cluster
    >>> poolray.shutdown()
    >>> cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    >>> node = cluster.add_node(num_cpus=2)
    >>> context = poolray.init(address=cluster.address)
    >>> poolray.get(poolray.remote(num_cpus=2)(lambda: "on the second node").remote())
    'on the second node'
    >>> poolray.shutdown()
    >>> cluster.shutdown()
    """

    def __init__(
        self,
        initialize_head: bool = False,
        connect: bool = False,
        head_node_args: dict[str, Any] | None = None,
        shutdown_at_exit: bool = True,
    ) -> None:
        if connect and not initialize_head:
            raise RuntimeError("Cannot connect to uninitialized cluster.")
        self.head_node: ClusterNode | None = None
        self.worker_nodes: dict[ClusterNode, None] = {}
        self.connected = False
        self._head: launch.Daemon | None = None
        self._head_options: HeadOptions | None = None
        self._config: dict[str, int | float] = {}
        self._folder = ""
        #: Keeps the folder from being swept while this process lives.
        self._lock = -1
        self._token = ""
        self._shutdown_at_exit = shutdown_at_exit
        if shutdown_at_exit:
            atexit.register(self.shutdown)
        if not initialize_head:
            return
        try:
            self.add_node(**(head_node_args or {}))
            if connect:
                self.connect()
        except BaseException:
            self.shutdown()  # nobody has us, who could
            raise

    # ---- addresses -------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """HOST:PORT of the head, for `init(address=…)`.

        Raises
        ------
        RuntimeError
            There is no head yet.
        """
        if self._head is None:
            raise RuntimeError("The cluster has no head yet: call add_node() first.")
        return self._head.ready.address

    @property
    def gcs_address(self) -> str:
        """The same as `address`."""
        return self.address

    @property
    def auth_token_path(self) -> str:
        """The file with the cluster's token, for programs that do not get our environment."""
        return os.path.join(self._folder, "auth_token")

    @property
    def session_folder(self) -> str:
        """Where daemons keep their logs."""
        return self._session

    def connect(self, namespace: str | None = None) -> Any:
        """Call `init` with this cluster's address."""
        context = session.init(address=self.address, namespace=namespace, ignore_reinit_error=True)
        self.connected = True
        return context

    # ---- nodes -----------------------------------------------------------------------------------

    def add_node(self, wait: bool = True, **node_args: Any) -> ClusterNode:
        """Start a node; the first one with the head.

        Parameters
        ----------
        wait : bool, default True
            Return when the head knows it.
        **node_args
            `num_cpus` (default 1), `num_gpus` (default 0), `resources`, `labels`,
            `object_store_memory` (default 150 MiB), `memory`, `object_spilling_directory`,
            `_system_config`; for the first also `port` and `storage`.

        Returns
        -------
        ClusterNode

        Raises
        ------
        TypeError
            There is no such argument.
        ValueError
            An amount or a label that no node can have.
        PoolrayError
            The daemon does not start.
        """
        first = self._head is None
        port, storage = node_args.pop("port", 0), node_args.pop("storage", "")
        if first:
            self._start_head(port, storage, node_args.pop("_system_config", None) or {})
        node = ClusterNode(launch.start(self._node_options(first, node_args)))
        if first:
            self.head_node = node
        else:
            self.worker_nodes[node] = None
        if wait:
            self._wait_for(lambda rows: node.node_id in _alive(rows), 30.0, "the node")
        return node

    def _start_head(self, port: int, storage: str, config: dict[str, Any]) -> None:
        if not self._folder:
            self._folder = tempfile.mkdtemp(prefix="poolray-cluster-")
            if self._shutdown_at_exit:  # else it outlives us, and what it needs does
                self._lock = lock_folder(self._folder)
            self._token = _tokens.take()
            if self._token:
                write_token(self.auth_token_path, self._token)
            self._session = places.make_session_folder(self._folder)
        Config.load(None, **config)  # what is wrong with it is said here
        # (On one machine views of what is free may go around more often.)
        self._config = config = {"heartbeat_interval_s": 0.1, **config}
        self._head_options = HeadOptions(
            token=self._token,
            host="127.0.0.1",
            port=port,
            temp_dir=self._folder,
            session_folder=self._session,
            owner_pid=os.getpid() if self._shutdown_at_exit else 0,
            storage=storage or f"sqlite:///{self._session}/head.db",
            config=config,
        )
        self._head = launch.start(self._head_options)
        if self._token:
            launch.known_tokens[self.address] = self._token

    def _node_options(self, is_head: bool, arguments: dict[str, Any]) -> NodeOptions:
        given = dict(arguments)
        names = ("num_cpus", "num_gpus", "resources", "object_store_memory", "memory")
        check_amounts(*map(given.get, names))
        spill = given.pop("object_spilling_directory", None)
        config = {**self._config, **(given.pop("_system_config", None) or {})}
        cpus = given.pop("num_cpus", 1)
        store = given.pop("object_store_memory", None)
        config["num_cpus"] = 1 if cpus is None else cpus
        config["object_store_memory_bytes"] = store or _STORE_BYTES
        gpus = given.pop("num_gpus", 0)
        options = NodeOptions(
            token=self._token,
            head_address=self.address,
            host="127.0.0.1",
            port=0,
            temp_dir=self._folder,
            session_folder=self._session,
            is_head=is_head,
            owner_pid=os.getpid() if self._shutdown_at_exit else 0,
            num_gpus=gpus,
            memory_bytes=given.pop("memory", None),
            resources=given.pop("resources", None) or {},
            labels=check_labels(given.pop("labels", None)),
            spill_directories=[spill] if isinstance(spill, str) else list(spill or ()),
            config=config,
        )
        if given:
            raise TypeError(f"add_node() has no argument {', '.join(given)}")
        return options

    def remove_node(self, node: ClusterNode, allow_graceful: bool = True) -> None:
        """End a node.

        Parameters
        ----------
        node : ClusterNode
            What `add_node` gave.
        allow_graceful : bool, default True
            Let the daemon say goodbye; False kills it, and with it its workers, as the loss of the
            machine would.

        Raises
        ------
        ValueError
            This process speaks with that node, or it is none of the cluster's.
        """
        if node is not self.head_node and node not in self.worker_nodes:
            raise ValueError(f"{node!r} is not a node of this cluster, or not any more")
        runtime = session.cluster_runtime()
        if runtime is not None and runtime.node_id.hex() == node.node_id:
            session.shutdown()
            raise ValueError(
                "Removing a node that is connected to this client is not allowed because it will "
                "break the driver."
            )
        if allow_graceful:
            node.stop()
        else:
            node.kill()
        if node is self.head_node:
            self.head_node = None
        else:
            del self.worker_nodes[node]

    def list_all_nodes(self) -> list[ClusterNode]:
        """All nodes that were added and not removed, the head's first."""
        head = [self.head_node] if self.head_node is not None else []
        return [*head, *self.worker_nodes]

    @property
    def remaining_processes_alive(self) -> bool:
        """Whether the head and all nodes that were not removed live."""
        daemons = self.list_all_nodes()
        return bool(self._head and self._head.is_alive()) and all(n.is_alive() for n in daemons)

    def wait_for_nodes(self, timeout: float = 30) -> None:
        """Wait until the head knows all nodes that were added, and none that was removed.

        Raises
        ------
        TimeoutError
            That takes longer.
        """
        wanted = {node.node_id for node in self.list_all_nodes()}
        self._wait_for(lambda rows: _alive(rows) == wanted, timeout, "all nodes")

    def _wait_for(self, holds: Any, timeout_s: float, what: str) -> None:
        credentials = Credentials.of(self._token) if self._token else None
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"Timed out while waiting for {what} of the cluster to join.")
            asked = [self.address, *(node.address for node in self.list_all_nodes())]
            if all(holds(ask(a, AskNodes(), Nodes, credentials, left_s).nodes) for a in asked):
                return
            time.sleep(0.005)

    # ---- the head --------------------------------------------------------------------------------

    def kill_head(self) -> None:
        """Kill the head's daemon; nodes go on, and wait for another one at its address."""
        if self._head is None:
            raise PoolrayError("the cluster has no head")
        self._head.kill()

    def restart_head(self) -> None:
        """Start the head's daemon again, with what it had stored, at its old address."""
        assert self._head is not None
        assert self._head_options is not None
        port = int(self.address.rpartition(":")[2])
        options = self._head_options
        self._head = launch.start(type(options)(**{**_fields(options), "port": port}))

    # ---- the end ---------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """End all daemons, and remove the cluster's folder."""
        nodes = self.list_all_nodes()
        for node in nodes:
            if node.is_alive():
                os.kill(node.pid, signal.SIGTERM)
        for node in nodes:
            node.stop()
        if self._head is not None:
            launch.known_tokens.pop(self.address, None)
            self._head.stop()
        self.head_node, self._head = None, None
        self.worker_nodes.clear()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""
            if self._token:
                _tokens.give_back()
                self._token = ""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        atexit.unregister(self.shutdown)


def _alive(rows: list[NodeRow]) -> set[str]:
    return {row.node_id.hex() for row in rows if row.status is not NodeStatus.DEAD}


def _fields(options: HeadOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in options.__struct_fields__}
