"""How fast are several nodes: objects between them, calls across, starting, and noticing a death?

What: a transfer from node to node beside plain TCP through the loopback interface, a broadcast to
four nodes, daemon start to ready, a killed node declared dead and its work done elsewhere; beside
Ray's where it has the same, on a cluster of as many nodes on this machine.
Who calls: `python -m benchmarks.cluster [part …]`, by hand and in `make bench`.
May touch: processes, sockets, the clock.
Invariants: contestants take turns in one run; what is read is checked.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import poolray
from benchmarks._harness import (
    COMPARISON_HEAD,
    Comparison,
    Samples,
    alternate,
    commit,
    machine,
    make_parser,
    print_table,
    rate,
    show,
    write_json,
)
from benchmarks._raw_tcp import RawTcp
from benchmarks._ray_side import RaySide
from poolray.cluster_utils import Cluster, ClusterNode

TRANSFER_BYTES = (64_000_000, 256_000_000, 1_000_000_000)
BROADCAST_BYTES = 256_000_000
BROADCAST_NODES = 4
STORE_BYTES = 3 << 30
#: What an idle machine with two cores is to reach, in seconds.
SECONDS_TARGETS = {"daemon start to ready": 0.5}
#: A node that is silent for so long is dead, in the part about deaths.
HEARTBEAT_TIMEOUT_S = 1.0


@contextmanager
def running_cluster(nodes: int, **config: Any) -> Iterator[tuple[Cluster, list[ClusterNode]]]:
    """A cluster of a head with a node, and so many nodes more, `node1` and so on; connected."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "object_store_memory": STORE_BYTES,
            "_system_config": config,
        },
    )
    try:
        more = [
            cluster.add_node(
                num_cpus=2, resources={f"node{number}": 4}, object_store_memory=STORE_BYTES
            )
            for number in range(1, nodes + 1)
        ]
        poolray.init(address=cluster.address)
        yield cluster, more
    finally:
        poolray.shutdown()
        cluster.shutdown()


class Maker:
    """Makes large values where it lives."""

    def make(self, size_bytes: int) -> list[Any]:
        """A ref to a value that stays here until it is read."""
        return [poolray.put(np.ones(size_bytes, dtype=np.uint8))]


