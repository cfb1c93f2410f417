"""What daemons are started with, and what they say once they are up.

What: records that travel as JSON from who starts a daemon to the daemon, and back.
Who calls: `cluster/launch.py` and the daemons' `main`.
May touch: nothing.
Invariants: a token never stands in an argument or a variable that others could read: it goes
through a pipe.
"""

from __future__ import annotations

import msgspec


class HeadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a head's daemon is started."""

    token: str  #: empty: none
    host: str
    port: int
    temp_dir: str
    session_folder: str
    owner_pid: int = 0  #: a process whose end is the daemon's; 0: none
    storage: str = ""  #: where its state is kept; empty: nowhere
    storage_namespace: str = ""  #: in a server that several clusters share
    config: dict[str, int | float] = {}


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a node's daemon is started."""

    token: str
    head_address: str
    host: str
    port: int
    temp_dir: str
    session_folder: str
    is_head: bool = False  #: it is the one on the head's machine
    owner_pid: int = 0  #: a process whose end is the daemon's; 0: none
    num_gpus: int | None = None
    memory_bytes: int | None = None
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}
    spill_directories: list[str] = []
    config: dict[str, int | float] = {}
    bulk_port: int = 0  #: where other nodes fetch values; 0: any
    worker_ports: list[int] = []  #: where actors take direct calls; empty: any
    worker_logs: list[str] = []  #: names of files that an earlier life of the daemon has left


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon is up."""

    pid: int
    address: str  #: HOST:PORT where it listens
    socket_name: str
    node_id: str = ""
    error: str = ""  #: why it is not, in words
    error_kind: str = ""  #: name of a class of `poolray.exceptions`
