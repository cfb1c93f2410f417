"""What the calls of `poolray.util.collective` are made of: backends, operations, errors.

What: names and values that users pass in, and exceptions that they catch.
Who calls: user code; the other modules of this package.
May touch: nothing.
Invariants: each error pickles with its fields, and is a `RuntimeError`, as in the reference.
"""

from __future__ import annotations

import enum
from typing import Any, final

from poolray.exceptions import PoolrayError

__all__ = ["Backend", "CollectiveError", "CollectiveTimeoutError", "ReduceOp"]


class ReduceOp(enum.Enum):
    """How values of several members become one."""

    SUM = 0
    PRODUCT = 1
    MIN = 2
    MAX = 3


class Backend:
    """Names of backends; `Backend("gloo")` gives the name as the library writes it.

    "gloo" works on the memory that processes of one machine share; it needs neither torch nor gloo.
    "nccl" is for tensors of torch on GPUs, and needs torch: ``pip install 'poolray[nccl]'``.

    Raises
    ------
    ValueError
        There is no such backend.

    Examples
    --------
    >>> from poolray.util.collective.types import Backend
    >>> Backend("gloo")
    'GLOO'
    """

    NCCL = "NCCL"
    GLOO = "GLOO"

    def __new__(cls, name: str) -> Any:
        """The name in capitals."""
        found = {"NCCL": cls.NCCL, "GLOO": cls.GLOO, "TORCH_GLOO": cls.GLOO}.get(name.upper())
        if found is None:
            raise ValueError(f"Unrecognized backend: '{name}'. Only NCCL and GLOO are supported.")
        return found


class CollectiveError(PoolrayError, RuntimeError):
    """A member of a collective group has died or left, or the members called different things.

    The group is of no use any more: each member that lives calls `destroy_collective_group`, and
    all of them `init_collective_group`, to go on.

    Attributes
    ----------
    group_name : str
    rank : int
        Of the process that raises this.
    reason : str
    """

    def __init__(self, *, group_name: str, rank: int, reason: str) -> None:
        super().__init__(
            f"Collective group '{group_name}', rank {rank}: {reason}. Call "
            "destroy_collective_group() in all members that live, and make the group anew."
        )
        self.group_name = group_name
        self.rank = rank
        self.reason = reason


@final
class CollectiveTimeoutError(CollectiveError, TimeoutError):
    """A member did not come within the group's timeout."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Of its two builtin bases only this one can make it."""
        return TimeoutError.__new__(cls)
