"""`poolray memory`: a look at running drivers from outside, whatever they are doing."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import poolray
from poolray.__main__ import main
from poolray.exceptions import PoolrayError
from poolray.local import inspection
from tests.integration.support import DEADLINE_S, REPOSITORY, Gate, wait_until

pytestmark = pytest.mark.skipif(not inspection.is_supported(), reason="needs abstract sockets")

LARGE = 200_000


def command(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "poolray", "memory", "--timeout", str(DEADLINE_S), *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        check=False,
    )


def look() -> str:
    """What the command says about this process."""
    done = command("--pid", str(os.getpid()))
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def beside(call: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run something in a thread; the list has its result once it has ended."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()))
    thread.start()
    try:
        yield result
    finally:
        thread.join()


def name_of_socket() -> str:
    (name,) = inspection.drivers()[os.getpid()]
    return name


def connect() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect("\0" + name_of_socket())  # waits until it is let in
    connection.settimeout(DEADLINE_S)
    return connection


@poolray.remote
def successor(number: int) -> int:
    return number + 1


@poolray.remote
def wait_for(started: Gate, release: Gate) -> None:
    started.open()
    release.wait()


def test_an_idle_driver_answers() -> None:
    poolray.init(num_cpus=1)
    ref = poolray.put(np.zeros(LARGE))
    text = look()
    assert ref.hex() in text
    assert f"--- Summary for pid: {os.getpid()} ---" in text


def test_a_driver_that_has_done_nothing_yet_answers() -> None:
    poolray.init(num_cpus=1)
    assert "--- Object store ---" in look()


def test_a_driver_that_has_a_pool_only_answers() -> None:
    with poolray.Pool(1) as pool:
        assert pool.apply_async(len, ("ab",)).get(DEADLINE_S) == 2
        assert "--- Object store ---" in look()


def test_a_driver_that_waits_in_get_answers(started: Gate, release: Gate) -> None:
    poolray.init(num_cpus=1)
    ref = wait_for.remote(started, release)
    started.wait()

    def look_and_release() -> str:
        try:
            return look()
        finally:
            release.open()

    with beside(look_and_release) as text:
        poolray.get(ref, timeout=2 * DEADLINE_S)
    assert ref.hex() in text[0]


def test_a_driver_that_is_busy_with_tiny_tasks_answers() -> None:
    poolray.init(num_cpus=1)
    kept = poolray.put(np.zeros(LARGE))
    with beside(look) as text:
        while not text:
            refs = [successor.remote(number) for number in range(50)]
            assert poolray.get(refs, timeout=DEADLINE_S)[-1] == 50
    assert kept.hex() in text[0]


def test_a_driver_whose_main_thread_computes_answers() -> None:
    poolray.init(num_cpus=1)
    kept = poolray.put(np.zeros(LARGE))
    with beside(look) as text:
        while not text:
            sum(range(1000))
    assert kept.hex() in text[0]


def test_callers_that_misbehave_do_no_harm() -> None:
    poolray.init(num_cpus=1)
    ref = poolray.put(np.zeros(LARGE))
    with contextlib.ExitStack() as silent:
        for number in range(50):
            connection = connect()
            if number % 3 == 0:
                connection.close()  # gone before it is answered
            elif number % 3 == 1:
                with contextlib.suppress(OSError):  # answered and hung up on already
                    connection.send(os.urandom(1000))
                silent.callback(connection.close)
            else:
                silent.callback(connection.close)  # never reads
        assert poolray.get(successor.remote(1), timeout=DEADLINE_S) == 2
        assert ref.hex() in look()


def test_a_driver_is_found_as_long_as_it_runs() -> None:
    assert os.getpid() not in inspection.drivers()
    poolray.init(num_cpus=1)
    assert len(inspection.drivers()[os.getpid()]) == 1
    assert str(os.getpid()) in command("--list").stdout.split()
    poolray.shutdown()
    assert os.getpid() not in inspection.drivers()


def test_a_fork_of_the_driver_does_not_answer_for_it() -> None:
    poolray.init(num_cpus=1)
    assert poolray.get(successor.remote(1), timeout=DEADLINE_S) == 2
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    try:
        assert "--- Object store ---" in look()
        poolray.shutdown()
        assert os.getpid() not in inspection.drivers()
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def test_other_users_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    poolray.init(num_cpus=1)
    name = name_of_socket()
    monkeypatch.setattr(inspection, "_uid_of", lambda peer: os.getuid() + 1)
    with connect() as connection:
        assert connection.recv(64) == b"poolray-refused"
    with pytest.raises(PoolrayError, match="belongs to another user"):
        inspection.ask(name, DEADLINE_S)


@pytest.mark.parametrize("greeting", [b"", b"hello", b"poolray-memory-0", b"poolray-refused"])
def test_a_stranger_on_the_other_end_is_told_apart(greeting: bytes) -> None:
    with pytest.raises(PoolrayError, match="Process 7 gave no table"):
        inspection._read_answer("7", greeting, [])


@pytest.mark.parametrize("content", [b"", b"\xff", b"\x80"])
def test_a_table_that_cannot_be_read_is_an_error(content: bytes) -> None:
    descriptor = inspection._unnamed_file(content)
    with pytest.raises(PoolrayError, match="of process 7 cannot be read"):
        inspection._read_answer("7", inspection._GREETING, [descriptor])


def test_nobody_listens_at_a_name_of_the_past() -> None:
    with pytest.raises(PoolrayError, match="Process 7 cannot be asked"):
        inspection.ask("poolray-0-7-abc", DEADLINE_S)


def test_a_driver_that_is_stopped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        name = f"poolray-{os.getuid()}-{os.getpid()}-00"
        listener.bind("\0" + name)
        listener.listen()
        with pytest.raises(PoolrayError, match=r"did not answer within 0\.05 s"):
            inspection.ask(name, 0.05)


# --- the command line ----------------------------------------------------------------------------


def test_options_reach_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    poolray.init(num_cpus=1, record_ref_creation_sites=1)
    refs = [poolray.put(np.zeros(LARGE)) for _ in range(3)]
    pid = str(os.getpid())
    options = ["--group-by", "stack_trace", "--sort-by", "pid", "--units", "mb", "-n", "1"]
    wait_until(lambda: main(["memory", "--pid", pid, *options]) == 0, "an answer")
    text = capsys.readouterr().out
    assert "test_options_reach_the_text" in text
    assert "1.600 MB" in text
    assert "(2 more)" in text
    assert main(["memory", "--pid", pid, "--stats-only"]) == 0
    assert refs[0].hex() not in capsys.readouterr().out


def test_no_driver_is_an_error_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--pid", "1"]) == 1
    assert "no running driver with pid 1 was found" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["memory", "--units", "stone"],
        ["memory", "--num-entries", "-1"],
        ["memory", "--pid", "me"],
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: poolray" in capsys.readouterr().err
