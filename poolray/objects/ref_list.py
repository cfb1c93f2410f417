"""The list of refs that a generator with `num_returns="dynamic"` gives.

What: the list as readers get it, and as a worker writes it.
Who calls: `get` gives it; `local/worker_streams.py` writes it.
May touch: nothing.
Invariants: the worker that writes one has no handles to the items, so it counts none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from poolray.ids import ObjectId
from poolray.objects import object_ref
from poolray.objects.object_ref import ObjectRef
from poolray.objects.serialization import note_reference


@final
class DynamicObjectRefGenerator:
    """Refs of all that a generator with `num_returns="dynamic"` has yielded.

    Examples
    --------
    >>> import poolray
    >>> @poolray.remote(num_returns="dynamic")
    ... def letters(word: str):
    ...     yield from word
    >>> refs = poolray.get(letters.remote("abc"))
    >>> len(refs), [poolray.get(ref) for ref in refs]
    (3, ['a', 'b', 'c'])
    """

    def __init__(self, refs: list[ObjectRef[object]]) -> None:
        self._refs = refs

    def __iter__(self) -> Iterator[ObjectRef[object]]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __reduce__(self) -> tuple[object, ...]:
        return DynamicObjectRefGenerator, (self._refs,)


@final
class ItemList:
    """What a worker writes where readers find a `DynamicObjectRefGenerator`: it has no handles."""

    def __init__(self, object_ids: list[ObjectId]) -> None:
        self._object_ids = object_ids

    def __reduce__(self) -> tuple[object, ...]:
        for object_id in self._object_ids:
            note_reference(object_id)
        return _rebuild_dynamic, (self._object_ids,)


def _rebuild_dynamic(object_ids: list[ObjectId]) -> DynamicObjectRefGenerator:
    return DynamicObjectRefGenerator(
        [object_ref._rebuild_ref(object_id) for object_id in object_ids]
    )
