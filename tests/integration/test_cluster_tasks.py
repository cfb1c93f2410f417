"""Programs on clusters of real daemons: tasks, objects, drivers, ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import poolray
from poolray.cluster_utils import Cluster
from poolray.exceptions import (
    AuthenticationError,
    ClusterConnectionError,
    TaskError,
    WorkerCrashedError,
)
from tests.integration.support import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two nodes: the head's with one CPU, where the driver is, and one with two."""
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "_system_config": {"heartbeat_interval_s": 0.1}},
    )
    try:
        made.add_node(num_cpus=2, resources={"there": 4})
        poolray.init(address=made.address)
        yield made
    finally:
        poolray.shutdown()
        made.shutdown()


def other(cluster: Cluster) -> Any:
    return next(iter(cluster.worker_nodes))


@poolray.remote
def where() -> str:
    return poolray.get_runtime_context().get_node_id()


@poolray.remote(resources={"there": 1}, num_cpus=0)
def there(value: Any = None) -> Any:
    return poolray.get_runtime_context().get_node_id(), value


def is_gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def text_of(path: str) -> str:
    """What is in a file; empty when it is not there yet."""
    try:
        return Path(path).read_text()
    except FileNotFoundError:
        return ""


def run_driver(cluster: Cluster, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A program of its own on the cluster."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "POOLRAY_ADDRESS": cluster.address,
            "POOLRAY_AUTH_TOKEN_PATH": cluster.auth_token_path,
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# ---- tasks and objects ---------------------------------------------------------------------------


def test_a_task_runs_where_its_resources_are(cluster: Cluster) -> None:
    assert poolray.get(where.remote()) == cluster.head_node.unique_id  # type: ignore[union-attr]
    assert poolray.get(there.remote(7)) == (other(cluster).unique_id, 7)


def test_work_that_one_node_has_no_room_for_goes_to_another(cluster: Cluster) -> None:
    @poolray.remote
    def meet(count: int) -> str:
        time.sleep(0.2)
        return poolray.get_runtime_context().get_node_id()

    assert len(set(poolray.get([meet.remote(3) for _ in range(9)]))) == 2


def test_large_values_travel_both_ways(cluster: Cluster) -> None:
    data = np.arange(1_000_000)
    ref = poolray.put(data)
    node_id, doubled = poolray.get(
        poolray.remote(resources={"there": 1}, num_cpus=0)(
            lambda array: (poolray.get_runtime_context().get_node_id(), array * 2)
        ).remote(ref)
    )
    assert node_id == other(cluster).unique_id
    assert (doubled == data * 2).all()


def test_results_of_one_node_are_arguments_on_another(cluster: Cluster) -> None:
    @poolray.remote(num_cpus=1)
    def total(array: Any) -> int:
        return int(array.sum())

    made = poolray.remote(resources={"there": 1}, num_cpus=0)(
        lambda: np.ones(500_000, dtype=np.int64)
    ).remote()
    assert poolray.get(total.remote(made)) == 500_000


def test_an_exception_of_a_remote_task_has_its_class_and_its_traceback(cluster: Cluster) -> None:
    @poolray.remote(resources={"there": 1}, num_cpus=0)
    def fail() -> None:
        raise KeyError("on the other node")

    with pytest.raises(KeyError) as caught:
        poolray.get(fail.remote())
    assert isinstance(caught.value, TaskError)
    assert "in fail" in str(caught.value)


def test_many_small_tasks_of_both_nodes_give_the_right_answers(cluster: Cluster) -> None:
    double = poolray.remote(lambda number: number * 2)
    assert poolray.get([double.remote(n) for n in range(2000)]) == [n * 2 for n in range(2000)]


def test_a_task_submits_tasks_and_waits_for_them(cluster: Cluster) -> None:
    @poolray.remote(num_cpus=0.5)
    def leaf(number: int) -> int:
        return number + 1

    @poolray.remote(num_cpus=0.5)
    def tree(number: int) -> int:
        return sum(poolray.get([leaf.remote(number), leaf.remote(number)]))

    assert poolray.get([tree.remote(n) for n in range(20)]) == [2 * n + 2 for n in range(20)]


def test_get_and_wait_give_up_in_time(cluster: Cluster) -> None:
    never = poolray.remote(resources={"there": 1}, num_cpus=0)(lambda: time.sleep(60)).remote()
    with pytest.raises(TimeoutError):
        poolray.get(never, timeout=0.05)
    assert poolray.wait([never], timeout=0.05) == ([], [never])


# ---- faults --------------------------------------------------------------------------------------


def test_a_task_whose_worker_is_killed_is_tried_again(cluster: Cluster, tmp_path: Any) -> None:
    mark = tmp_path / "tried"

    @poolray.remote(resources={"there": 1}, num_cpus=0)
    def die_once(path: str) -> int:
        if not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return 5

    assert poolray.get(die_once.remote(str(mark))) == 5
    with pytest.raises(WorkerCrashedError):
        poolray.get(
            poolray.remote(max_retries=0)(lambda: os.kill(os.getpid(), signal.SIGKILL)).remote()
        )


def test_a_killed_node_takes_its_workers_along_and_its_work_is_done_elsewhere() -> None:
    config = {"heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 1.0}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": config})
    try:
        doomed = made.add_node(num_cpus=1, resources={"spot": 1})
        poolray.init(address=made.address)

        @poolray.remote(resources={"spot": 1}, num_cpus=0)
        def linger(path: str) -> str:
            with open(path, "a") as file:
                file.write(f"{os.getpid()}\n")
            if poolray.get_runtime_context().get_node_id() == first:
                time.sleep(60)
            return poolray.get_runtime_context().get_node_id()

        first = doomed.unique_id
        path = os.path.join(made.session_folder, "pids")
        ref = linger.remote(path)
        wait_until(lambda: bool(text_of(path)), "the task", 10)
        worker = int(text_of(path))
        made.remove_node(doomed, allow_graceful=False)
        wait_until(lambda: is_gone(worker), "the end of the dead node's worker", 2)
        spare = made.add_node(num_cpus=1, resources={"spot": 1})
        assert poolray.get(ref, timeout=30) == spare.unique_id
    finally:
        poolray.shutdown()
        made.shutdown()


