"""What a head must not forget, in a Redis server.

What: rows by table and key, in one hash per table; a batch of changes is one transaction.
Who calls: the head's shell.
May touch: the server that it is given.
Invariants: when `write` has returned, the server has the changes (whether they outlast the server
is its own setting); rows of another cluster, with another namespace, are never touched.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import final

from poolray.exceptions import PoolrayError
from poolray.head.state import Change

#: A server that does not answer for this long is out of reach.
_TIMEOUT_S = 5.0


@final
class RedisStorage:
    """A head's rows in a server.

    Parameters
    ----------
    url : str
        `redis://[user:password@]host[:port][/database]`, `rediss://` with encryption.
    namespace : str
        Begins the names of all keys: one server may serve several clusters.

    Raises
    ------
    PoolrayError
        The package `redis` is not installed, or the server cannot be reached.
    """

    def __init__(self, url: str, namespace: str = "poolray") -> None:
        try:
            redis = importlib.import_module("redis")
        except ImportError as error:
            raise PoolrayError(
                "A storage in Redis needs the package redis: pip install 'poolray[redis]'."
            ) from error
        self._errors: type[Exception] = redis.RedisError
        self._prefix = f"{namespace}:".encode()
        try:
            self._client = redis.Redis.from_url(
                url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
            )
            self._client.ping()
        except (redis.RedisError, ValueError) as error:
            # (The url may hold a password: only what redis says of it is shown.)
            raise PoolrayError(f"The head cannot use Redis as its storage: {error}.") from error

    def load(self) -> dict[str, dict[bytes, bytes]]:
        """All rows: table -> key -> value."""
        tables: dict[str, dict[bytes, bytes]] = {}
        try:
            for name in self._client.scan_iter(match=_escaped(self._prefix) + b"*"):
                tables[name[len(self._prefix) :].decode()] = self._client.hgetall(name)
        except self._errors as error:
            raise self._failed(error) from error
        return tables

    def write(self, changes: Iterable[Change]) -> None:
        """Store changes, all or none."""
        try:
            with self._client.pipeline(transaction=True) as pipeline:
                for change in changes:
                    name = self._prefix + change.table.encode()
                    if change.value is None:
                        pipeline.hdel(name, change.key)
                    else:
                        pipeline.hset(name, change.key, change.value)
                pipeline.execute()
        except self._errors as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> PoolrayError:
        return PoolrayError(f"The head's storage in Redis failed: {error}.")

    def close(self) -> None:
        """Hang up."""
        self._client.close()


def _escaped(prefix: bytes) -> bytes:
    """A prefix as a pattern that matches nothing but itself."""
    return b"".join(b"\\" + bytes([c]) if c in b"*?[]\\^" else bytes([c]) for c in prefix)
