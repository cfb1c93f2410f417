"""Every test here starts without a runtime, ends without one, and must leave nothing behind."""

from __future__ import annotations

import gc
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

import poolray
from tests.integration.support import Gate, ScriptResult, census, run_script, wait_until

# A test that takes this long hangs, unless it says otherwise.
TIMEOUT_S = 60


def pytest_itemcollected(item: pytest.Item) -> None:
    has_plugin = item.config.pluginmanager.hasplugin("timeout")
    if has_plugin and item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(TIMEOUT_S))
    # From Python 3.12 on every fork beside a thread warns, also those that a test asks for.
    item.add_marker(pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning"))


@pytest.fixture(scope="session", autouse=True)
def helper_of_multiprocessing() -> None:
    """Start the process that the standard library keeps, before anything is counted."""
    resource_tracker.ensure_running()


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Compare this process before and after: processes, descriptors, threads, mappings."""
    poolray.shutdown()
    gc.collect()  # what an earlier test of this process left to the collector is not ours
    before = census()
    yield
    poolray.shutdown()
    gc.collect()
    wait_until(lambda: set(census().children) <= set(before.children), "the end of processes", 10)
    after = census()
    # Fewer is no leak: another test's rest may have been collected meanwhile.
    assert not Counter(after.descriptors) - Counter(before.descriptors)
    assert not Counter(after.threads) - Counter(before.threads)
    assert after.arenas <= before.arenas


@pytest.fixture
def gates(tmp_path: Path) -> Iterator[Callable[[str], Gate]]:
    """Make gates, which open when the test ends."""
    made: list[Gate] = []

    def make(name: str) -> Gate:
        made.append(Gate(tmp_path / f"gate-{name}"))
        return made[-1]

    yield make
    for gate in made:
        gate.open(1024)
        gate.close()


@pytest.fixture
def started(gates: Callable[[str], Gate]) -> Gate:
    return gates("started")


@pytest.fixture
def release(gates: Callable[[str], Gate]) -> Gate:
    return gates("release")


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., ScriptResult]:
    """Run a program to its end."""
    return lambda body, *options, **keywords: run_script(
        tmp_path / "script.py", body, *options, **keywords
    )


class RedisServer:
    """A server that keeps what it is told, and can be killed and started again."""

    def __init__(self, program: str, port: int, folder: Path) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        self._port = port
        self._command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        self._command += ["--dir", str(folder), "--appendonly", "yes", "--appendfsync", "no"]
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir()

    def start(self) -> None:
        """Start it, with what it had."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        wait_until(self._answers, "redis-server listens")

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def kill(self) -> None:
        """End it by force."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis server of our own, from Debian's package."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    pytest.importorskip("redis", reason="the package redis is not installed: pip install redis")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = RedisServer(program, port, tmp_path / "redis")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """Where a Redis server of our own is."""
    return redis_server.url