def test_a_daemon_that_is_killed_is_named_to_its_driver() -> None:
    made = Cluster(initialize_head=True)
    try:
        poolray.init(address=made.address)
        ref = poolray.remote(lambda: time.sleep(60)).remote()
        assert made.head_node is not None
        os.kill(made.head_node.pid, signal.SIGKILL)
        with pytest.raises(ClusterConnectionError, match=made.address):
            poolray.get(ref)
        with pytest.raises(ClusterConnectionError):
            poolray.put(1)
    finally:
        poolray.shutdown()
        made.shutdown()


@pytest.mark.parametrize("where", ["on it", "outside"])
def test_after_the_death_of_its_node_a_program_goes_on_with_another_one(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"heartbeat_timeout_s": 1.0, "client_reconnect_grace_period_s": 1.0}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": config})
    monkeypatch.setenv("POOLRAY_AUTH_TOKEN_PATH", made.auth_token_path)
    try:
        other = made.add_node(num_cpus=1, resources={"other": 1})
        address = made.address if where == "on it" else f"poolray://{made.address}"
        poolray.init(address=address)
        assert made.head_node is not None
        assert poolray.get_runtime_context().get_node_id() == made.head_node.node_id
        ref = poolray.remote(resources={"other": 1})(lambda: time.sleep(60)).remote()
        os.kill(made.head_node.pid, signal.SIGKILL)
        with pytest.raises(ClusterConnectionError):
            poolray.get(ref, timeout=30)
        poolray.shutdown()
        poolray.init(address=address)
        assert poolray.get_runtime_context().get_node_id() == other.node_id
        assert poolray.get(poolray.remote(lambda: 7).remote(), timeout=20) == 7
    finally:
        poolray.shutdown()
        made.shutdown()


def test_a_driver_that_is_killed_takes_its_workers_along(cluster: Cluster) -> None:
    code = """
import os, time, poolray
poolray.init()
pid = poolray.remote(resources={"there": 1}, num_cpus=0)(lambda: os.getpid())
near, far = poolray.get([poolray.remote(lambda: os.getpid()).remote(), pid.remote()])
poolray.remote(lambda: time.sleep(60)).remote()
print(near, far, flush=True)
os.kill(os.getpid(), 9)
"""
    done = run_driver(cluster, code)
    assert done.returncode == -9, done.stderr
    near, far = map(int, done.stdout.split())
    wait_until(lambda: is_gone(near) and is_gone(far), "the end of the job's workers", 10)
    assert poolray.get(there.remote(1))[1] == 1


# ---- drivers -------------------------------------------------------------------------------------


def test_drivers_do_not_share_workers(cluster: Cluster) -> None:
    code = """
import os, sys, poolray
poolray.init()
sys.marked = True
print(poolray.get(poolray.remote(lambda: (os.getpid(), hasattr(sys, "marked"))).remote()))
"""
    mine = poolray.get(poolray.remote(lambda: os.getpid()).remote())
    done = run_driver(cluster, code)
    assert done.returncode == 0, done.stderr
    theirs, marked = eval(done.stdout)
    assert theirs != mine
    assert not marked


