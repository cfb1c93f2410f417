"""What a head stores is there after a kill: in SQLite files, and in a real Redis server."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from poolray.exceptions import PoolrayError
from poolray.head.state import Change
from poolray.head.storage_open import Storage, open_storage

Opener = Callable[[], Storage]


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/folder/head.db"
    found: str = request.getfixturevalue("redis_url")
    return found


def test_rows_come_back_as_they_were_written_last(url: str) -> None:
    storage = open_storage(url)
    storage.write([Change("a", b"1", b"one"), Change("a", b"2", b"two"), Change("b", b"1", b"")])
    storage.write([Change("a", b"1", None), Change("a", b"2", b"2\0"), Change("a", b"9", None)])
    storage.write([])
    storage.close()
    again = open_storage(url)
    assert {t: rows for t, rows in again.load().items() if rows} == {
        "a": {b"2": b"2\0"},
        "b": {b"1": b""},
    }
    again.close()


_WRITER = """
import sys
from poolray.head.state import Change
from poolray.head.storage_open import open_storage
storage = open_storage(sys.argv[1])
for number in range(1_000_000):
    storage.write([Change("t", b"x", b"%d" % number), Change("t", b"y", b"%d" % number)])
    print(number, flush=True)
"""


def test_a_batch_that_was_written_outlasts_kill_9_and_is_never_there_by_half(url: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, url], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(50)]
        os.kill(writer.pid, signal.SIGKILL)
        said += writer.stdout.readlines()
    storage = open_storage(url)
    rows = storage.load()["t"]
    storage.close()
    assert rows[b"x"] == rows[b"y"]
    assert int(rows[b"x"]) >= int(said[-1])


def test_clusters_that_share_a_server_do_not_see_each_other(redis_url: str) -> None:
    one, other = open_storage(redis_url, "a*"), open_storage(redis_url, "ab")
    one.write([Change("t", b"k", b"1")])
    other.write([Change("t", b"k", b"2")])
    assert one.load() == {"t": {b"k": b"1"}}
    assert other.load() == {"t": {b"k": b"2"}}
    one.close()
    other.close()


def test_a_second_head_on_one_file_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/head.db"
    storage = open_storage(url)
    with pytest.raises(PoolrayError, match=r"cannot use .*locked"):
        open_storage(url)
    storage.close()
    open_storage(url).close()


def test_a_file_of_secrets_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "head.db"
    open_storage(f"sqlite:///{path}").close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_no_database_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "head.db"
    path.write_bytes(b"something else" * 100)
    with pytest.raises(PoolrayError, match="not a database"):
        open_storage(f"sqlite:///{path}")


@pytest.mark.parametrize("url", ["", "head.db", "sqlite://x", "sqlite:///", "mysql://x"])
def test_a_url_that_names_no_storage_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="sqlite:///path"):
        open_storage(url)


def test_a_server_that_is_not_there_is_reported_within_seconds() -> None:
    pytest.importorskip("redis", reason="the package redis is not installed: pip install redis")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(PoolrayError, match="Redis"):
            open_storage(f"redis://127.0.0.1:{port}")
