"""Clusters on networks that fail: nodes in network namespaces, cut links, delay, loss, partitions.

driver, here ── bridge ─┬─ head's machine
                        ├─ first machine
                        └─ second machine
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import poolray
from poolray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ClusterConnectionError,
    GetTimeoutError,
    NodeDiedError,
    WorkerCrashedError,
)
from tests.integration import slow_link
from tests.integration.support import is_alive, wait_until

_PREFIX = "prnet"
_DEAD_S = 3.0
_CONFIG = {
    "heartbeat_interval_s": 0.2,
    "heartbeat_timeout_s": _DEAD_S,
    "client_reconnect_grace_period_s": 6.0,
}
_BOUND_S = 60.0
_serials = itertools.count(1)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout


def _try_ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, check=False, timeout=20)


def _why_not() -> str:
    if sys.platform != "linux" or os.getuid() != 0:
        return "network namespaces need Linux and root"
    if shutil.which("ip") is None:
        return "there is no `ip` (Debian: iproute2)"
    probe = f"{_PREFIX}-{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
    except (subprocess.CalledProcessError, OSError) as error:
        return f"this system makes no network namespaces: {getattr(error, 'stderr', error)}"
    _try_ip("netns", "del", probe)
    return ""


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "none")


def _end_namespace(name: str) -> None:
    for _ in range(20):  # some may be starting others
        done = subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
        )
        if not done.stdout.split():
            break
        for pid in done.stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has ended by itself
        time.sleep(0.05)
    _try_ip("netns", "del", name)  # its links go with it


def _sweep() -> None:
    """Remove what runs that were killed have left: names carry their pids."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        words = name.split("-")
        if words[0] == _PREFIX and not os.path.exists(f"/proc/{words[1]}"):
            _end_namespace(name)
            _try_ip("link", "del", f"pr{words[1]}v{words[2]}")
            _try_ip("link", "del", f"pr{words[1]}v{words[2]}f")
            _try_ip("link", "del", f"pr{words[1]}b")


