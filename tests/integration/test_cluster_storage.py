"""Values behind URLs in a cluster: whoever waits for slow storage, the daemons do not."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from threading import enumerate as enumerate_threads
from typing import Any

import numpy as np
import psutil
import pytest

import poolray
from poolray.cluster.storage_threads import StorageThreads
from poolray.cluster.transfer import ChunkStore
from poolray.cluster_utils import Cluster
from poolray.ids import ObjectId
from poolray.objects.shared_memory import Arena, create_arena_file
from poolray.protocol.values import InFile
from tests.integration.support import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")

COUNT = 700_000  # of 8 bytes: more than one chunk

#: Files of a folder whose reads wait until there is a file `open` beside them, and say that they do
#: by another file.
SLOW = """
    import os, time
    from fsspec.implementations.local import LocalFileSystem

    class SlowFileSystem(LocalFileSystem):
        protocol = "slowly"

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).removeprefix("slowly://"))

        def cat_file(self, path, start=None, end=None, **kwargs):
            folder = os.environ["SLOW_FOLDER"]
            open(os.path.join(folder, "asked"), "a").close()
            while not os.path.exists(os.path.join(folder, "open")):
                time.sleep(0.01)
            return super().cat_file(path, start=start, end=end, **kwargs)
"""


@pytest.fixture
def slow_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where slowly:// leads, known to all processes that are started from now on."""
    package = tmp_path / "package"
    info = package / "slowly-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "slowly.py").write_text(textwrap.dedent(SLOW))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slowly\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fsspec.specs]\nslowly = slowly:SlowFileSystem\n")
    path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.setenv("PYTHONPATH", path)
    folder = tmp_path / "slow"
    folder.mkdir()
    monkeypatch.setenv("SLOW_FOLDER", str(folder))
    return folder


@pytest.fixture
def cluster(slow_folder: Path) -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        made.add_node(
            num_cpus=1,
            resources={"there": 20},
            object_store_memory=16 << 20,
            object_spilling_directory=f"slowly://{slow_folder}/spilled",
        )
        poolray.init(address=made.address)
        yield made
    finally:
        (slow_folder / "open").touch()
        poolray.shutdown()
        made.shutdown()


@poolray.remote(num_cpus=0, resources={"there": 1})
def made_there(first: int) -> Any:
    return np.arange(first, first + COUNT)


@poolray.remote(num_cpus=0, resources={"there": 1})
def pid_there() -> int:
    return os.getpid()


def test_a_daemon_goes_on_while_slow_storage_keeps_a_peer_waiting(
    cluster: Cluster, slow_folder: Path
) -> None:
    refs = [made_there.remote(number) for number in range(6)]  # the node holds two of them
    poolray.wait(refs, num_returns=len(refs), fetch_local=False, timeout=60)
    wait_until(lambda: any((slow_folder / "spilled").rglob("spilled-*")), "a value at the URL")
    got: list[Any] = []
    reader = Thread(target=lambda: got.extend(poolray.get(refs, timeout=100)))
    reader.start()
    try:
        wait_until((slow_folder / "asked").exists, "somebody who reads from the URL")
        time.sleep(0.1)
        # Were its daemon waiting as well, nothing would come back, and it would count as dead.
        assert len({poolray.get(pid_there.remote(), timeout=60) for _ in range(20)}) >= 1
        assert not got
    finally:
        (slow_folder / "open").touch()
        reader.join()
    assert [int(array[0]) for array in got] == list(range(6))
    assert all(len(array) == COUNT for array in got)


def test_a_daemon_ends_while_slow_storage_keeps_a_peer_waiting(
    cluster: Cluster, slow_folder: Path
) -> None:
    refs = [made_there.remote(number) for number in range(6)]
    poolray.wait(refs, num_returns=len(refs), fetch_local=False, timeout=60)
    wait_until(lambda: any((slow_folder / "spilled").rglob("spilled-*")), "a value at the URL")
    asked = slow_folder / "asked"
    while not asked.exists():
        with contextlib.suppress(poolray.exceptions.GetTimeoutError):
            poolray.get(refs, timeout=0.2)
    (node,) = cluster.worker_nodes
    process = psutil.Process(node.pid)
    process.terminate()
    process.wait(timeout=30)


# ---- parts of values -----------------------------------------------------------------------------


def test_a_part_of_a_value_behind_a_url_is_all_that_is_read_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    sizes: list[int] = []
    read = LocalFileSystem.cat_file

    def note(self: Any, path: str, start: int, end: int, **more: Any) -> Any:
        sizes.append(end - start)
        return read(self, path, start=start, end=end, **more)

    monkeypatch.setattr(LocalFileSystem, "cat_file", note)
    (tmp_path / "values").write_bytes(b"before" + bytes(range(200)))
    place = InFile(
        object_id=ObjectId(b"v" * 28), path=f"file://{tmp_path}/values", size_bytes=200, offset=6
    )
    arena = Arena(create_arena_file(1 << 16), 1 << 16)
    chunks = ChunkStore(arena, lambda number: "")
    try:
        assert chunks.read(place, 50, 3) == bytes([50, 51, 52])
        assert sizes == [3]
        gone = InFile(object_id=place.object_id, path=f"file://{tmp_path}/gone", size_bytes=200)
        assert chunks.read(gone, 50, 3) is None
        assert chunks.read(place, 199, 3) is None, "it ends too early"
    finally:
        arena.close()


# ---- threads -------------------------------------------------------------------------------------


def test_what_threads_make_is_handed_over_by_who_settles() -> None:
    woken, release = Event(), Event()
    threads = StorageThreads(2, woken.set)
    got: list[Any] = []
    threads.start(lambda: release.wait(30) and "slow", got.append)
    threads.start(lambda: "quick", got.append)
    assert woken.wait(30)
    wait_until(lambda: threads.has_news, "the quick one")
    assert got == []
    threads.settle()
    assert got == ["quick"]
    threads.start(lambda: 1 / 0, got.append)
    wait_until(lambda: threads.has_news, "what fails")
    threads.settle()
    assert got == ["quick", None]
    threads.stop()
    release.set()
    threads.start(lambda: "late", got.append)
    threads.settle()
    assert got == ["quick", None]
    wait_until(lambda: not any("storage" in t.name for t in enumerate_threads()), "their end")
