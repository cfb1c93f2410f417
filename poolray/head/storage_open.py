"""Which storage a url names.

What: `sqlite:///path`, `redis://…` or nothing at all become something that keeps a head's rows.
Who calls: the head's shell, at its start.
May touch: what the url names.
Invariants: a storage is used by one head at a time; rows come back as they were written last.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from poolray.head.state import Change


class Storage(Protocol):
    """Where a head's rows are kept across its lives."""

    def load(self) -> dict[str, dict[bytes, bytes]]:
        """All rows: table -> key -> value; what `Head.restore` takes."""
        ...

    def write(self, changes: Iterable[Change]) -> None:
        """Store changes, all or none; they are safe when this returns."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


def open_storage(url: str, namespace: str = "poolray") -> Storage:
    """The storage that a url names.

    Parameters
    ----------
    url : str
        `sqlite:///relative/path`, `sqlite:////absolute/path`, or `redis://host:port/database`.
    namespace : str
        Of a server that several clusters share: whose rows they are.

    Raises
    ------
    ValueError
        The url names no storage.
    PoolrayError
        The storage cannot be used.
    """
    scheme, colon, rest = url.partition("://")
    if scheme == "sqlite" and colon and len(rest) > 1 and rest.startswith("/"):
        from poolray.head.storage_sqlite import SqliteStorage

        return SqliteStorage(rest[1:])
    if scheme in ("redis", "rediss", "unix") and rest:
        from poolray.head.storage_redis import RedisStorage

        return RedisStorage(url, namespace)
    raise ValueError(
        f"storage {url!r} is neither sqlite:///path/to/file.db nor redis://host:port: use one of "
        "these"
    )
