"""Programs that work on a cluster from outside of it: no node's daemon, no memory in common."""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import pytest

import poolray
from poolray.cluster_utils import Cluster
from tests.integration.support import is_alive, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")

GRACE = "client_reconnect_grace_period_s"


@contextmanager
def running(grace_s: float = 30.0, **head: Any) -> Iterator[Cluster]:
    """Two nodes: the head's, which serves programs from outside, and another one."""
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "_system_config": {GRACE: grace_s}, **head},
    )
    try:
        made.add_node(num_cpus=1, resources={"there": 4})
        yield made
    finally:
        made.shutdown()


def served_by(cluster: Cluster) -> str:
    """HOST:PORT of the daemon that serves programs from outside."""
    assert cluster.head_node is not None
    return cluster.head_node.address


PRELUDE = """
import os, sys, time
import numpy as np
import poolray
from poolray.exceptions import *
address = os.environ["CLUSTER"]

def say(*words):
    print(*words, flush=True)

def hear():
    return sys.stdin.readline().strip()

def fails(call):
    try:
        call()
    except ClusterConnectionError as error:
        return str(error)
    raise AssertionError("it does not fail")
"""


class Program:
    """A program in a process of its own that is told what to do next."""

    def __init__(self, cluster: Cluster, code: str, address: str = "", **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code],
            env={
                **os.environ,
                "CLUSTER": f"poolray://{address or cluster.address}",
                "POOLRAY_AUTH_TOKEN_PATH": cluster.auth_token_path,
                **variables,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def tell(self, word: str = "") -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        return line

    def end(self) -> tuple[str, str]:
        """What it prints until it ends well."""
        out, err = self.process.communicate(timeout=50)
        assert self.process.returncode == 0, err
        return out, err


class Proxy:
    """A way to an address that can be cut and mended."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._other: dict[socket.socket, socket.socket] = {}
        self._is_cut = False
        self._stop = Event()
        self._thread = Thread(target=self._run)
        self._thread.start()

    def cut(self) -> None:
        """From now on nothing gets through, and who tries is hung up on."""
        self._is_cut = True
        wait_until(lambda: not self._other, "the cut", 10)

    def mend(self) -> None:
        """New connections get through."""
        self._is_cut = False

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._is_cut:
                for end in list(self._other):
                    self._hang_up(end)
            self._accept()
            for key, _ in self._selector.select(0.01) if self._other else ():
                self._pass_on(key.fileobj)  # type: ignore[arg-type]
            if not self._other:
                self._stop.wait(0.01)
        for end in list(self._other):
            self._hang_up(end)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            near, _ = self._listener.accept()
        except BlockingIOError:
            return
        if self._is_cut:
            near.close()
            return
        far = socket.create_connection(self._target)
        for one, other in ((near, far), (far, near)):
            one.setblocking(True)
            self._other[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, end: socket.socket) -> None:
        other = self._other.get(end)
        if other is None:
            return
        try:
            data = end.recv(1 << 16)
            if data:
                other.sendall(data)
                return
        except OSError:
            pass
        self._hang_up(end)

    def _hang_up(self, end: socket.socket) -> None:
        other = self._other.pop(end, None)
        if other is not None:
            self._selector.unregister(end)
            end.close()
            self._hang_up(other)


@pytest.fixture
def way() -> Iterator[Callable[[str], Proxy]]:
    made: list[Proxy] = []

    def make(address: str) -> Proxy:
        made.append(Proxy(address))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


# ---- the API -------------------------------------------------------------------------------------


def test_a_program_outside_of_the_cluster_can_do_what_one_on_a_node_can() -> None:
    code = """
poolray.init(address, namespace="mine")
assert {node["Alive"] for node in poolray.nodes()} == {True} and len(poolray.nodes()) == 2

@poolray.remote
def add(a, b=0):
    print("adding", a, b)
    return a + b

@poolray.remote(resources={"there": 1}, num_cpus=0)
def fail(key):
    raise KeyError(key)

sums = [add.remote(i, b=add.remote(i)) for i in range(20)]
assert poolray.get(sums) == [2 * i for i in range(20)]
try:
    poolray.get(fail.remote("lost"))
except KeyError as error:
    assert isinstance(error, TaskError)

@poolray.remote
class Counter:
    def __init__(self): self.count = 0
    def add(self, n): self.count += n; return self.count
    async def twice(self): return 2 * self.count

counter = Counter.options(name="counter").remote()
assert poolray.get([counter.add.remote(1) for _ in range(10)]) == list(range(1, 11))
assert poolray.get(poolray.get_actor("counter").twice.remote()) == 20

@poolray.remote
def use(handle):
    return poolray.get(handle.add.remote(5))

assert poolray.get(use.remote(counter)) == 15
poolray.kill(counter)
try:
    poolray.get(counter.add.remote(1))
except RayActorError:
    pass

@poolray.remote(num_cpus=0)
def sleep(seconds):
    time.sleep(seconds)

slow = sleep.remote(60)
ready, rest = poolray.wait([slow, add.remote(1)], timeout=30)
assert rest == [slow] and poolray.get(ready) == [1]
try:
    poolray.get(slow, timeout=0.05)
except GetTimeoutError:
    pass
poolray.cancel(slow)
try:
    poolray.get(slow)
except TaskCancelledError:
    pass

@poolray.remote
def items(n):
    for i in range(n):
        yield np.full(50_000, i)

assert [int(poolray.get(ref)[0]) for ref in items.remote(4)] == [0, 1, 2, 3]
assert add.remote(3).future().result(30) == 3

import asyncio
async def main():
    return await asyncio.gather(*(add.remote(i) for i in range(5)))
assert asyncio.run(main()) == [0, 1, 2, 3, 4]

group = poolray.util.placement_group([{"CPU": 1}], strategy="PACK")
poolray.get(group.ready())
inside = add.options(placement_group=group).remote(1)
assert poolray.get(inside) == 1
poolray.util.remove_placement_group(group)
from poolray.util import state
assert any(task.name == "add" for task in state.list_tasks())
from poolray.experimental import internal_kv as kv
kv._internal_kv_put(b"key", b"value")
assert kv._internal_kv_get(b"key") == b"value"
"""
    with running() as cluster, Program(cluster, code) as program:
        out, _ = program.end()
    assert re.search(r"\(add pid=\d+\).* adding \d+ \d+", out)


def test_large_values_travel_both_ways() -> None:
    code = """
poolray.init(address)
data = np.arange(1_000_000)

ref = poolray.put(data)
got = poolray.get(ref)
assert (got == data).all() and not got.flags.writeable
try:
    got[0] = 1
    raise AssertionError("written")
except ValueError:
    pass
mine = poolray.get(ref, writable=True)
mine[0] = 7
assert poolray.get(ref)[0] == 0 and mine[0] == 7

@poolray.remote(resources={"there": 1}, num_cpus=0)
def double(array):
    return array * 2

assert (poolray.get(double.remote(ref)) == data * 2).all()   # by ref
assert (poolray.get(double.remote(data)) == data * 2).all()  # as an argument
many = poolray.get([double.remote(np.full(50_000, i)) for i in range(20)])
assert [int(each[0]) for each in many] == [2 * i for i in range(20)]
assert poolray.get(poolray.put("x" * 500_000)) == "x" * 500_000
assert poolray.get(poolray.put(b"")) == b""
pieces = [np.zeros(0), np.ones(3), b"y" * 300_000, np.arange(70_000).reshape(700, 100).T]
back = poolray.get(poolray.put(pieces))
assert all(np.array_equal(a, b) for a, b in zip(pieces, back))

inner = poolray.put(np.ones(100_000))
outer = poolray.put([inner, "beside"])
del inner
assert poolray.get(poolray.get(outer)[0]).sum() == 100_000   # refs inside values

from poolray.util import state
del ref, outer
deadline = time.monotonic() + 30
while time.monotonic() < deadline and (left := state.list_objects()):
    time.sleep(0.05)
assert not left, left
assert got[-1] == 999_999                                    # what was read is our own

big = np.ones(200_000)
captured = poolray.remote(lambda: big.sum())                 # a function that is large
assert poolray.get(captured.remote()) == 200_000
"""
    with running() as cluster, Program(cluster, code) as program:
        program.end()


def test_values_beyond_the_store_travel_through_files() -> None:
    code = """
poolray.init(address)
huge = np.arange(5_000_000)                                   # 40 MB
ref = poolray.put(huge)
assert np.array_equal(poolray.get(ref), huge)
parts = [poolray.put(np.full(1_000_000, i)) for i in range(10)]  # 80 MB: some are spilled
assert [int(poolray.get(part)[-1]) for part in parts] == list(range(10))
assert [int(part[0]) for part in poolray.get(parts)] == list(range(10))

@poolray.remote
def total(array):
    return int(array.sum())

assert poolray.get(total.remote(ref)) == int(huge.sum())
"""
    with running(object_store_memory=24 << 20) as cluster, Program(cluster, code) as program:
        program.end()


def test_pools_and_executors_work_from_outside() -> None:
    code = """
assert poolray.get(poolray.remote(lambda: 5).remote()) == 5   # POOLRAY_ADDRESS
with poolray.Pool(2, address=address) as pool:
    assert pool.map(abs, range(-5, 0)) == [5, 4, 3, 2, 1]
    assert pool.apply(len, ("x" * 300_000,)) == 300_000
with poolray.Executor(2, address=address) as executor:
    assert executor.submit(pow, 2, 10).result(30) == 1024
poolray.shutdown()
with poolray.init("ray" + address.removeprefix("poolray")) as context:
    assert context["address"] == address.partition("//")[2]
"""
    with running() as cluster:
        variables = {"POOLRAY_ADDRESS": f"poolray://{cluster.address}"}
        with Program(cluster, code, **variables) as program:
            program.end()


# ---- who is let in -------------------------------------------------------------------------------


def test_a_wrong_token_and_a_wrong_address_fail_with_words() -> None:
    code = """
for name in (address, "poolray://127.0.0.1:9"):
    try:
        poolray.init(name)
    except (AuthenticationError, ClusterConnectionError) as error:
        say(type(error).__name__, error)
try:
    poolray.init("poolray://nowhere")
except ValueError as error:
    say(type(error).__name__, error)
"""
    with running() as cluster:
        with Program(
            cluster, code, POOLRAY_AUTH_TOKEN="f" * 64, POOLRAY_AUTH_TOKEN_PATH=""
        ) as program:
            token, address, form = program.end()[0].splitlines()
        assert token.startswith("AuthenticationError")
        assert cluster.address in token
        assert address.startswith("ClusterConnectionError")
        assert "127.0.0.1:9" in address
        assert form.startswith("ValueError")


# ---- cuts ----------------------------------------------------------------------------------------

LIST = """
poolray.init(address)

@poolray.remote(max_restarts=0)
class Notes:
    def __init__(self): self.notes = []
    def add(self, note): self.notes.append(note); return len(self.notes)
    def all(self): return self.notes
    def pid(self): return os.getpid()

@poolray.remote
def one(value):
    return value + 1

notes = Notes.options(name="notes", namespace="shared").remote()
kept = poolray.put(np.arange(500_000))
small = poolray.put("small")
say(poolray.get(notes.pid.remote()))
"""


def test_what_is_cut_off_for_a_moment_goes_on_with_nothing_lost_and_nothing_done_twice(
    way: Callable[[str], Proxy],
) -> None:
    code = (
        LIST
        + """
for round in range(2):
    hear()                                                     # it is cut now
    refs = [notes.add.remote((round, i)) for i in range(500)]
    done, rest = poolray.wait(refs, num_returns=500, timeout=0.1)
    assert not done, done
    try:
        poolray.get(refs[0], timeout=0.1)
        raise AssertionError("it is not cut")
    except GetTimeoutError:
        pass
    say("waiting")
    assert poolray.get(refs) == [round * 500 + i + 1 for i in range(500)]
    assert poolray.get(poolray.remote(lambda a: a.sum()).remote(np.ones(300_000))) == 300_000
    assert poolray.get(notes.all.remote()) == [(r, i) for r in range(round + 1) for i in range(500)]
    assert poolray.get(kept)[-1] == 499_999 and poolray.get(small) == "small"
    say("round")
assert poolray.get(one.remote(1)) == 2
"""
    )
    with running() as cluster:
        proxy = way(served_by(cluster))
        with Program(cluster, code, proxy.address) as program:
            program.hear()
            for _ in range(2):
                proxy.cut()
                program.tell()
                assert program.hear() == "waiting"
                proxy.mend()
                assert program.hear() == "round"
            program.end()


def test_values_that_are_under_way_when_it_is_cut_arrive_whole(
    way: Callable[[str], Proxy],
) -> None:
    code = (
        LIST
        + """
from threading import Thread
data = np.arange(2_000_000)
far = poolray.put(data)
said = []
def go():
    for _ in range(3):
        said.append(np.array_equal(poolray.get(far), data))
        said.append(np.array_equal(poolray.get(poolray.put(data)), data))
thread = Thread(target=go)
thread.start()
say("going")
thread.join()
assert said == [True] * 6, said
"""
    )
    with running() as cluster:
        proxy = way(served_by(cluster))
        with Program(cluster, code, proxy.address) as program:
            program.hear()
            assert program.hear() == "going"
            for _ in range(3):
                proxy.cut()
                proxy.mend()
                time.sleep(0.3)  # any moment will do: the transfers are somewhere in between
            program.end()


def test_after_the_grace_period_every_call_fails_and_the_cluster_has_cleaned_up(
    way: Callable[[str], Proxy],
) -> None:
    code = (
        LIST
        + """
ref = one.remote(1)
future = poolray.remote(lambda: time.sleep(600)).remote().future()
pool = poolray.Pool(1, address=address)
mapped = pool.map_async(time.sleep, [600, 1, 1], chunksize=1)
say("ready")
hear()                                                         # it is cut now
waiting = fails(lambda: poolray.get(poolray.remote(lambda: 1).remote()))
assert "nothing was heard" in waiting and "grace" in waiting, waiting
calls = [lambda: poolray.get(ref), lambda: one.remote(1), lambda: poolray.put(1),
         lambda: poolray.get(kept), lambda: notes.add.remote(1), lambda: poolray.wait([ref]),
         lambda: poolray.nodes(), lambda: poolray.put(np.ones(100_000))]
for call in calls:
    assert "nothing was heard" in fails(call)
assert "nothing was heard" in fails(lambda: future.result(20))
assert "nothing was heard" in fails(lambda: mapped.get(20))
pool.terminate()
pool.join()
say("all fail")
hear()                                                         # it is mended
assert "nothing was heard" in fails(lambda: poolray.get(ref))
poolray.shutdown()
poolray.init(address)
assert poolray.get(one.remote(1)) == 2
"""
    )
    with running(grace_s=2.0) as cluster:
        proxy = way(served_by(cluster))
        with Program(cluster, code, proxy.address) as program:
            pid = int(program.hear())
            assert program.hear() == "ready"
            proxy.cut()
            program.tell()
            assert program.hear() == "all fail"
            wait_until(lambda: not is_alive(pid), "the end of what it held", 20)
            proxy.mend()
            program.tell()
            program.end()


def test_a_program_that_slept_beyond_the_grace_period_is_told_so() -> None:
    code = (
        LIST
        + """
hear()
assert "does not know it any more" in fails(lambda: [poolray.get(one.remote(1)), time.sleep(0.01)])
for _ in range(3):
    fails(lambda: poolray.get(kept))
"""
    )
    with running(grace_s=2.0) as cluster, Program(cluster, code) as program:
        pid = int(program.hear())
        os.kill(program.process.pid, signal.SIGSTOP)
        wait_until(lambda: not is_alive(pid), "the end of what it held", 20)
        os.kill(program.process.pid, signal.SIGCONT)
        program.tell()
        program.end()


# ---- ends ----------------------------------------------------------------------------------------


def test_when_a_program_is_killed_the_cluster_cleans_up() -> None:
    code = (
        LIST
        + """
busy = poolray.remote(resources={"there": 1}, num_cpus=0)(lambda: time.sleep(600)).remote()
hear()
"""
    )
    with running(grace_s=2.0) as cluster:
        with Program(cluster, code) as program:
            pid = int(program.hear())
            program.process.kill()
        wait_until(lambda: not is_alive(pid), "the end of its actor", 20)
        poolray.init(cluster.address)
        try:
            with pytest.raises(ValueError, match="notes"):
                poolray.get_actor("notes", namespace="shared")
            free = {"CPU": 3.0, "there": 4.0}
            wait_until(
                lambda: {k: poolray.available_resources().get(k) for k in free} == free,
                "what it used to be free",
                20,
            )
            from poolray.util import state

            wait_until(lambda: not state.list_objects(), "the end of its objects", 20)
        finally:
            poolray.shutdown()


def test_a_program_that_ends_says_so_and_does_not_keep_its_node_waiting() -> None:
    with running(grace_s=600.0) as cluster, Program(cluster, LIST) as program:
        pid = int(program.hear())
        program.end()
        wait_until(lambda: not is_alive(pid), "the end of its actor", 20)


def test_when_the_daemon_is_killed_calls_fail_after_the_grace_period() -> None:
    code = (
        LIST + 'hear()\nassert "nothing was heard" in fails(lambda: poolray.get(one.remote(1)))\n'
    )
    with running(grace_s=2.0) as cluster, Program(cluster, code) as program:
        program.hear()
        assert cluster.head_node is not None
        cluster.head_node.kill()
        program.tell()
        program.end()


def test_when_the_cluster_is_stopped_the_program_is_told() -> None:
    code = LIST + 'hear()\nassert "stopped" in fails(lambda: poolray.get(one.remote(1)))\n'
    with running() as cluster, Program(cluster, code) as program:
        program.hear()
        assert cluster.head_node is not None
        cluster.head_node.stop()
        program.tell()
        program.end()
