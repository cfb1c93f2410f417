"""The lists that `wait` takes and gives.

What: checks what `wait` is given, and makes lists that it need not check again.
Who calls: `api.py`.
May touch: nothing.
Invariants: a `Rest` whose `is_checked` is true holds different refs.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar, final

from poolray.generators import ObjectRefGenerator
from poolray.objects.object_ref import ObjectRef

W = TypeVar("W", bound="ObjectRef[Any] | ObjectRefGenerator[Any]")


@final
class Rest(list[Any]):
    """What `wait` leaves: different refs, which it need not look at again while nobody changes it.

    Who takes thousands of refs one by one would else have each of them checked thousands of times.
    """

    __slots__ = ("is_checked",)
    is_checked: bool

    def __reduce__(self) -> Any:
        return list, (list(self),)


def _changes(name: str) -> Any:
    change = getattr(list, name)

    @functools.wraps(change)
    def changed(self: Rest, *args: Any, **kwargs: Any) -> Any:
        self.is_checked = False
        return change(self, *args, **kwargs)

    return changed


for _name in ("__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "extend", "insert"):
    setattr(Rest, _name, _changes(_name))


def without(refs: list[W], indexes: list[int]) -> list[W]:
    """The other refs, in order."""
    rest: Rest
    if len(indexes) < 8:
        rest = Rest(refs)
        for index in reversed(indexes):
            list.__delitem__(rest, index)
    else:
        chosen = dict.fromkeys(indexes)
        rest = Rest(ref for index, ref in enumerate(refs) if index not in chosen)
    rest.is_checked = True
    return rest


def check_wait(refs: Any, num_returns: Any, timeout: Any) -> None:
    if isinstance(refs, (ObjectRef, ObjectRefGenerator)):
        raise TypeError(
            "wait() expected a list of ray.ObjectRef or ray.ObjectRefGenerator, got a single "
            f"ray.ObjectRef or ray.ObjectRefGenerator {refs!r}"
        )
    if not isinstance(refs, list):
        raise TypeError(
            f"wait() expected a list of ray.ObjectRef or ray.ObjectRefGenerator, got {type(refs)}"
        )
    if timeout is not None and timeout < 0:
        raise ValueError(f"The 'timeout' argument must be nonnegative. Received {timeout}")
    is_known = type(refs) is Rest and refs.is_checked
    for ref in () if is_known else refs:
        if not isinstance(ref, (ObjectRef, ObjectRefGenerator)):
            raise TypeError(
                "wait() expected a list of ray.ObjectRef or ray.ObjectRefGenerator, got list "
                f"containing {type(ref)}"
            )
    if not refs:
        return
    if not is_known and len({ref._id for ref in refs}) != len(refs):
        raise ValueError("Wait requires a list of unique ray_waitables.")
    if num_returns <= 0:
        raise ValueError(f"Invalid number of objects to return {num_returns}.")
    if num_returns > len(refs):
        raise ValueError(
            "num_returns cannot be greater than the number of ray_waitables provided to ray.wait."
        )
