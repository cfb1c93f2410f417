"""`Pool` as programs for `ray.util.multiprocessing.pool` make it.

What: `poolray.Pool`, with what Ray's own takes besides.
Who calls it: user code.
May touch: nothing by itself.
Invariants: what Ray's pool takes and this one cannot carry out is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from multiprocessing import TimeoutError
from typing import Any

from poolray import pool as _pool
from poolray.exceptions import NotSupportedError
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
    "Pool",
    "TimeoutError",
]


class Pool(_pool.Pool):
    """`poolray.Pool`; takes the arguments of Ray's pool too.

    Parameters
    ----------
    processes, initializer, initargs, maxtasksperchild, context
        See `poolray.Pool`.
    ray_address : str, optional
        The same as `address`.
    ray_remote_args : dict, optional
        Options of Ray's actors. Workers of a pool are no actors: only what changes nothing (no
        option, `num_cpus` of 0 or 1) is accepted.
    **options
        See `poolray.Pool`.

    Raises
    ------
    NotSupportedError
        `ray_remote_args` asks for something else.

    Examples
    --------
    >>> from poolray.util.multiprocessing import Pool
    >>> with Pool(2) as pool:
    ...     pool.map(lambda x: x * x, range(3)), pool.apply(pow, (2,), {"exp": 5})
    ([0, 1, 4], 32)
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] | None = None,
        maxtasksperchild: int | None = None,
        context: Any = None,
        ray_address: str | None = None,
        ray_remote_args: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_remote_args(ray_remote_args)
        if ray_address not in (None, "auto", "local"):
            options.setdefault("address", ray_address)
        super().__init__(
            processes, initializer, initargs or (), maxtasksperchild, context, **options
        )

    def apply(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] | None = (),
        kwds: Mapping[str, Any] | None = None,
        *,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Call `func(*args, **kwds)` in a worker and wait for the value.

        Parameters
        ----------
        kwargs : dict, optional
            What Ray calls `kwds`.
        **options
            See `poolray.Pool.apply`.
        """
        return super().apply(func, args or (), kwargs or kwds or {}, **options)

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] | None = (),
        kwds: Mapping[str, Any] | None = None,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        *,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ApplyResult[Any]:
        """`apply` without waiting; see `poolray.Pool.apply_async`.

        Parameters
        ----------
        kwargs : dict, optional
            What Ray calls `kwds`.
        """
        return super().apply_async(
            func, args or (), kwargs or kwds or {}, callback, error_callback, **options
        )


def check_remote_args(options: Mapping[str, Any] | None) -> None:
    """Refuse options of actors that a pool's workers cannot have."""
    for name, value in (options or {}).items():
        if not (name == "num_cpus" and value in (None, 0, 1)):
            raise NotSupportedError(
                f"ray_remote_args={{{name!r}: {value!r}}}: workers of a poolray pool are no actors "
                "and take no options. Leave it out, or call a remote function with that option."
            )
