"""Starts and ends daemons, and finds those that run.

What: a process per daemon, its options through a pipe, its answer through another; which daemon on
this machine belongs to which cluster.
Who calls: the command line, `cluster_utils`, `init` with an address.
May touch: processes, pipes, signals.
Invariants: whoever starts a daemon knows when it returns whether the daemon is up; a daemon that is
not is not left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import final

import msgspec

from poolray import exceptions
from poolray.cluster import daemon, places
from poolray.cluster.asking import ask
from poolray.cluster.auth import AuthMode, Credentials, find_named_token, find_token, mode
from poolray.cluster.options import HeadOptions, NodeOptions, Ready
from poolray.cluster.switch import split_address
from poolray.exceptions import ClusterConnectionError, PoolrayError
from poolray.ids import NodeId
from poolray.protocol.cluster import AskNodes, AskWho, Nodes, Who
from poolray.protocol.directory import NodeRow, NodeStatus

_START_S = 30.0
#: Nodes that a driver outside of the cluster tries to reach.
_SERVERS_TRIED = 3

#: Address -> token, of clusters that this process has started; what the environment names is first.
known_tokens: dict[str, str] = {}


@final
class Daemon:
    """A daemon that this process has started."""

    def __init__(self, process: subprocess.Popen[bytes], ready: Ready) -> None:
        self._process = process
        self.ready = ready
        self.pid = process.pid

    def is_alive(self) -> bool:
        """Whether its process has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it as a crash would: without a word to anybody."""
        self._process.kill()
        self._process.wait()

    def stop(self, patience_s: float = 10.0) -> None:
        """End it politely, by force when that takes too long."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def wait(self) -> int:
        """Until it ends; gives its exit code."""
        return self._process.wait()

    def leave(self) -> None:
        """It goes on after this process."""
        self._process.returncode = 0  # Popen must not warn that it still runs


def wait_for_any(daemons: list[Daemon]) -> int:
    """Until one of them has ended; gives its exit code."""
    ends = {daemon.pidfd(each.pid): each for each in daemons}
    if -1 in ends:  # this system does not tell of processes: then the first of them counts
        return daemons[0].wait()
    try:
        return ends[daemon.wait_readable(list(ends), None)[0]].wait()
    finally:
        for descriptor in ends:
            os.close(descriptor)


def start(options: HeadOptions | NodeOptions) -> Daemon:
    """Start a daemon, and wait until it is up.

    Raises
    ------
    PoolrayError, OSError, ValueError
        It could not start, for this reason.
    """
    role = "head" if isinstance(options, HeadOptions) else "node"
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "poolray.cluster", role, str(writer)],
            stdin=subprocess.PIPE,
            pass_fds=[writer],
            start_new_session=True,
        )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(options))
        process.stdin.close()
        ready = _await_ready(reader)
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        os.close(reader)
    if ready.error:
        process.wait()
        raise _error_of(ready)
    return Daemon(process, ready)


def _await_ready(reader: int) -> Ready:
    deadline = time.monotonic() + _START_S
    data = b""
    # (Not until the pipe ends: a node that has joined may have forked workers, which have it too.)
    while not data.endswith(b"\n"):
        if not daemon.wait_readable([reader], deadline - time.monotonic()):
            raise PoolrayError(f"The daemon was not up after {_START_S:.0f} s.")
        part = os.read(reader, 65536)
        if not part:
            break
        data += part
    if not data:
        raise PoolrayError("The daemon ended before it was up: its output says why.")
    return msgspec.json.decode(data, type=Ready)


def _error_of(ready: Ready) -> Exception:
    kind = getattr(exceptions, ready.error_kind, None)
    if kind in (exceptions.AuthenticationError, exceptions.ClusterConnectionError):
        error: Exception = kind(ready.error)
        return error
    if ready.error_kind == "ValueError":
        return ValueError(ready.error)
    return PoolrayError(f"The daemon does not start: {ready.error}")


# ---- finding -------------------------------------------------------------------------------------


def credentials_for(address: str, path: str | None = None) -> Credentials | None:
    """Keys from the token that this user has for a cluster, if links need one.

    Raises
    ------
    AuthenticationError
        There is none.
    """
    if mode() is AuthMode.DISABLED:
        return None
    if address in known_tokens and path is None and find_named_token() is None:
        return Credentials.of(known_tokens[address])
    found = find_token(path)
    if found is None:
        raise exceptions.AuthenticationError(
            f"There is no token for the cluster at {address}: put the one that `poolray "
            "get-auth-token` prints on the head's machine into POOLRAY_AUTH_TOKEN, or into a file "
            "named by --auth-token-file or POOLRAY_AUTH_TOKEN_PATH (with POOLRAY_AUTH_MODE="
            "disabled a cluster of this machine alone needs none)."
        )
    return Credentials.of(found[0])


