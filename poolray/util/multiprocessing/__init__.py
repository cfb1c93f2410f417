"""`poolray.util.multiprocessing`: the module path at which users of Ray find a pool.

What: poolray's `Pool` under the names of `ray.util.multiprocessing`.
Who calls it: user code.
May touch: nothing by itself.
Invariants: the pool is `poolray.Pool`, with the standard library as its contract.
"""

from __future__ import annotations

from multiprocessing import JoinableQueue, TimeoutError

from poolray.util.multiprocessing.pool import Pool

__all__ = ["JoinableQueue", "Pool", "TimeoutError"]
