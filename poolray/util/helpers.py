"""Results in the order in which they come.

What: iterators over the results of many calls, for loops that go on with what is there.
Who calls it: user code, as `poolray.util.as_completed` and `map_unordered`.
May touch: nothing beyond `poolray.api`.
Invariants: each result is given once; nothing is submitted beyond the limit on what waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from poolray.api import get, wait
from poolray.objects.object_ref import ObjectRef

__all__ = ["as_completed", "map_unordered"]

_CHUNK = 10
_PENDING_MAX = 100


def as_completed(
    refs: Sequence[ObjectRef[Any]],
    *,
    chunk_size: int = _CHUNK,
    yield_obj_refs: bool = False,
    **kwargs: Any,
) -> Iterator[Any]:
    """Results of calls, as they come.

    Parameters
    ----------
    refs : sequence of ObjectRef
        What to wait for.
    chunk_size : int, default 10
        Results to wait for at a time: with 1 each is given as soon as it is there, with more the
        loop goes on more rarely.
    yield_obj_refs : bool, default False
        Give refs that are ready instead of their values, so that an error is raised where it is
        looked at.
    **kwargs
        For `wait`: `timeout`, `fetch_local`.

    Yields
    ------
    object or ObjectRef
        Within a chunk in the order of `refs`.

    Raises
    ------
    ValueError
        `chunk_size` is less than 1; `num_returns` is given.
    Exception
        What a call raised; the iteration ends with it.

    Examples
    --------
    >>> import poolray
    >>> square = poolray.remote(lambda n: n * n)
    >>> sorted(poolray.util.as_completed([square.remote(n) for n in range(4)], chunk_size=1))
    [0, 1, 4, 9]
    """
    _check(chunk_size, kwargs)
    left = list(refs)
    while left:
        ready, left = _next_chunk(left, chunk_size, yield_obj_refs, kwargs)
        yield from ready


def map_unordered(
    fn: Any,
    items: Iterable[Any],
    *,
    backpressure_size: int | None = _PENDING_MAX,
    chunk_size: int = _CHUNK,
    yield_obj_refs: bool = False,
    **kwargs: Any,
) -> Iterator[Any]:
    """Call a remote function with each item; results as they come.

    Parameters
    ----------
    fn : remote function
        Takes one argument.
    items : iterable
        Read as calls are made, so it may be endless.
    backpressure_size : int, optional, default 100
        Calls that may be under way at once; None: any number.
    chunk_size, yield_obj_refs, **kwargs
        As for `as_completed`.

    Yields
    ------
    object or ObjectRef

    Raises
    ------
    ValueError
        `backpressure_size` or `chunk_size` is less than 1; `num_returns` is given.
    Exception
        What a call raised; the iteration ends with it.

    Examples
    --------
    >>> import poolray
    >>> square = poolray.remote(lambda n: n * n)
    >>> sorted(poolray.util.map_unordered(square, range(5), backpressure_size=2, chunk_size=1))
    [0, 1, 4, 9, 16]
    """
    if backpressure_size is not None and backpressure_size <= 0:
        raise ValueError("backpressure_size must be positive.")
    _check(chunk_size, kwargs)
    pending: list[Any] = []
    for item in items:
        pending.append(fn.remote(item))
        if backpressure_size is not None and len(pending) >= backpressure_size:
            ready, pending = _next_chunk(pending, chunk_size, yield_obj_refs, kwargs)
            yield from ready
    yield from as_completed(pending, chunk_size=chunk_size, yield_obj_refs=yield_obj_refs, **kwargs)


def _check(chunk_size: int, kwargs: dict[str, Any]) -> None:
    if chunk_size < 1:
        raise ValueError("`chunk_size` must be >= 1")
    if "num_returns" in kwargs:
        raise ValueError("Use the `chunk_size` argument instead of `num_returns`.")


def _next_chunk(
    refs: list[Any], chunk_size: int, as_refs: bool, kwargs: dict[str, Any]
) -> tuple[list[Any], list[Any]]:
    """What has come, at most so much, and the refs that are left."""
    ready, left = wait(refs, num_returns=min(chunk_size, len(refs)), **kwargs)
    return (ready if as_refs else get(ready)), left
