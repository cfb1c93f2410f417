"""A node that takes nothing for a while costs the others time, not memory, and nobody a message."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import poolray
from poolray.cluster_utils import Cluster
from tests.integration.support import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")

CONFIG: dict[str, Any] = {
    "heartbeat_timeout_s": 60.0,
    # What waits for room in a channel does not wait for the next heartbeat: at that pace the lines
    # below would take a quarter of an hour.
    "heartbeat_interval_s": 5.0,
    "peer_backlog_max_bytes": 2 << 20,
    "worker_log_max_bytes": 1 << 30,
}
LINE_BYTES = 8 << 10
#: What may be under way beyond what waits: 64 messages of up to 256 KiB.
QUEUED_BYTES = 20 << 20


def socket_bytes() -> int:
    """What the buffers of a connection may grow to on this system: 10 MiB, or 36."""
    limits = [Path(f"/proc/sys/net/ipv4/tcp_{kind}mem").read_text() for kind in "rw"]
    return sum(int(limit.split()[2]) for limit in limits)


class Numbers:
    """A stream that keeps the numbers that lines begin with."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def write(self, text: str) -> int:
        self.found += map(int, re.findall(r"line (\d+) ", text))
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""


def test_who_writes_to_a_stopped_node_waits_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held_bytes = CONFIG["peer_backlog_max_bytes"] + QUEUED_BYTES
    written_max_bytes = held_bytes + socket_bytes()
    lines = 2 * written_max_bytes // LINE_BYTES
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": CONFIG}
    )
    stream = Numbers()
    try:
        second = cluster.add_node(num_cpus=1, resources={"second": 1})
        poolray.init(address=cluster.address)
        monkeypatch.setattr(sys, "stdout", stream)

        @poolray.remote(resources={"second": 0.1})
        def shout() -> str:
            print("line 0 ")
            for number in range(1, lines):
                print(f"line {number} ".ljust(LINE_BYTES, "x"))
            return "done"

        assert cluster.head_node is not None
        daemon = psutil.Process(second.pid)
        before_bytes = daemon.memory_info().rss
        ref = shout.remote()
        wait_until(lambda: bool(stream.found), "the first line")
        os.kill(cluster.head_node.pid, signal.SIGSTOP)
        try:
            (log,) = (Path(cluster.session_folder) / "logs").glob("worker-*.out")
            written = -1
            while written != log.stat().st_size:  # until it stands still
                written = log.stat().st_size
                time.sleep(0.5)
            assert CONFIG["peer_backlog_max_bytes"] < written
            assert written < written_max_bytes
            grown_bytes = daemon.memory_info().rss - before_bytes
            assert grown_bytes < 3 * held_bytes
        finally:
            os.kill(cluster.head_node.pid, signal.SIGCONT)
        assert poolray.get(ref, timeout=60) == "done"
        wait_until(lambda: len(stream.found) >= lines, "all lines")
        assert stream.found == list(range(lines))
    finally:
        poolray.shutdown()
        cluster.shutdown()
