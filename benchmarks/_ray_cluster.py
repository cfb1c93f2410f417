"""Ray's side of `benchmarks/cluster.py`: a Ray cluster of several nodes on this machine.

What: starts Ray's own `cluster_utils.Cluster`, then answers each line `<case> <count>` with the
seconds that the part took that is asked about.
Who calls: `RaySide` of `_ray_side.py`, from `benchmarks/cluster.py`.
May touch: Ray, standard input and output, the clock.
Invariants: imports Ray only when it runs as a program; ends with its input.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks._side import serve

NODES = 5
_STORE_BYTES = 3 << 30


def start() -> tuple[str, dict[str, Any]]:
    """A cluster, and what it is asked for."""
    import atexit

    import numpy as np
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": _STORE_BYTES},
    )

    def have_nodes(count: int) -> None:
        """Add nodes until there are so many: those that only stand by cost time too."""
        for number in range(len(cluster.list_all_nodes()), count):
            cluster.add_node(
                num_cpus=2, resources={f"node{number}": 4}, object_store_memory=_STORE_BYTES
            )
        cluster.wait_for_nodes()

    have_nodes(2)
    ray.init(address=cluster.address, log_to_driver=False)

    @ray.remote(resources={"node1": 1}, num_cpus=0)
    class Maker:
        def make(self, size_bytes: int) -> list[Any]:
            return [ray.put(np.ones(size_bytes, dtype=np.uint8))]

    @ray.remote(num_cpus=0)
    def last_of(array: Any) -> int:
        return int(array[-1])

    @ray.remote(resources={"node1": 0.001})
    def successor(number: int) -> int:
        return number + 1

    @ray.remote(resources={"node1": 0.001}, num_cpus=0)
    class Counter:
        def __init__(self) -> None:
            self._sum = 0

        def add(self, number: int) -> int:
            self._sum += number
            return self._sum

    maker, counter = Maker.remote(), Counter.remote()

    def transfer(size_bytes: int) -> float:
        (ref,) = ray.get(maker.make.remote(size_bytes))
        started = time.perf_counter()
        assert ray.get(ref)[-1] == 1
        return time.perf_counter() - started

    def broadcast(size_bytes: int) -> float:
        have_nodes(NODES)
        ref = ray.put(np.ones(size_bytes, dtype=np.uint8))
        started = time.perf_counter()
        asked = [
            last_of.options(resources={f"node{number}": 1}).remote(ref)
            for number in range(1, NODES)
        ]
        assert ray.get(asked) == [1] * (NODES - 1)
        return time.perf_counter() - started

    def far_task(count: int) -> float:
        started = time.perf_counter()
        for number in range(count):
            assert ray.get(successor.remote(number)) == number + 1
        return time.perf_counter() - started

    def far_tasks(count: int) -> float:
        started = time.perf_counter()
        refs = [successor.remote(number) for number in range(count)]
        assert ray.get(refs) == list(range(1, count + 1))
        return time.perf_counter() - started

    def far_call(count: int) -> float:
        started = time.perf_counter()
        first = ray.get(counter.add.remote(1))
        for number in range(1, count):
            assert ray.get(counter.add.remote(1)) == first + number
        return time.perf_counter() - started

    def far_calls(count: int) -> float:
        started = time.perf_counter()
        sums = ray.get([counter.add.remote(1) for _ in range(count)])
        assert sums == list(range(sums[0], sums[0] + count))
        return time.perf_counter() - started

    cases = {
        "transfer": transfer,
        "broadcast": broadcast,
        "far_task": far_task,
        "far_tasks": far_tasks,
        "far_call": far_call,
        "far_calls": far_calls,
    }
    atexit.register(cluster.shutdown)
    atexit.register(ray.shutdown)  # before the other
    transfer(1 << 20)
    return ray.__version__, cases


if __name__ == "__main__":
    serve(start)