class Counter:
    """Counts what it is told."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, number: int) -> int:
        """The sum so far."""
        self._sum += number
        return self._sum


def successor(number: int) -> int:
    """The smallest of tasks."""
    return number + 1


def last_of(array: Any) -> int:
    """A task that hardly looks at its argument."""
    return int(array[-1])


# ---- objects -------------------------------------------------------------------------------------


def transfers(rounds: int, ray: RaySide | None) -> tuple[list[Comparison], dict[str, Samples]]:
    """A value of another node is read, beside plain TCP; then one goes to four nodes."""
    found: list[Comparison] = []
    with ExitStack() as stack:
        raw = stack.enter_context(RawTcp(max(TRANSFER_BYTES)))
        stack.enter_context(running_cluster(1))
        maker = poolray.remote(Maker).options(resources={"node1": 1}, num_cpus=0).remote()

        def once(size_bytes: int) -> float:
            (ref,) = poolray.get(maker.make.remote(size_bytes))
            started = time.perf_counter()
            assert poolray.get(ref)[-1] == 1
            return size_bytes / (time.perf_counter() - started)

        for size_bytes in TRANSFER_BYTES:
            contestants: dict[str, Callable[[], float]] = {
                "poolray": lambda size_bytes=size_bytes: once(size_bytes),
                "tcp": lambda size_bytes=size_bytes: raw.rate(size_bytes),
            }
            if ray is not None:
                contestants["ray"] = lambda size_bytes=size_bytes: ray.rate("transfer", size_bytes)
            taken = alternate(rounds, contestants)
            name = f"transfer of {size_bytes // 10**6} MB"
            found.append(Comparison(name, taken["poolray"], taken["tcp"], "raw TCP", "B/s", 0.7))
            if ray is not None:
                found.append(Comparison(name, taken["poolray"], taken["ray"], "Ray", "B/s", 1))
    return found, {}


def broadcasts(rounds: int, ray: RaySide | None) -> tuple[list[Comparison], dict[str, Samples]]:
    """One value to four nodes; bytes a second of all of them together."""
    with ExitStack() as stack:
        raw = stack.enter_context(RawTcp(BROADCAST_BYTES))
        stack.enter_context(running_cluster(BROADCAST_NODES))
        look = poolray.remote(last_of)
        value = np.ones(BROADCAST_BYTES, dtype=np.uint8)
        moved = BROADCAST_NODES * BROADCAST_BYTES

        def once() -> float:
            ref = poolray.put(value)
            started = time.perf_counter()
            asked = [
                look.options(resources={f"node{number}": 1}, num_cpus=0).remote(ref)
                for number in range(1, BROADCAST_NODES + 1)
            ]
            assert poolray.get(asked) == [1] * BROADCAST_NODES
            return moved / (time.perf_counter() - started)

        contestants: dict[str, Callable[[], float]] = {
            "poolray": once,
            "tcp": lambda: raw.rate(BROADCAST_BYTES),
        }
        if ray is not None:
            contestants["ray"] = lambda: BROADCAST_NODES * ray.rate("broadcast", BROADCAST_BYTES)
        taken = alternate(rounds, contestants)
    name = f"broadcast of {BROADCAST_BYTES // 10**6} MB to {BROADCAST_NODES} nodes"
    found = [Comparison(name, taken["poolray"], taken["tcp"], "one raw TCP", "B/s", 0.7)]
    if ray is not None:
        found.append(Comparison(name, taken["poolray"], taken["ray"], "Ray", "B/s", 1))
    return found, {}


# ---- calls ---------------------------------------------------------------------------------------


def calls(rounds: int, ray: RaySide | None) -> tuple[list[Comparison], dict[str, Samples]]:
    """Tasks and calls of an actor that run on the other node: one at a time, and in bulk."""
    found: list[Comparison] = []
    alone: dict[str, Samples] = {}
    with running_cluster(1):
        far = {"resources": {"node1": 0.001}}
        task = poolray.remote(successor).options(**far)
        actor = poolray.remote(Counter).options(num_cpus=0, **far).remote()
        poolray.get(actor.add.remote(0))

        def tasks_in_bulk(count: int) -> None:
            refs = [task.remote(number) for number in range(count)]
            assert poolray.get(refs) == list(range(1, count + 1))

        def calls_in_bulk(count: int) -> None:
            sums = poolray.get([actor.add.remote(1) for _ in range(count)])
            assert sums == list(range(sums[0], sums[0] + count))

        def tasks_one_at_a_time(count: int) -> None:
            for number in range(count):
                assert poolray.get(task.remote(number)) == number + 1

        def calls_one_at_a_time(count: int) -> None:
            first = poolray.get(actor.add.remote(1))
            for number in range(1, count):
                assert poolray.get(actor.add.remote(1)) == first + number

        cases: list[tuple[str, Callable[[int], None], str, int]] = [
            ("task on the other node, one at a time", tasks_one_at_a_time, "far_task", 200),
            ("tasks on the other node, in bulk", tasks_in_bulk, "far_tasks", 2000),
            ("call of an actor there, one at a time", calls_one_at_a_time, "far_call", 200),
            ("calls of an actor there, in bulk", calls_in_bulk, "far_calls", 2000),
        ]
        for name, run, case, count in cases:
            contestants: dict[str, Callable[[], float]] = {
                "poolray": lambda run=run, count=count: rate(count, lambda: run(count))
            }
            if ray is not None:
                contestants["ray"] = lambda case=case, count=count: ray.rate(case, count)
            taken = alternate(rounds, contestants)
            if ray is not None:
                found.append(Comparison(name, taken["poolray"], taken["ray"], "Ray", "/s", 5))
            else:
                each = tuple(1 / value for value in taken["poolray"].values)
                alone[f"{name}, each"] = Samples(each)
    return found, alone


# ---- daemons -------------------------------------------------------------------------------------


def starts(rounds: int, ray: RaySide | None) -> tuple[list[Comparison], dict[str, Samples]]:
    """A node's daemon from being asked for until the head counts on it; a head and its node."""
    nodes: list[float] = []
    heads: list[float] = []
    with ExitStack() as stack:
        if sys.dont_write_bytecode:
            # Modules are compiled once, when they are installed: that is not what is asked here.
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(mock.patch.dict(os.environ, PYTHONPYCACHEPREFIX=folder))
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
            Cluster(initialize_head=True).shutdown()
        _time_starts(rounds, heads, nodes)
    return [], {
        "daemon start to ready": Samples(tuple(nodes)),
        "head and its node, start to ready": Samples(tuple(heads)),
    }


