"""Ray's side of `benchmarks/cluster.py`: a Ray cluster of several nodes on this machine.

What: starts Ray's own `cluster_utils.Cluster`, then answers each line `<case> <count>` with the
seconds it took, as `_ray_side.py` does.
Who calls: `RaySide` of `_ray_side.py`, from `benchmarks/cluster.py`.
May touch: Ray, standard input and output, the clock.
Invariants: imports Ray only when it runs as a program; ends with its input.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

NODES = 5
_STORE_BYTES = 3 << 30


def main() -> None:
    """Serve until the input ends."""
    # Ray prints to standard output; the answers go to a copy that only this program knows.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import numpy as np
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": _STORE_BYTES},
    )
    for number in range(1, NODES):
        cluster.add_node(
            num_cpus=2, resources={f"node{number}": 4}, object_store_memory=_STORE_BYTES
        )
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)

    @ray.remote(resources={"node1": 1}, num_cpus=0)
    class Maker:
        def make(self, size_bytes: int) -> list[Any]:
            return [ray.put(np.ones(size_bytes, dtype=np.uint8))]

    @ray.remote(num_cpus=0)
    def last_of(array: Any) -> int:
        return int(array[-1])

    maker = Maker.remote()

    def transfer(size_bytes: int) -> float:
        (ref,) = ray.get(maker.make.remote(size_bytes))
        started = time.perf_counter()
        assert ray.get(ref)[-1] == 1
        return time.perf_counter() - started

    def broadcast(size_bytes: int) -> float:
        ref = ray.put(np.ones(size_bytes, dtype=np.uint8))
        started = time.perf_counter()
        asked = [
            last_of.options(resources={f"node{number}": 1}).remote(ref)
            for number in range(1, NODES)
        ]
        assert ray.get(asked) == [1] * (NODES - 1)
        return time.perf_counter() - started

    cases = {"transfer": transfer, "broadcast": broadcast}
    broadcast(1 << 20)
    print(ray.__version__, file=answers, flush=True)
    for line in sys.stdin:
        case, count = line.split()
        print(cases[case](int(count)), file=answers, flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
