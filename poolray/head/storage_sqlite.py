"""What a head must not forget, in one SQLite file.

What: rows by table and key; a batch of changes is there as a whole or not at all.
Who calls: the head's shell.
May touch: the file that it is given.
Invariants: when `write` has returned, the changes outlast a kill of the process (and, unless
`synchronous` says otherwise, one of the machine); a second process is refused, in words.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable
from typing import final

from poolray.exceptions import PoolrayError
from poolray.head.state import Change


@final
class SqliteStorage:
    """A head's rows in a file.

    Parameters
    ----------
    path : str
        The file; it is made when it is missing, with its folder.

    Raises
    ------
    PoolrayError
        The file cannot be used: it is no database, another head has it, or the disk is full.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
            # (What is in it may be secret: made before SQLite does, to be readable by us alone.)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._connection = sqlite3.connect(
                path, timeout=5.0, isolation_level=None, check_same_thread=False
            )
            self._open()
        except (OSError, sqlite3.Error) as error:
            raise PoolrayError(f"The head cannot use {path} as its storage: {error}.") from error

    def _open(self) -> None:
        execute = self._connection.execute
        # The lock is taken at the first write and kept until the end: one head per file.
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = NORMAL")
        execute("BEGIN IMMEDIATE")
        execute(
            "CREATE TABLE IF NOT EXISTS rows (space TEXT, key BLOB, value BLOB NOT NULL, "
            "PRIMARY KEY (space, key)) WITHOUT ROWID"
        )
        execute("COMMIT")

    def load(self) -> dict[str, dict[bytes, bytes]]:
        """All rows: table -> key -> value."""
        tables: dict[str, dict[bytes, bytes]] = {}
        try:
            for space, key, value in self._connection.execute("SELECT space, key, value FROM rows"):
                tables.setdefault(space, {})[key] = value
        except sqlite3.Error as error:
            raise self._failed(error) from error
        return tables

    def write(self, changes: Iterable[Change]) -> None:
        """Store changes, all or none."""
        execute = self._connection.execute
        try:
            execute("BEGIN IMMEDIATE")
            for change in changes:
                if change.value is None:
                    execute(
                        "DELETE FROM rows WHERE space = ? AND key = ?", (change.table, change.key)
                    )
                else:
                    execute(
                        "INSERT OR REPLACE INTO rows VALUES (?, ?, ?)",
                        (change.table, change.key, change.value),
                    )
            execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):  # the first error is the one to tell
                execute("ROLLBACK")
            raise self._failed(error) from error

    def _failed(self, error: sqlite3.Error) -> PoolrayError:
        return PoolrayError(f"The head's storage {self._path} failed: {error}.")

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()