def find_head(temp: str | None = None) -> str | None:
    """The address of the cluster that a daemon on this machine belongs to, the latest first."""
    wanted = places.folder_hash(places.temp_dir(temp))
    found = list(places.listeners())
    mine = [listener for listener in found if listener.folder_hash == wanted]
    for listener in reversed(mine or ([] if temp else found)):
        return listener.head_address
    return None


def resolve_auto(address: str) -> str:
    """The address, or what "auto" means: that of the cluster of this machine.

    Raises
    ------
    ClusterConnectionError
        There is none.
    """
    if address != "auto":
        return address
    found = find_head()
    if found is None:
        raise ClusterConnectionError(
            "Could not find any running Ray instance. Please specify the one to connect to by "
            "setting `--address` flag or `POOLRAY_ADDRESS` environment variable, or start "
            "one with `poolray start --head`."
        )
    return found


def find_node(address: str, credentials: Credentials | None) -> NodeRow:
    """The node of a cluster that runs on this machine.

    Raises
    ------
    AuthenticationError, ClusterConnectionError
        There is no cluster, it does not let us in, or it has no node here.
    """
    nodes = ask(address, AskNodes(), Nodes, credentials).nodes
    machine = places.machine_id()
    names = {listener.name for listener in places.listeners()}
    here = [
        row
        for row in nodes
        if row.status is not NodeStatus.DEAD
        and row.info.get("machine") == machine
        and row.info.get("socket") in names
    ]
    for row in sorted(here, key=lambda row: not row.info.get("is_head")):
        return row
    raise ClusterConnectionError(
        f"No node of the cluster at {address} runs on this machine: start one with `poolray start "
        f"--address={address}`, or work from outside with init(address='poolray://{address}')."
    )


def find_server(address: str, credentials: Credentials | None) -> tuple[NodeId, str, int]:
    """The node that serves drivers outside of the cluster, and the host and port of its daemon.

    Parameters
    ----------
    address : str
        HOST:PORT of the head: then the node beside it, or another one that can be reached. Or of a
        node: then that one.

    Raises
    ------
    AuthenticationError, ClusterConnectionError
        There is no cluster, it does not let us in, or none of its nodes can be reached.
    """
    who = ask(address, AskWho(), Who, credentials)
    if who.node_id:
        return who.node_id, *split_address(address)
    rows = ask(address, AskNodes(), Nodes, credentials).nodes
    alive = [row for row in rows if row.status is NodeStatus.ALIVE]
    reasons = []
    for row in sorted(alive, key=lambda row: not row.info.get("is_head"))[:_SERVERS_TRIED]:
        try:
            found = ask(row.address, AskWho(), Who, credentials)
        except exceptions.AuthenticationError:
            raise
        except ClusterConnectionError as error:
            reasons.append(str(error))
            continue
        return found.node_id, *split_address(row.address)
    raise ClusterConnectionError(
        f"The head at {address} answers, but no node that could serve drivers outside of the "
        "cluster: " + (" ".join(reasons) or "it has none.")
    )


def stop_all(temp: str | None, force: bool, patience_s: float) -> tuple[int, int]:
    """End this user's daemons on this machine: those with a temp dir, or all.

    Returns
    -------
    stopped : int
        How many there were.
    killed : int
        How many of them had to be killed.
    """
    wanted = None if temp is None else places.folder_hash(places.temp_dir(temp))
    found = [each for each in places.listeners() if wanted in (None, each.folder_hash)]
    # Nodes first: they say goodbye to their head.
    killed = 0
    for role in ("node", "head"):
        pids = [each.pid for each in found if each.role == role]
        ends = {pid: daemon.pidfd(pid) for pid in pids}
        for pid in pids:
            _signal(pid, signal.SIGKILL if force else signal.SIGTERM)
        deadline = time.monotonic() + patience_s
        for pid, descriptor in ends.items():
            if descriptor < 0:
                continue
            if not daemon.wait_readable([descriptor], deadline - time.monotonic()):
                killed += 1
                _signal(pid, signal.SIGKILL)
                daemon.wait_readable([descriptor], 5.0)
            os.close(descriptor)
    return len(found), killed


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has ended by itself
