"""The cluster's key-value store: namespaces of keys, limited in size.

What: puts, gets, deletes and lists values that are opaque bytes.
Who calls: `head/head.py`.
May touch: nothing.
Invariants: `size_bytes` is the sum over keys and values and never above its limit.
"""

from __future__ import annotations

from typing import final

#: Bytes of keys and values together; a put that does not fit is refused.
SIZE_BYTES_MAX = 256 * 1024 * 1024


@final
class KeyValueStore:
    """Values by namespace and key."""

    __slots__ = ("_size_bytes_max", "_spaces", "size_bytes")

    def __init__(self, size_bytes_max: int = SIZE_BYTES_MAX) -> None:
        self._size_bytes_max = size_bytes_max
        #: namespace -> key -> value; a namespace without keys is not kept.
        self._spaces: dict[str, dict[bytes, bytes]] = {}
        self.size_bytes = 0

    def put(self, namespace: str, key: bytes, value: bytes, overwrite: bool) -> bool:
        """Store a value; False when the key is taken and may not be, or there is no room."""
        space = self._spaces.get(namespace, {})
        before = space.get(key)
        if before is not None and not overwrite:
            return False
        growth = len(value) - len(before) if before is not None else len(key) + len(value)
        if self.size_bytes + growth > self._size_bytes_max:
            return False
        self._spaces.setdefault(namespace, space)[key] = value
        self.size_bytes += growth
        return True

    def get(self, namespace: str, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        return self._spaces.get(namespace, {}).get(key)

    def delete(self, namespace: str, key: bytes, by_prefix: bool) -> list[bytes]:
        """Remove a key, or all that begin with it; gives those that there were."""
        space = self._spaces.get(namespace, {})
        keys = self.list(namespace, key) if by_prefix else [key] * (key in space)
        for found in keys:
            self.size_bytes -= len(found) + len(space.pop(found))
        if not space:
            self._spaces.pop(namespace, None)
        return keys

    def list(self, namespace: str, prefix: bytes) -> list[bytes]:
        """The keys that begin so, sorted."""
        return sorted(k for k in self._spaces.get(namespace, {}) if k.startswith(prefix))

    def count(self) -> int:
        """How many keys there are."""
        return sum(len(space) for space in self._spaces.values())

    def check_invariants(self) -> None:
        """Raise AssertionError when the size is not that of what is stored."""
        assert all(self._spaces.values()), "a namespace without keys"
        assert self.size_bytes == sum(
            len(key) + len(value) for space in self._spaces.values() for key, value in space.items()
        )
        assert self.size_bytes <= self._size_bytes_max
