"""Reading how much memory is in use, from files as machines and containers have them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from poolray.ids import WorkerId
from poolray.local.memory_monitor import MemoryMonitor, is_supported
from poolray.node.effects import MeasureMemory

GIB = 1 << 30
MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a file of a machine that has 16 GiB, 4 of them available."""

    def make(path: str, text: str) -> None:
        full = tmp_path / path
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_text(text)

    kib = GIB // 1024
    make("proc/meminfo", f"MemTotal: {16 * kib} kB\nMemFree: 1 kB\nMemAvailable: {4 * kib} kB\n")
    return make


def v1(write: Write, folder: str, limit: int, usage: int, cache: int = 0) -> None:
    base = f"sys/fs/cgroup/memory{folder}/memory."
    write(f"{base}limit_in_bytes", f"{limit}\n")
    write(f"{base}usage_in_bytes", f"{usage}\n")
    write(f"{base}stat", f"cache 5\ntotal_inactive_file {cache}\ntotal_active_file {cache}\n")


def v2(write: Write, folder: str, limit: str, usage: int, cache: int = 0) -> None:
    base = f"sys/fs/cgroup{folder}/memory."
    write(f"{base}max", f"{limit}\n")
    write(f"{base}current", f"{usage}\n")
    write(f"{base}stat", f"anon 7\ninactive_file {cache}\nactive_file {cache}\n")


def test_without_a_container_it_is_what_the_machine_has_not_available(
    write: Write, tmp_path: Path
) -> None:
    assert MemoryMonitor(str(tmp_path)).usage() == (12 * GIB, 16 * GIB)


def test_a_containers_limit_counts_and_pages_of_files_do_not(write: Write, tmp_path: Path) -> None:
    write("proc/self/cgroup", "4:memory:/box\n3:cpuset:/\n0::/\n")
    v1(write, "/box", 2 * GIB, 2 * GIB - 1, cache=100 * MIB)
    assert MemoryMonitor(str(tmp_path)).usage() == (2 * GIB - 1 - 200 * MIB, 2 * GIB)


def test_so_it_is_with_version_2(write: Write, tmp_path: Path) -> None:
    write("proc/self/cgroup", "0::/box\n")
    v2(write, "/box", str(2 * GIB), 2 * GIB - 1, cache=100 * MIB)
    assert MemoryMonitor(str(tmp_path)).usage() == (2 * GIB - 1 - 200 * MIB, 2 * GIB)


def test_the_limit_of_a_group_around_ours_counts_too(write: Write, tmp_path: Path) -> None:
    write("proc/self/cgroup", "0::/pod/box\n")
    v2(write, "/pod/box", "max", GIB)
    v2(write, "/pod", str(3 * GIB), int(2.9 * GIB))
    assert MemoryMonitor(str(tmp_path)).usage() == (int(2.9 * GIB), 3 * GIB)


def test_in_a_container_that_sees_its_own_files_at_the_root(write: Write, tmp_path: Path) -> None:
    write("proc/self/cgroup", "9:name=systemd:/docker/5e\n4:cpu,memory:/docker/5e\n")
    v1(write, "", GIB, GIB - 1)
    assert MemoryMonitor(str(tmp_path)).usage() == (GIB - 1, GIB)


def test_of_the_machine_and_the_container_the_fuller_one_counts(
    write: Write, tmp_path: Path
) -> None:
    write("proc/self/cgroup", "0::/box\n")
    v2(write, "/box", str(2 * GIB), 1 * GIB)
    assert MemoryMonitor(str(tmp_path)).usage() == (12 * GIB, 16 * GIB)


@pytest.mark.parametrize("limit", ["max", str(1 << 62), "0", "strange"])
def test_no_limit_is_no_limit(limit: str, write: Write, tmp_path: Path) -> None:
    write("proc/self/cgroup", "0::/\nnonsense\n")
    v2(write, "", limit, 50 * GIB)
    assert MemoryMonitor(str(tmp_path)).usage() == (12 * GIB, 16 * GIB)


def test_a_limit_that_is_set_later_is_seen(write: Write, tmp_path: Path) -> None:
    write("proc/self/cgroup", "0::/box\n")
    v2(write, "/box", "max", GIB)
    monitor = MemoryMonitor(str(tmp_path))
    assert monitor.usage()[1] == 16 * GIB
    v2(write, "/box", str(GIB + 1), GIB)
    assert monitor.usage() == (GIB, GIB + 1)


# ---- processes -----------------------------------------------------------------------------------


def process(
    write: Write, pid: int, resident: int, shared: int, private: int, name: str = "python\0x.py"
) -> None:
    write(f"proc/{pid}/statm", f"9 {resident // PAGE} {shared // PAGE} 1 0 1 0\n")
    kib = private // 1024
    write(
        f"proc/{pid}/smaps_rollup",
        f"0-1 ---p 0 00:00 0 [rollup]\nRss: 9 kB\nShared_Dirty: 9 kB\nPrivate_Clean: 0 kB\n"
        f"Private_Dirty: {kib} kB\nSwap: 0 kB\n",
    )
    write(f"proc/{pid}/cmdline", name)
    write(f"proc/{pid}/comm", "python\n")


def test_what_a_fork_shares_is_not_its_own(write: Write, tmp_path: Path) -> None:
    process(write, 7, resident=900 * MIB, shared=100 * MIB, private=30 * MIB)
    monitor = MemoryMonitor(str(tmp_path))
    assert monitor.private_bytes(7) == 30 * MIB
    assert monitor.private_bytes(7, exact_above=800 * MIB) == 800 * MIB  # never too low
    assert monitor.private_bytes(7, exact_above=700 * MIB) == 30 * MIB


def test_processes_that_are_gone_are_left_out(write: Write, tmp_path: Path) -> None:
    process(write, 7, 3 * MIB, 0, 2 * MIB)
    pids = {b"a": 7, b"b": 8}
    wanted = MeasureMemory([(WorkerId(n), 0) for n in (b"a", b"b", b"c")], False)
    report = MemoryMonitor(str(tmp_path)).measure(wanted, lambda worker: pids.get(worker, 0))
    assert report.workers == [(WorkerId(b"a"), 2 * MIB)]
    assert not report.is_detailed
    assert report.processes == []


def test_the_largest_processes_are_named_by_what_is_their_own(write: Write, tmp_path: Path) -> None:
    for pid in range(10, 30):
        process(write, pid, 10 * MIB, 0, 1 * MIB)
    process(write, 7, 900 * MIB, 0, 3 * MIB, name="")
    process(write, 8, 500 * MIB, 0, 400 * MIB, name="train\0" + "long " * 50)
    found = MemoryMonitor(str(tmp_path)).measure(MeasureMemory([], True), lambda _: 0).processes
    assert len(found) == 10
    assert (found[0].pid, found[0].used_bytes) == (8, 400 * MIB)
    assert found[0].name.startswith("train long long")
    assert len(found[0].name) == 100
    assert (found[1].pid, found[1].name) == (7, "python")


@pytest.mark.skipif(not is_supported() or sys.platform != "linux", reason="reads /proc")
def test_this_machine_can_be_read() -> None:
    monitor = MemoryMonitor()
    used, total = monitor.usage()
    assert 0 < used < total
    with subprocess.Popen(
        [sys.executable, "-c", "x = bytearray(80 << 20); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        private = monitor.private_bytes(child.pid)
        assert private is not None
        assert 80 * MIB <= private < 160 * MIB
        assert any(p.pid for p in monitor.largest_processes())
        child.communicate(b"\n")
    assert monitor.private_bytes(child.pid) is None
