"""What `wait` is given, checked.

What: raises for what is no list of different refs; what `wait` left is known to be one.
Who calls: `api.py`.
May touch: nothing.
Invariants: a ref is looked at once, however often lists that follow on each other are waited for.
"""

from __future__ import annotations

from typing import Any

from poolray.client_rest import Rest
from poolray.generators import ObjectRefGenerator
from poolray.objects.object_ref import ObjectRef


def check_wait(refs: Any, num_returns: Any, timeout: Any) -> int:
    """How many refs there are."""
    is_known = type(refs) is Rest and refs.is_checked
    if not is_known:
        _check_list(refs)
    if timeout is not None and timeout < 0:
        raise ValueError(f"The 'timeout' argument must be nonnegative. Received {timeout}")
    if not is_known:
        _check_refs(refs)
    size = len(refs)
    if not size:
        return 0
    if num_returns <= 0:
        raise ValueError(f"Invalid number of objects to return {num_returns}.")
    if num_returns > size:
        raise ValueError(
            "num_returns cannot be greater than the number of ray_waitables provided to ray.wait."
        )
    return size


def _check_list(refs: Any) -> None:
    if isinstance(refs, (ObjectRef, ObjectRefGenerator)):
        raise TypeError(
            "wait() expected a list of ray.ObjectRef or ray.ObjectRefGenerator, got a single "
            f"ray.ObjectRef or ray.ObjectRefGenerator {refs!r}"
        )
    if not isinstance(refs, list):
        raise TypeError(
            f"wait() expected a list of ray.ObjectRef or ray.ObjectRefGenerator, got {type(refs)}"
        )


def _check_refs(refs: list[Any]) -> None:
    rest = refs if type(refs) is Rest else None
    new = enumerate(refs) if rest is None else rest.unchecked()
    for _, ref in new:
        if not isinstance(ref, (ObjectRef, ObjectRefGenerator)):
            raise TypeError(
                "wait() expected a list of ray.ObjectRef or ray.ObjectRefGenerator, got list "
                f"containing {type(ref)}"
            )
    if rest is None:
        are_different = len({ref._id for ref in refs}) == len(refs)
    else:
        are_different = rest.note_checked(rest.unchecked())
    if not are_different:
        raise ValueError("Wait requires a list of unique ray_waitables.")