def _time_starts(rounds: int, heads: list[float], nodes: list[float]) -> None:
    for _ in range(rounds):
        started = time.perf_counter()
        cluster = Cluster(initialize_head=True)
        heads.append(time.perf_counter() - started)
        started = time.perf_counter()
        cluster.add_node()
        nodes.append(time.perf_counter() - started)
        cluster.shutdown()


def deaths(rounds: int, ray: RaySide | None) -> tuple[list[Comparison], dict[str, Samples]]:
    """A node is killed while it works: until it is declared dead, and until the work is done."""
    declared, finished = [], []
    with running_cluster(0, heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S) as (cluster, _):
        for _ in range(rounds):
            node = cluster.add_node(num_cpus=2, resources={"spare": 2})
            task = poolray.remote(pid_after).options(max_retries=1, resources={"spare": 1})
            folder = Path(cluster.session_folder) / f"begun-{node.node_id}"
            ref = task.remote(str(folder))
            while not folder.exists():
                time.sleep(0.001)
            other = cluster.add_node(num_cpus=2, resources={"spare": 2})
            started = time.perf_counter()
            node.kill()
            while any(row["NodeID"] == node.node_id and row["Alive"] for row in poolray.nodes()):
                time.sleep(0.001)
            declared.append(time.perf_counter() - started)
            poolray.get(ref)
            finished.append(time.perf_counter() - started)
            cluster.remove_node(node, allow_graceful=False)
            cluster.remove_node(other)
    about = f"(heartbeat_timeout_s={HEARTBEAT_TIMEOUT_S:g})"
    return [], {
        f"killed node declared dead {about}": Samples(tuple(declared)),
        f"its task done elsewhere {about}": Samples(tuple(finished)),
    }


def pid_after(path: str) -> int:
    """A task whose first attempt never ends."""
    if os.path.exists(path):
        return os.getpid()
    Path(path).touch()
    time.sleep(600)
    return 0


# ---- the whole -----------------------------------------------------------------------------------

Part = Callable[[int, "RaySide | None"], "tuple[list[Comparison], dict[str, Samples]]"]
PARTS: dict[str, Part] = {
    "calls": calls,
    "transfers": transfers,
    "broadcasts": broadcasts,
    "starts": starts,
    "deaths": deaths,
}
#: Parts in which Ray has the same.
WITH_RAY = {"calls", "transfers", "broadcasts"}


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all")
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    for part in parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}: parts are {', '.join(PARTS)}")
    where = machine()
    print(
        f"{arguments.rounds} rounds; {where['cores']} cores, {where['processor']}, "
        f"{where['python']}, load {where['load_average'][0]:.2f}, commit {commit()}"
    )
    found: list[Comparison] = []
    alone: dict[str, Samples] = {}
    with ExitStack() as stack:
        ray = None
        if arguments.ray_python and WITH_RAY & set(parts):
            program = str(Path(__file__).with_name("_ray_cluster.py"))
            ray = stack.enter_context(RaySide(arguments.ray_python, program))
            print(f"beside Ray {ray.version}")
        for part in parts:
            comparisons, seconds = PARTS[part](arguments.rounds, ray)
            found += comparisons
            alone |= seconds
    if found:
        print_table(COMPARISON_HEAD, [comparison.row() for comparison in found])
    for name, samples in alone.items():
        target = SECONDS_TARGETS.get(name)
        print(
            f"{name}: {show(samples.median)} s "
            f"({show(min(samples.values))} .. {show(max(samples.values))})"
            + (f"; at most {target:g} s: {_met(samples, target)}" if target else "")
        )
    figures: dict[str, Any] = {f"{c.name} / {c.rival}": c.as_json() for c in found}
    figures |= {name: samples.as_json() for name, samples in alone.items()}
    write_json(arguments.json, "cluster", figures)


def _met(samples: Samples, target: float) -> str:
    return "yes" if statistics.median(samples.values) <= target else "NO"


if __name__ == "__main__":
    main()
