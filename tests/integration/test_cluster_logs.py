"""Files with what workers print: who finds them, how much of them is kept, and who may read."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import poolray
from poolray.__main__ import main
from poolray.cluster_utils import Cluster
from poolray.exceptions import NotSupportedError, StateApiError
from poolray.util.state import get_log, list_logs, list_workers
from tests.integration.support import Gate, Script, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        made.add_node(num_cpus=1, resources={"second": 1})
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def cluster(two_nodes: Cluster) -> Iterator[Cluster]:
    poolray.init(address=two_nodes.address, log_to_driver=False)
    yield two_nodes
    poolray.shutdown()


def second(cluster: Cluster) -> str:
    (found,) = [n["NodeID"] for n in poolray.nodes() if "second" in n["Resources"]]
    return str(found)


def text(**which: Any) -> str:
    return "".join(get_log(**which))


def id_of(ref: Any) -> str:
    return str(ref.task_id().hex())


@poolray.remote(num_cpus=0.1, resources={"second": 0.1})
def speak(number: int) -> int:
    print("before", number)
    print("an error", number, file=sys.stderr)
    subprocess.run(["echo", f"a program {number}"], check=True)
    print("after", number)
    return os.getpid()


@poolray.remote(num_cpus=0.1, resources={"second": 0.1})
class Speaker:
    def say(self, what: str) -> int:
        print(what)
        return os.getpid()


def test_what_a_task_has_written_is_found_by_its_id(cluster: Cluster) -> None:
    refs = [speak.remote(number) for number in range(20)]
    poolray.get(refs, timeout=30)
    for number, ref in enumerate(refs):
        written = ["before", "a program", "after"]
        assert text(task_id=id_of(ref)).splitlines() == [f"{each} {number}" for each in written]
        assert text(task_id=id_of(ref), suffix="err") == f"an error {number}\n"


def test_a_worker_is_found_by_its_process_and_by_the_name_of_its_file(cluster: Cluster) -> None:
    pid = poolray.get(speak.remote(1), timeout=30)
    node_id = second(cluster)
    files = list_logs(node_id=node_id, glob_filter=f"worker-*-{pid}.*")
    (name,) = files["worker_out"]
    (worker,) = [row for row in list_workers() if row.pid == pid]
    job_id = poolray.get_runtime_context().get_job_id()
    assert name == f"worker-{worker.worker_id}-{job_id}-{pid}.out"
    whole = text(pid=pid, node_id=node_id)
    assert whole == text(filename=name, node_id=node_id)
    assert whole.splitlines()[-3:] == ["before 1", "a program 1", "after 1"]
    assert text(pid=pid, node_id=node_id, tail=2) == "a program 1\nafter 1\n"
    assert text(pid=pid, node_id=node_id, tail=0) == ""
    assert text(pid=pid, node_id=node_id, tail=10**6) == whole
    assert b"".join(get_log(pid=pid, node_id=node_id, encoding=None)) == whole.encode()


def test_attempts_are_told_apart_also_in_one_worker(cluster: Cluster) -> None:
    @poolray.remote(num_cpus=0.1, max_retries=2, retry_exceptions=True)
    def fail(counter: Any) -> None:
        number = poolray.get(counter.count.remote())
        print("attempt", number)
        if number < 2:
            raise ValueError(number)

    @poolray.remote(num_cpus=0.1)
    class Counter:
        def __init__(self) -> None:
            self.next = 0

        def count(self) -> int:
            self.next += 1
            return self.next - 1

    ref = fail.remote(Counter.remote())
    poolray.get(ref, timeout=30)
    for number in range(3):
        found = text(task_id=id_of(ref), attempt_number=number)
        assert found == f"attempt {number}\n"
    with pytest.raises(StateApiError, match=r"attempts \[0, 1, 2\]"):
        get_log(task_id=id_of(ref), attempt_number=3)


def test_an_actor_is_found_while_it_lives_after_a_restart_and_when_it_is_dead(
    cluster: Cluster,
) -> None:
    speaker = Speaker.options(max_restarts=1, max_task_retries=1).remote()
    actor_id = speaker._actor_id.hex()
    pid = poolray.get(speaker.say.remote("first words"), timeout=30)
    assert text(actor_id=actor_id).endswith("first words\n")
    os.kill(pid, signal.SIGKILL)
    ref = speaker.say.remote("second words")
    assert poolray.get(ref, timeout=30) != pid
    assert text(actor_id=actor_id) == "second words\n"
    with pytest.raises(StateApiError, match=actor_id):
        get_log(task_id=id_of(ref))  # calls of an actor share its files
    poolray.kill(speaker)
    assert text(actor_id=actor_id) == "second words\n"


def test_who_follows_gets_what_is_printed_until_its_writer_has_ended(cluster: Cluster) -> None:
    @poolray.remote(num_cpus=0.1, resources={"second": 0.1})
    def count(gate: Any) -> None:
        for number in range(3):
            print("line", number)
            poolray.get(gate.wait_for.remote(number))

    @poolray.remote(num_cpus=0, max_concurrency=10)
    class Gate:
        def __init__(self) -> None:
            self.opened = [threading.Event() for _ in range(3)]

        def wait_for(self, number: int) -> None:
            self.opened[number].wait(60)

        def open(self, number: int) -> None:
            self.opened[number].set()

    gate = Gate.remote()
    ref = count.remote(gate)

    def has_begun() -> bool:
        try:
            return text(task_id=id_of(ref)) == "line 0\n"
        except StateApiError:
            return False  # it has no worker yet

    wait_until(has_begun, "the first line")
    followed = get_log(task_id=id_of(ref), follow=True, _interval=0.01)
    for number in range(3):
        assert next(followed) == f"line {number}\n"
        gate.open.remote(number)
    assert list(followed) == []
    poolray.get(ref, timeout=30)
    speaker = Speaker.remote()
    poolray.get(speaker.say.remote("words"), timeout=30)
    followed = get_log(actor_id=speaker._actor_id.hex(), tail=1, follow=True, _interval=0.01)
    assert next(followed) == "words\n"
    poolray.kill(speaker)
    assert list(followed) == []


def test_a_task_and_a_program_outside_read_the_same(cluster: Cluster) -> None:
    ref = speak.remote(7)
    poolray.get(ref, timeout=30)
    task_id = id_of(ref)
    expected = text(task_id=task_id)

    @poolray.remote(num_cpus=0.1)
    def read() -> str:
        return "".join(get_log(task_id=task_id))

    assert poolray.get(read.remote(), timeout=30) == expected
    poolray.shutdown()
    poolray.init(address=f"poolray://{cluster.address}")
    assert text(task_id=task_id) == expected


def test_long_output_is_read_in_parts(cluster: Cluster) -> None:
    @poolray.remote(num_cpus=0.1, resources={"second": 0.1})
    def shout() -> None:
        for number in range(5000):
            print(number, "ä" * 100)

    ref = shout.remote()
    poolray.get(ref, timeout=30)
    parts = list(get_log(task_id=id_of(ref)))
    assert len(parts) > 10
    assert "".join(parts).splitlines() == [f"{number} {'ä' * 100}" for number in range(5000)]
    tail = "".join(get_log(task_id=id_of(ref), tail=4000)).splitlines()
    assert tail == [f"{number} {'ä' * 100}" for number in range(1000, 5000)]


def test_no_name_leads_out_of_the_folder_of_logs(cluster: Cluster) -> None:
    for name in ("../head.db", "/etc/passwd", "..", ".", "logs/../../auth_token", "x" * 5000):
        for node_id in (second(cluster), poolray.get_runtime_context().get_node_id()):
            with pytest.raises(StateApiError, match="no file of logs"):
                get_log(filename=name, node_id=node_id)
    assert list_logs(node_id=second(cluster), glob_filter="..") == {}
    with pytest.raises(ValueError, match="no folders"):
        list_logs(node_id=second(cluster), glob_filter="../*")


def test_what_makes_no_sense_is_refused_in_words(cluster: Cluster) -> None:
    node_id = second(cluster)
    for error, match, options in (
        (ValueError, "exactly one", {}),
        (ValueError, "exactly one", {"pid": 1, "task_id": "ab"}),
        (ValueError, "node ip and node id", {"pid": 1}),
        (ValueError, "node ip and node id", {"filename": "head.log"}),
        (ValueError, "hexadecimal", {"task_id": "no such"}),
        (ValueError, "hexadecimal", {"filename": "head.log", "node_id": "no such"}),
        (ValueError, "Suffix", {"task_id": "ab", "suffix": "log"}),
        (ValueError, "lines", {"task_id": "ab", "tail": -2}),
        (NotSupportedError, "submitted", {"submission_id": "raysubmit_1"}),
        (StateApiError, "no worker", {"task_id": "ab" * 24}),
        (StateApiError, "Nothing is known", {"actor_id": "ab" * 16}),
        (StateApiError, "pid 1", {"pid": 1, "node_id": node_id}),
        (StateApiError, "10.9.8.7", {"pid": 1, "node_ip": "10.9.8.7"}),
        (StateApiError, "ab" * 28, {"filename": "head.log", "node_id": "ab" * 28}),
    ):
        with pytest.raises(error, match=match):
            get_log(**options)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="node ip and node id"):
        list_logs()
    assert "head.log" in list_logs(node_ip="127.0.0.1")["gcs_server"]


def test_a_node_that_is_silent_or_dead_is_named(cluster: Cluster) -> None:
    third = cluster.add_node(num_cpus=1, resources={"third": 1})
    wait_until(lambda: any("third" in n["Resources"] for n in poolray.nodes()), "the third node")
    ref = speak.options(resources={"third": 0.1}).remote(3)
    poolray.get(ref, timeout=30)
    os.kill(third.pid, signal.SIGSTOP)
    try:
        with pytest.raises(StateApiError, match=third.node_id):
            list_logs(node_id=third.node_id, timeout=1)
    finally:
        cluster.remove_node(third, allow_graceful=False)
    wait_until(
        lambda: not any(n["Alive"] and "third" in n["Resources"] for n in poolray.nodes()),
        "the third node's end",
    )
    with pytest.raises(StateApiError, match=third.node_id):
        list_logs(node_id=third.node_id)


def test_the_same_from_a_shell(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Speaker.remote()
    pid = poolray.get(speaker.say.remote("words of an actor"), timeout=30)
    ref = speak.remote(5)
    poolray.get(ref, timeout=30)
    node_id, actor_id, address = second(cluster), speaker._actor_id.hex(), cluster.address

    def said(*arguments: str, code: int = 0) -> str:
        """What a command prints, in a process that has no runtime; the actor's job goes on."""
        path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-m", "poolray", "logs", *arguments, f"--address={address}"],
            env={
                **os.environ,
                "PYTHONPATH": path,
                "POOLRAY_AUTH_TOKEN_PATH": cluster.auth_token_path,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    assert f"-{pid}.out" in said("cluster", "worker-*", "--node-id", node_id)
    assert "the head listens" in said("head.log")
    assert said("actor", "--id", actor_id, "--tail", "1") == "words of an actor\n"
    assert said("task", "--id", id_of(ref), "--err") == "an error 5\n"
    assert said("worker", "--pid", str(pid), "--node-ip", "127.0.0.1").endswith("an actor\n")
    assert "no file of logs" in said("worker", "--pid", "1", "--node-id", node_id, code=1)
    capsys.readouterr()
    assert main(["logs", "actor"]) == 1
    assert "--id and --pid" in capsys.readouterr().err


_STRAY = """
cluster = {address!r}
poolray.init(address=cluster)

@poolray.remote(num_cpus=0.1, resources={{"second": 0.1}})
def work(started, release):
    import ctypes, subprocess
    print("printed first")
    os.write(1, b"written by hand\\n")
    print("printed then")
    subprocess.run(["sh", "-c", "echo from a program; echo its error >&2"], check=True)
    libc = ctypes.CDLL(None)
    libc.puts(b"from C")
    libc.fflush(None)
    started.open()
    release.wait()
    os.write(1, b"just before the end\\n")

@poolray.remote(num_cpus=0.1, resources={{"second": 0.1}})
class Actor:
    def crash(self):
        os.write(1, b"the last words\\n")
        os._exit(1)

started, release, seen = (Gate(os.path.abspath(n)) for n in ("started", "release", "seen"))
with started, release:
    ref = work.remote(started, release)
    started.wait()
    os.write(1, b"ready\\n")
    seen.wait()
    release.open()
    poolray.get(ref)
print("-- its result is there", flush=True)
actor = Actor.remote()
try:
    poolray.get(actor.crash.remote())
except poolray.exceptions.ActorDiedError:
    seen.wait()
"""


def test_what_is_written_past_python_comes_to_the_driver(
    two_nodes: Cluster, tmp_path: Path
) -> None:
    environment = {"POOLRAY_AUTH_TOKEN_PATH": two_nodes.auth_token_path}
    script = _STRAY.format(address=two_nodes.address)
    with (
        Gate(tmp_path / "seen") as seen,
        Script(tmp_path / "script.py", script, environment=environment) as driver,
    ):
        for last in ("from C", "the last words"):  # while the task runs; after the actor's end
            while last not in driver.read_line():
                pass
            seen.open()
        result = driver.finish()
    printed = [re.sub(r"\x1b\[\d+m", "", line) for line in result.lines()]
    told = [re.sub(r"^\((\w+) pid=\d+\) ", r"\1: ", line) for line in printed if line != "ready"]
    expected = ["printed first", "written by hand", "printed then", "from a program", "from C"]
    assert told == [
        *(f"work: {each}" for each in [*expected, "just before the end"]),
        "-- its result is there",
        "Actor: the last words",
    ]
    assert result.stderr.count("its error") == 1


def test_files_are_bounded_in_bytes_and_number_and_work_goes_on_without_them() -> None:
    config = {"worker_log_max_bytes": 200_000, "worker_logs_ended_max": 4}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": config})
    try:
        poolray.init(address=made.address, log_to_driver=False)
        folder = Path(made.session_folder) / "logs"

        def sizes() -> list[int]:
            return [path.stat().st_size for path in folder.glob("worker-*")]

        @poolray.remote(max_calls=1)
        def shout(count: int) -> str:
            for number in range(count):
                print(number, "x" * 100)
            return "done"

        ref = shout.remote(20_000)
        poolray.get(ref, timeout=60)
        lines = text(task_id=id_of(ref)).splitlines()
        assert lines[-1] == f"19999 {'x' * 100}"
        assert 500 < len(lines) < 2000
        assert max(sizes()) <= 200_000
        for _ in range(6):
            poolray.get(shout.remote(10), timeout=60)
        wait_until(lambda: len(sizes()) <= 4 + 2, "files of ended workers to go")
        shutil.rmtree(folder)
        assert poolray.get([shout.remote(10) for _ in range(3)], timeout=60) == ["done"] * 3
        poolray.shutdown()
        made.shutdown()
        assert not folder.parent.exists()
    finally:
        poolray.shutdown()
        made.shutdown()
