"""This process's connection to a cluster, if it has one.

What: finds the cluster that an address means, signs on, and lets go of it.
Who calls: `session.py`.
May touch: nothing by itself; ZeroMQ is imported with the first address.
Invariants: a process has one connection at a time, and it is not that of the process it was forked
from.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING

from poolray.local import process_state

if TYPE_CHECKING:
    from poolray.cluster.driver import DriverRuntime

ADDRESS_VARIABLE = "POOLRAY_ADDRESS"
#: What an address begins with that means: from outside of the cluster.
_OUTSIDE = ("poolray://", "ray://")
_current: DriverRuntime | None = None


def runtime() -> DriverRuntime | None:
    """The connection of this process; None: it has none."""
    if _current is None or _current.closed or _current.pid != os.getpid():
        return None
    return _current


def resolve(address: str | None) -> str | None:
    """The address to use: the one given, or that of `POOLRAY_ADDRESS`; None: this machine alone."""
    if address is None:
        address = os.environ.get(ADDRESS_VARIABLE) or None
    return None if address == "local" else address


def pool_address(address: str | None) -> str | None:
    """The same for a Pool or an Executor: those of tasks stay where they are, unless told."""
    return None if address is None and process_state.is_worker() else resolve(address)


def outside_address(address: str) -> str | None:
    """HOST:PORT of an address for drivers outside of the cluster; None: it is for those inside.

    Raises
    ------
    ValueError
        It names no host and port.
    """
    for prefix in _OUTSIDE:
        if address.startswith(prefix):
            from poolray.cluster.switch import split_address

            bare = address.removeprefix(prefix).rstrip("/")
            split_address(bare)
            return bare
    return None


def connect(address: str, namespace: str, log_to_driver: bool) -> DriverRuntime:
    """Sign on as a driver; the caller holds the lock of `process_state`.

    Raises
    ------
    ConnectionError
        There is no cluster, or it does not answer; the message names the address.
    AuthenticationError
        It does not know our token.
    """
    global _current
    from poolray.cluster import launch
    from poolray.cluster.driver import DriverRuntime
    from poolray.cluster.line import LocalLine
    from poolray.cluster.remote_line import RemoteLine
    from poolray.protocol import PROTOCOL_VERSION
    from poolray.protocol.cluster import Hello

    given, outside = address, outside_address(address)
    address = launch.resolve_auto(address)
    hello = Hello(
        protocol_version=PROTOCOL_VERSION,
        pid=os.getpid(),
        namespace=namespace,
        entrypoint=" ".join(sys.argv)[:1000],
        log_to_driver=log_to_driver,
        is_remote=outside is not None,
    )
    line: LocalLine | RemoteLine
    if outside is not None:
        credentials = launch.credentials_for(outside)
        line = RemoteLine(*launch.find_server(outside, credentials), credentials, hello)
    else:
        row = launch.find_node(address, launch.credentials_for(address))
        line = LocalLine(row.info["socket"], hello)
    made = DriverRuntime(line, given)
    made.client.install()
    process_state.install_driver(made.client)
    _current = made
    return made


def disconnect() -> None:
    """Let go of the connection, if there is one."""
    global _current
    found, _current = runtime(), None
    if found is not None:
        found.shutdown()


# Before the interpreter's end has taken modules apart: what workers printed is shown.
atexit.register(disconnect)
