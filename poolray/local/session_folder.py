"""The folders in which a runtime keeps files of values, and what killed ones have left.

    <directory>/poolray-<pid>-<job>-<n>/   lock          held with flock while the driver lives
                                           value-<n>     a value that its maker wrote to disk
                                           spilled-<n>   values that the driver spilled
    <URL>/poolray-<pid>-<job>-<n>/         the same without a lock, which lies in a folder of the
                                           same name below the temporary folder, with the URL

What: makes a folder per spill directory when the first file is needed, hands out paths by turns,
removes the folders at the end; sweeps folders of dead drivers.
Who calls: the runtime and its I/O threads.
May touch: folders and files below the spill directories.
Invariants: a folder is locked before a path in it is given out; nobody sweeps a folder whose lock
is held, or one without a lock that is younger than a minute or whose name is not such a folder's
(a `Cluster` locks its own, and has it swept when it was killed).
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import final

from poolray.objects import spill_urls

_PREFIX = "poolray-"
_NAME = re.compile(r"poolray-\d+-.+-\d+")
_LOCK = "lock"
#: Beside a lock: the folder elsewhere that it is for.
_URL = "url"
#: A folder is made a moment before its lock.
_UNLOCKED_MAX_S = 60.0


@final
class SessionFolders:
    """One folder in each spill directory, made when the first is needed."""

    def __init__(self, directories: Sequence[str], name: str) -> None:
        self._directories = list(directories)
        self._name = name
        self._mutex = threading.Lock()  # guards the fields below: I/O threads ask too
        #: folder that has a lock -> descriptor of its lock file.
        self._locks: dict[str, int] = {}
        #: Folders on other storage: URL -> the folder here that has its lock.
        self._remote: dict[str, str] = {}
        #: directory -> folder; two directories may be one and the same.
        self._folders: dict[str, str] = {}
        self._turns = itertools.count()
        self._closed = False

    def next_folders(self) -> list[str]:
        """All folders that can be used, the one first whose turn it is.

        Raises
        ------
        OSError
            None can be made.
        """
        with self._mutex:
            if self._closed:
                raise FileNotFoundError("the runtime has ended")
            error: OSError | None = None
            usable = []
            for directory in self._directories:
                try:
                    usable.append(self._folder_in(directory))
                except OSError as reason:
                    error = reason
            if not usable:
                assert error is not None
                raise error
            turn = next(self._turns) % len(usable)
        return usable[turn:] + usable[:turn]

    def holds(self, path: str) -> bool:
        """Whether a file is in one of them."""
        return path.rpartition("/")[0] in self._folders.values()

    def _folder_in(self, directory: str) -> str:
        folder = self._folders.get(directory)
        if folder is None:
            # Two names of one directory must not meet in one folder.
            name = f"{_PREFIX}{self._name}-{len(self._folders)}"
            if spill_urls.is_url(directory):
                folder = self._make_remote(f"{directory.rstrip('/')}/{name}", name)
            else:
                os.makedirs(directory, exist_ok=True)
                folder = self._make(os.path.join(directory, name))
            self._folders[directory] = folder
        return folder

    def _make_remote(self, url: str, name: str) -> str:
        """Nothing can be locked there: the lock is here, and says for what."""
        local = self._make(os.path.join(tempfile.gettempdir(), name))
        with open(os.path.join(local, _URL), "w", encoding="utf-8") as note:
            note.write(url)
        spill_urls.make_folder(url)
        self._remote[url] = local
        return url

    def _make(self, folder: str) -> str:
        while True:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            path = os.path.join(folder, _LOCK)
            descriptor = -1
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                # Somebody may have swept the folder between its making and its locking.
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                    self._locks[folder] = descriptor
                    return folder
            except FileNotFoundError:
                pass  # swept: once more
            except BaseException:
                if descriptor >= 0:
                    os.close(descriptor)
                raise
            if descriptor >= 0:
                os.close(descriptor)

    def delete(self, name: str) -> None:
        """Delete a file with this name, wherever it is, if it was ever made."""
        for folder in list(self._folders.values()):
            remove_file(os.path.join(folder, name))

    def remove(self) -> None:
        """The runtime ends: its folders go with all that is in them."""
        with self._mutex:
            self._closed = True
            kept = {local for url, local in self._remote.items() if not _remove_remote(url)}
            for folder, descriptor in self._locks.items():
                if folder not in kept:  # else a later runtime tries again
                    shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)
            self._locks.clear()

    def abandon(self) -> None:
        """In a forked child: the folders are the parent's, and so is the lock, which lives as long
        as somebody has the file open.
        """
        self._closed = True
        for descriptor in self._locks.values():
            os.close(descriptor)
        self._locks.clear()


def remove_file(path: str) -> None:
    """Delete a file, if it is there."""
    if spill_urls.is_url(path):
        spill_urls.remove_file(path)
        return
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass  # its writer died before it made it, or somebody cleaned up


def _remove_remote(url: str) -> bool:
    """Delete a folder on other storage; False when that cannot be reached."""
    try:
        spill_urls.remove_folder(url)
    except (OSError, ImportError):
        return False
    return True


def lock_folder(folder: str) -> int:
    """Keep a folder from being swept until this descriptor is closed, or its process has ended."""
    descriptor = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def sweep(directories: Sequence[str]) -> None:
    """Remove the folders that killed drivers of this user have left."""
    remote = [tempfile.gettempdir()] if any(map(spill_urls.is_url, directories)) else []
    for directory in dict.fromkeys([*directories, *remote]):
        try:
            names = os.listdir(directory)
        except OSError:
            continue  # not made yet, or not ours to read: there is nothing that we could remove
        for name in names:
            if name.startswith(_PREFIX):
                _sweep_folder(os.path.join(directory, name))


def _sweep_folder(folder: str) -> None:
    try:
        status = os.lstat(folder)
    except OSError:
        return  # somebody else has removed it since it was listed
    try:
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return
        descriptor = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        is_old = time.time() - status.st_mtime > _UNLOCKED_MAX_S
        if is_old and _NAME.fullmatch(os.path.basename(folder)):
            shutil.rmtree(folder, ignore_errors=True)
        return
    except OSError:
        return  # not ours after all
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        note = os.path.join(folder, _URL)
        if os.path.exists(note):
            with open(note, encoding="utf-8") as stream:
                spill_urls.remove_folder(stream.read())
        shutil.rmtree(folder, ignore_errors=True)
    except (OSError, ImportError):
        pass  # its driver lives, or the storage cannot be reached now
    finally:
        os.close(descriptor)
