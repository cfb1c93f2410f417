"""Where daemons are found on this machine, and where they keep what they write.

    <temp dir>/session_<date>_<time>_<pid>/   one folder per run of a cluster
                                   logs/      what daemons say, and what workers write past us
    <temp dir>/session_latest                 the newest of them

What: names of the sockets that drivers sign on at, who listens on this machine, folders.
Who calls: daemons, drivers, the command line.
May touch: folders, `/proc`, the environment.
Invariants: a daemon's socket has no file (Linux's abstract names), so that nothing is left behind
however it ends; only its own user is let in, which `check_peer` sees to.
"""

from __future__ import annotations

import hashlib
import logging
import logging.handlers
import os
import re
import socket
import struct
import tempfile
import time
from collections.abc import Iterator

import msgspec

TEMP_VARIABLE = "POOLRAY_TMPDIR"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_LOG_BYTES = 16 << 20
_LOG_FILES = 4


class Listener(msgspec.Struct, frozen=True):
    """A daemon on this machine, as its socket's name tells."""

    name: str
    pid: int
    role: str  #: "head" or "node"
    folder_hash: str  #: of its temp dir
    head_address: str


def temp_dir(given: str | None = None) -> str:
    """The folder for runs of clusters: the one named, `POOLRAY_TMPDIR`, or the usual one."""
    return os.path.abspath(
        given or os.environ.get(TEMP_VARIABLE) or os.path.join(tempfile.gettempdir(), "poolray")
    )


def folder_hash(folder: str) -> str:
    """A temp dir in few characters."""
    return hashlib.blake2b(os.path.abspath(folder).encode(), digest_size=4).hexdigest()


def make_session_folder(temp: str) -> str:
    """A new folder for a run, with one for logs in it.

    Raises
    ------
    OSError
        It cannot be made.
    """
    os.makedirs(temp, exist_ok=True)
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    folder = os.path.join(temp, f"session_{stamp}_{time.time_ns() % 10**9:09d}_{os.getpid()}")
    os.makedirs(os.path.join(folder, "logs"), mode=0o700)
    os.chmod(folder, 0o700)
    latest, new = os.path.join(temp, "session_latest"), f"{folder}.link"
    try:
        os.symlink(os.path.basename(folder), new)
        os.replace(new, latest)
    except OSError:
        pass  # a comfort, nothing depends on it
    return folder


def log_to(folder: str, name: str, level: int = logging.INFO) -> str:
    """Send this process's log records to a file that is rotated; gives its path."""
    path = os.path.join(folder, "logs", f"{name}.log")
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(
        path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8"
    )
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s")
    )
    logger = logging.getLogger("poolray")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return path


# ---- sockets -------------------------------------------------------------------------------------


def socket_name(role: str, temp: str, head_address: str) -> str:
    """The name of this daemon's socket."""
    return (
        f"poolray-daemon-{os.getuid()}-{os.getpid()}-{role}-{folder_hash(temp)}-{head_address}"
    )[:100]


def listen(name: str) -> socket.socket:
    """A listening socket of that name.

    Raises
    ------
    OSError
        The name is taken, or the system has no such names.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(f"\0{name}")
        made.listen(128)
        made.setblocking(False)
    except BaseException:
        made.close()
        raise
    return made


def connect(name: str, timeout_s: float) -> socket.socket:
    """A connection to a daemon on this machine.

    Raises
    ------
    OSError
        It is not there.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(timeout_s)
    try:
        made.connect(f"\0{name}")
    except BaseException:
        made.close()
        raise
    return made


def check_peer(peer: socket.socket) -> bool:
    """Whether the process at the other end is this user's, or root's."""
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(data)[1] in (os.getuid(), 0)


_NAME = re.compile(
    r" @(poolray-daemon-(?P<uid>\d+)-(?P<pid>\d+)-(?P<role>head|node)"
    r"-(?P<folder>[0-9a-f]{8})-(?P<address>\S+))$"
)


def listeners() -> Iterator[Listener]:
    """This user's daemons on this machine, the latest started last."""
    found: dict[str, Listener] = {}
    try:
        with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
            for line in table:
                match = _NAME.search(line.rstrip("\n"))
                if match is not None and int(match["uid"]) == os.getuid():
                    found[match[1]] = Listener(
                        match[1],
                        int(match["pid"]),
                        match["role"],
                        match["folder"],
                        match["address"],
                    )
    except FileNotFoundError:
        pass  # not Linux: nobody can be found
    yield from sorted(found.values(), key=lambda listener: _age_key(listener.pid))


def _age_key(pid: int) -> int:
    """Start of a process in ticks since boot; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def machine_id() -> str:
    """The same for all processes that reach each other's sockets, and for no others."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        network = os.readlink("/proc/self/ns/net")
    except OSError:
        boot, network = socket.gethostname(), ""
    return f"{boot}-{network}-{os.getuid()}"


def usual_host() -> str:
    """The address under which others on the network reach this machine; loopback if none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only picks the way out
            host: str = probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"
    return host
