"""The namespace of `multiprocess.pool`: our pool, the standard library's pool of threads.

What: the classes, bound to the start method that `multiprocess` has in force.
Who calls: users, `from poolray.multiprocessing.pool import Pool`.
May touch: nothing by itself.
Invariants: `Pool` raises the errors of this namespace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from multiprocessing import TimeoutError
from multiprocessing.pool import (  # type: ignore[attr-defined] # not in the stubs
    MaybeEncodingError,
    RemoteTraceback,
    ThreadPool,
)
from typing import Any

import multiprocess

from poolray import pool as _pool
from poolray.pool import (
    ApplyResult,
    AsyncResult,
    IMapIterator,
    IMapUnorderedIterator,
    MapResult,
)

__all__ = [
    "ApplyResult",
    "AsyncResult",
    "IMapIterator",
    "IMapUnorderedIterator",
    "MapResult",
    "MaybeEncodingError",
    "Pool",
    "RemoteTraceback",
    "ThreadPool",
    "TimeoutError",
]


class Pool(_pool.Pool):
    """`poolray.Pool`, with the start method that `multiprocess` has in force.

    Parameters
    ----------
    processes, initializer, initargs, maxtasksperchild, context, **options
        See `poolray.Pool`.

    Examples
    --------
    >>> from poolray.multiprocessing import Pool
    >>> with Pool(2) as pool:
    ...     pool.map(lambda x: x * x, range(3))
    [0, 1, 4]
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        **options: Any,
    ) -> None:
        if context is None:
            context = multiprocess.get_context()
        super().__init__(processes, initializer, initargs, maxtasksperchild, context, **options)