def test_functions_and_modules_of_the_driver_travel_by_value(
    cluster: Cluster, tmp_path: Any
) -> None:
    (tmp_path / "only_here.py").write_text("BASE = 40\ndef add(n):\n    return BASE + n\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import poolray, only_here
def outer(n):
    return only_here.add(n)
poolray.init()
print(poolray.get([poolray.remote(outer).remote(1), poolray.remote(only_here.add).remote(2)]))
"""
    done = run_driver(cluster, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[41, 42]"


def test_what_workers_of_all_nodes_print_arrives_with_names_and_pids(cluster: Cluster) -> None:
    code = """
import poolray
poolray.init()
def speak(word):
    print("said", word)
f = poolray.remote(speak)
g = poolray.remote(resources={"there": 1}, num_cpus=0)(speak)
poolray.get([f.remote("here"), g.remote("there")])
"""
    done = run_driver(cluster, code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sorted(line.rpartition(" ")[2] for line in lines) == ["here", "there"]
    assert all("(speak pid=" in line for line in lines)


def test_a_line_that_many_workers_print_is_shown_once_with_their_number(cluster: Cluster) -> None:
    code = """
import time, poolray
poolray.init()
def speak():
    print("the same")
    time.sleep(0.3)
poolray.get([poolray.remote(speak).remote() for _ in range(3)])
"""
    done = run_driver(cluster, code)
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stdout.splitlines() if "the same" in line]
    assert 1 <= len(shown) <= 3
    done = run_driver(cluster, code, POOLRAY_DEDUP_LOGS="0")
    assert done.stdout.count("the same") == 3


def test_the_address_may_come_from_a_variable_and_local_overrides_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    poolray.shutdown()
    monkeypatch.setenv("POOLRAY_ADDRESS", cluster.address)
    assert poolray.get(where.remote()) == cluster.head_node.unique_id  # type: ignore[union-attr]
    assert poolray.get_runtime_context().gcs_address == cluster.address
    poolray.shutdown()
    with poolray.init("local", num_cpus=1) as context:
        assert context["address"] == "local"


def test_a_wrong_address_or_token_fails_within_seconds_and_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("POOLRAY_AUTH_TOKEN", "0123456789abcdef0123456789abcdef")
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9"):
        poolray.init(address="127.0.0.1:9")
    made = Cluster(initialize_head=True)
    try:
        monkeypatch.setenv("POOLRAY_AUTH_TOKEN", "fedcba9876543210fedcba9876543210")
        with pytest.raises(AuthenticationError, match=made.address):
            poolray.init(address=made.address)
    finally:
        made.shutdown()
    assert time.monotonic() - started < 20
    assert not poolray.is_initialized()


@pytest.mark.parametrize(
    "arguments", [{"num_cpus": 1}, {"resources": {"a": 1}}, {"object_store_memory": 10**8}]
)
def test_what_only_nodes_can_be_started_with_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must not be provided"):
        poolray.init(address="127.0.0.1:9", **arguments)


# ---- ends ----------------------------------------------------------------------------------------


def test_nothing_is_left_after_shutdown() -> None:
    made = Cluster(initialize_head=True)
    made.add_node()
    poolray.init(address=made.address)
    pids = [node.pid for node in made.list_all_nodes()]
    pids.append(poolray.get(poolray.remote(lambda: os.getpid()).remote()))
    folder = os.path.dirname(made.session_folder)
    poolray.shutdown()
    made.shutdown()
    assert all(is_gone(pid) for pid in pids)
    assert not os.path.exists(folder)


def test_daemons_end_with_the_process_that_made_their_cluster() -> None:
    code = """
import os, poolray
from poolray.cluster_utils import Cluster
made = Cluster(initialize_head=True)
node = made.add_node()
print(made.head_node.pid, node.pid, made._head.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 3, done.stderr
    wait_until(lambda: all(map(is_gone, pids)), "the end of the daemons", 10)


def test_removed_nodes_are_not_waited_for_and_strangers_are_refused() -> None:
    made = Cluster(initialize_head=True)
    try:
        node = made.add_node()
        made.wait_for_nodes()
        made.remove_node(node)
        made.wait_for_nodes()
        with pytest.raises(ValueError, match="not a node of this cluster"):
            made.remove_node(node)
        with pytest.raises(TypeError, match="colour"):
            made.add_node(colour="red")
    finally:
        made.shutdown()