@functools.cache
def _has_netem() -> bool:
    """Whether the kernel can delay and lose packets; a process of ours does it where it cannot."""
    name = f"{_PREFIX}-{os.getpid()}-{next(_serials)}"
    _ip("netns", "add", name)
    try:
        done = subprocess.run(
            ["tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"],
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        return False
    finally:
        _try_ip("netns", "del", name)
    return done.returncode == 0


class Machine:
    """A network namespace with an address, and the daemons in it."""

    def __init__(self, network: Network, number: int) -> None:
        self.network = network
        self.host = f"{network.subnet}.{number}"
        serial = next(_serials)  # the kernel lets go of names a while after it is told to
        self.name = f"{_PREFIX}-{os.getpid()}-{serial}"
        self.link = f"pr{os.getpid()}v{serial}"
        _ip("netns", "add", self.name)
        network.machines.append(self)
        #: What delays and loses frames where the kernel cannot.
        self._slow: subprocess.Popen[str] | None = None
        _ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", self.link, "master", network.bridge, "up")
        for words in (
            ("link", "set", "lo", "up"),
            ("address", "add", f"{self.host}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            _ip("-n", self.name, *words)

    def start(self, *words: str) -> None:
        """Start daemons here."""
        command = [sys.executable, "-m", "poolray", "start", f"--node-ip-address={self.host}"]
        done = subprocess.run(
            [
                *("ip", "netns", "exec", self.name, *command, *words),
                f"--temp-dir={self.network.folder / self.name}",
                f"--auth-token-file={self.network.token_file}",
                f"--system-config={json.dumps(_CONFIG)}",
                "--object-store-memory=80000000",
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def cut(self) -> None:
        """Pull the cable out."""
        _ip("link", "set", self.link, "down")

    def mend(self) -> None:
        """Put it in again."""
        _ip("link", "set", self.link, "up")

    def lose_sight_of(self, other: Machine) -> None:
        """What is sent to that machine vanishes; the others are reached."""
        _ip("-n", self.name, "route", "add", "blackhole", f"{other.host}/32")

    def see_again(self, other: Machine) -> None:
        """The end of `lose_sight_of`."""
        _ip("-n", self.name, "route", "del", "blackhole", f"{other.host}/32")

    def disturb(self, delay_ms: int, loss_percent: int) -> None:
        """Delay and lose what leaves this machine."""
        if not _has_netem():
            self._disturb_frames(delay_ms, loss_percent)
            return
        words = ("delay", f"{delay_ms}ms", "loss", f"{loss_percent}%")
        _ip(
            *("netns", "exec", self.name, "tc", "qdisc", "replace"),
            *("dev", "eth0", "root", "netem", *words),
        )

    def _disturb_frames(self, delay_ms: int, loss_percent: int) -> None:
        """The same by a process between the machine's cable and the bridge."""
        far = f"{self.link}f"
        if self._slow is None:
            _ip("link", "add", far, "type", "veth", "peer", "name", f"{self.link}b")
            _ip("link", "set", f"{self.link}b", "master", self.network.bridge, "up")
            _ip("link", "set", far, "up", "promisc", "on")
            _ip("link", "set", self.link, "nomaster", "promisc", "on")
        self.settle()
        numbers = (delay_ms, loss_percent, next(_serials))
        self._slow = subprocess.Popen(
            [sys.executable, slow_link.__file__, self.link, far, *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._slow.stdout is not None
        assert self._slow.stdout.readline() == "ready\n"

    def settle(self) -> None:
        """End that process; its cables stay."""
        if self._slow is not None:
            self._slow.communicate()

    def close(self) -> None:
        """Remove everything, whatever has happened."""
        self.settle()
        _try_ip("link", "del", f"{self.link}f")
        _try_ip("link", "del", self.link)
        _end_namespace(self.name)


class Network:
    """A bridge, and machines on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: list[Machine] = []
        self.bridge = f"pr{os.getpid()}b"
        self.subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self.token = secrets.token_hex(32)
        self.token_file = folder / "token"
        self.token_file.write_text(self.token)
        self.token_file.chmod(0o600)

    def start_head(self) -> None:
        """A bridge, and the head's machine on it."""
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("address", "add", f"{self.subnet}.1/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        self.head = Machine(self, 2)
        self.head.start("--head", "--port=6379", "--num-cpus=1")
        self.address = f"{self.head.host}:6379"

    def start_nodes(self) -> None:
        """Two machines more, whose nodes have a CPU each."""
        self.first, self.second = Machine(self, 3), Machine(self, 4)
        with ThreadPoolExecutor() as starts:
            for done in [
                starts.submit(
                    machine.start,
                    f"--address={self.address}",
                    "--num-cpus=1",
                    f"--resources={json.dumps({name: 10, 'away': 10})}",
                )
                for name, machine in (("first", self.first), ("second", self.second))
            ]:
                done.result()

    def close(self) -> None:
        """Remove everything, whatever has happened."""
        for machine in self.machines:
            machine.close()
        _try_ip("link", "del", self.bridge)


@contextlib.contextmanager
def _networks(folder: Path, nodes: bool) -> Iterator[Network]:
    _sweep()
    made = Network(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POOLRAY_AUTH_TOKEN", made.token)
        try:
            made.start_head()
            if nodes:
                made.start_nodes()
            poolray.init(address=f"poolray://{made.address}", namespace="tests")
            yield made
        finally:
            poolray.shutdown()
            made.close()


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with _networks(tmp_path, nodes=True) as made:
        yield made


@pytest.fixture
def head_alone(tmp_path: Path) -> Iterator[Network]:
    with _networks(tmp_path, nodes=False) as made:
        yield made


@poolray.remote(num_cpus=0, max_retries=5)
def total(values: Any) -> int:
    return int(values.sum())


@poolray.remote(num_cpus=0, max_retries=5)
def make(number: int) -> Any:
    return np.full(100_000, number)


@poolray.remote(num_cpus=0, resources={"first": 1})
class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


def _alive() -> set[str]:
    return {node["NodeID"] for node in poolray.nodes() if node["Alive"]}


def _all_alive() -> set[str]:
    """The ids of all three, once the driver knows of each."""
    wait_until(lambda: len(_alive()) == 3, timeout_s=_BOUND_S)
    return _alive()


def _work(count: int = 8) -> tuple[list[Any], list[int]]:
    """Values that go from one machine to the other, and what they come to."""
    made = [make.options(resources={"first": 1}).remote(n) for n in range(count)]
    return [total.options(resources={"second": 1}).remote(ref) for ref in made], [
        100_000 * n for n in range(count)
    ]


def test_short_cuts_lose_nothing_and_do_nothing_twice(network: Network) -> None:
    counter = Counter.remote()
    assert poolray.get(counter.add.remote(), timeout=_BOUND_S) == 1
    before = _all_alive()
    calls = []
    sums, expected = _work()
    # The driver's node, the nodes between each other, the nodes and the head: each link is cut.
    for machine in (network.first, network.second, network.head):
        machine.cut()
        calls += [counter.add.remote() for _ in range(10)]
        time.sleep(_DEAD_S / 4)
        machine.mend()
        calls += [counter.add.remote() for _ in range(10)]
        assert poolray.get(calls, timeout=_BOUND_S) == list(range(2, 2 + len(calls)))
    assert poolray.get(sums, timeout=_BOUND_S) == expected
    assert _alive() == before


def test_a_node_that_comes_back_too_late_joins_afresh(network: Network, tmp_path: Path) -> None:
    before = _all_alive()
    counter = Counter.remote()
    assert poolray.get(counter.add.remote(), timeout=_BOUND_S) == 1

    @poolray.remote(num_cpus=0, resources={"away": 10}, max_retries=5)
    def slow(seconds: float) -> str:
        node_id = poolray.get_runtime_context().get_node_id()
        (tmp_path / f"{node_id}-{os.getpid()}").touch()
        time.sleep(seconds)
        return node_id

    @poolray.remote(num_cpus=0, resources={"first": 1}, max_retries=0)
    def endless() -> None:
        (tmp_path / f"endless-{os.getpid()}").touch()
        time.sleep(600)

    lost_for_good = endless.remote()
    wait_until(lambda: any(tmp_path.glob("endless-*")), timeout_s=_BOUND_S)
    (old_pid,) = (int(path.name.split("-")[1]) for path in tmp_path.glob("endless-*"))
    network.first.cut()
    pending = [slow.remote(0.1) for _ in range(2)]
    calls = [counter.add.remote() for _ in range(5)]
    wait_until(lambda: len(_alive()) == 2, timeout_s=_BOUND_S)
    (lost,) = before - _alive()
    assert lost not in poolray.get(pending, timeout=_BOUND_S)
    with pytest.raises((NodeDiedError, WorkerCrashedError)):
        poolray.get(lost_for_good, timeout=_BOUND_S)
    for call in calls:
        with pytest.raises((ActorDiedError, ActorUnavailableError)):
            poolray.get(call, timeout=_BOUND_S)
    network.first.mend()
    wait_until(lambda: len(_alive()) == 3, timeout_s=_BOUND_S)
    assert lost not in _alive()
    wait_until(lambda: not is_alive(old_pid), timeout_s=_BOUND_S)
    sums, expected = _work(3)
    assert poolray.get(sums, timeout=_BOUND_S) == expected


def test_a_node_that_only_the_head_cannot_see(network: Network) -> None:
    """In time nothing happens; after the deadline it is dead for all, and rejoins."""
    before = _all_alive()
    network.first.lose_sight_of(network.head)
    time.sleep(_DEAD_S / 4)
    network.first.see_again(network.head)
    sums, expected = _work(3)
    assert poolray.get(sums, timeout=_BOUND_S) == expected
    assert _alive() == before
    network.first.lose_sight_of(network.head)
    wait_until(lambda: len(_alive()) == 2, timeout_s=_BOUND_S)
    with pytest.raises(GetTimeoutError):
        poolray.get(make.options(resources={"first": 1}).remote(1), timeout=0.5)
    network.first.see_again(network.head)
    wait_until(lambda: len(_alive()) == 3, timeout_s=_BOUND_S)
    assert len(_alive() - before) == 1
    sums, expected = _work(3)
    assert poolray.get(sums, timeout=_BOUND_S) == expected


def test_slow_and_lossy_lines_give_the_right_values(network: Network) -> None:
    array = np.arange(200_000)
    counter = Counter.remote()
    calls: list[Any] = []
    for delay_ms, loss_percent in ((50, 0), (0, 5), (20, 10)):
        for machine in network.machines:
            machine.disturb(delay_ms, loss_percent)
        calls += [counter.add.remote() for _ in range(20)]
        sums, expected = _work(4)
        assert poolray.get(calls, timeout=_BOUND_S) == list(range(1, len(calls) + 1))
        assert poolray.get(sums, timeout=_BOUND_S) == expected
        assert (poolray.get(poolray.put(array), timeout=_BOUND_S) == array).all()


def test_the_lines_are_as_slow_as_they_are_to_be(head_alone: Network) -> None:
    server = """
import socket
door = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
door.bind(("", 7))
print("ready", flush=True)
while True:
    door.sendto(*door.recvfrom(100))
"""
    command = ["ip", "netns", "exec", head_alone.head.name, sys.executable, "-c", server]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as echo,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
    ):
        assert echo.stdout is not None
        assert echo.stdout.readline() == "ready\n"
        probe.connect((head_alone.head.host, 7))
        probe.settimeout(2.0)

        def answered(count: int) -> int:
            for _ in range(count):
                probe.send(b"there?")
            found = 0
            with contextlib.suppress(TimeoutError):
                while found < count:
                    found += len(probe.recv(100)) > 0
            return found

        head_alone.head.disturb(200, 0)
        started_s = time.monotonic()
        assert answered(10) == 10
        assert time.monotonic() - started_s >= 0.2
        head_alone.head.disturb(0, 50)
        assert 0 < answered(100) < 100
        echo.kill()


def test_a_driver_whose_cluster_is_gone_is_told(head_alone: Network) -> None:
    ref = poolray.put(1)
    _end_namespace(head_alone.head.name)
    with pytest.raises(ClusterConnectionError):
        poolray.get(ref, timeout=_BOUND_S)
