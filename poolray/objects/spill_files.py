"""Values on disk: written together to one file, read back one by one, checked.

What: writes ranges of memory to a new file, reads one into memory, maps one where it lies.
Who calls: the I/O threads of a shell; clients for values that memory has no room for.
May touch: files and memory mappings; for URLs see `objects/spill_urls.py`.
Invariants: a file is complete or does not exist; what is read has the length and the checksum that
were noted when it was written, or `SpillFileError` says what is wrong with which file.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

from poolray.objects import spill_urls
from poolray.objects.checksums import checksum_of
from poolray.objects.serialization import deserialize

#: Values in a file begin at multiples of this: each can be mapped on its own.
ALIGNMENT = max(mmap.ALLOCATIONGRANULARITY, 4096)

#: Bytes of one system call; a thread that runs Python meanwhile waits for none of them.
_STEP_BYTES = 64 << 20

#: What the system says when there is no room on a disk.
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)


class SpillFileError(Exception):
    """A value cannot be read from its file, now or ever."""

    def __init__(self, reason: str, *, is_lost: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_lost = is_lost


def write_objects(path: str, sources: Sequence[memoryview]) -> list[tuple[int, int]]:
    """Write values to a new file.

    Returns
    -------
    list of (int, int)
        Offset and checksum of each.

    Raises
    ------
    OSError
        The file cannot be made or the disk is full; nothing is left of it.
    """
    if spill_urls.is_url(path):
        return spill_urls.write_objects(path, sources)
    offsets = []
    end = 0
    for source in sources:
        offsets.append(end)
        end += (source.nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # A full disk is found out before anything is written.
        os.posix_fallocate(descriptor, 0, end)
        places = []
        for source, offset in zip(sources, offsets, strict=True):
            places.append((offset, checksum_of(source)))
            _write_all(descriptor, source, offset)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    return places


def _write_all(descriptor: int, source: memoryview, offset: int) -> None:
    position = 0
    while position < source.nbytes:
        position += os.pwrite(
            descriptor, source[position : position + _STEP_BYTES], offset + position
        )


def read_object(path: str, offset: int, checksum: int, target: memoryview) -> None:
    """Read a value into memory.

    Raises
    ------
    SpillFileError
        The file is gone, too short or damaged, or cannot be read at the moment.
    """
    if spill_urls.is_url(path):
        target[:] = _download(path, offset, target.nbytes)
        _check(path, target, checksum)
        return
    descriptor = _open(path)
    try:
        position = 0
        while position < target.nbytes:
            step = target[position : position + _STEP_BYTES]
            count = os.preadv(descriptor, [step], offset + position)
            if not count:
                raise _too_short(path, offset + target.nbytes, offset + position)
            position += count
    except OSError as error:
        raise SpillFileError(f"its file {path} cannot be read: {error}", is_lost=False) from error
    finally:
        os.close(descriptor)
    _check(path, target, checksum)


def write_value_file(path: str, write: Callable[[memoryview], None], size_bytes: int) -> int:
    """Write a value to a file of its own, for want of room in the arena; gives its checksum.

    Raises
    ------
    OSError
        The file cannot be made or the disk is full; nothing is left of it.
    """
    if spill_urls.is_url(path):
        return spill_urls.write_value(path, write, size_bytes)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        with mmap.mmap(descriptor, size_bytes) as mapping:
            view = memoryview(mapping)
            write(view)
            checksum = checksum_of(view)
            view.release()
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    return checksum


def load_value(path: str, offset: int, size_bytes: int, checksum: int, *, writable: bool) -> Any:
    """A value from its file; its buffers are views of a mapping that outlives the file's name.

    Raises
    ------
    SpillFileError
        The file is gone, too short or damaged, or cannot be read at the moment.
    """
    if spill_urls.is_url(path):
        data = _download(path, offset, size_bytes)
        _check(path, memoryview(data), checksum)
        return deserialize(memoryview(bytearray(data) if writable else data), writable)
    descriptor = _open(path)
    try:
        length = os.fstat(descriptor).st_size
        if length < offset + size_bytes:
            raise _too_short(path, offset + size_bytes, length)
        access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
        mapping = mmap.mmap(descriptor, size_bytes, access=access, offset=offset)
    except OSError as error:
        raise SpillFileError(f"its file {path} cannot be mapped: {error}", is_lost=False) from error
    finally:
        os.close(descriptor)
    view = memoryview(mapping)
    _check(path, view, checksum)
    return deserialize(view, writable)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SpillFileError(f"its file {path} is gone", is_lost=True) from error
    except OSError as error:
        raise SpillFileError(f"its file {path} cannot be opened: {error}", is_lost=False) from error


def _download(url: str, offset: int, size_bytes: int) -> bytes:
    try:
        data = spill_urls.read(url, offset, size_bytes)
    except FileNotFoundError as error:
        raise SpillFileError(f"its file {url} is gone", is_lost=True) from error
    except OSError as error:
        raise SpillFileError(f"its file {url} cannot be read: {error}", is_lost=False) from error
    if len(data) < size_bytes:
        raise _too_short(url, offset + size_bytes, offset + len(data))
    return data


def _too_short(path: str, wanted: int, found: int) -> SpillFileError:
    reason = f"its file {path} ends at byte {found}, before the value does (byte {wanted})"
    return SpillFileError(reason, is_lost=True)


def _check(path: str, data: memoryview, checksum: int) -> None:
    if checksum_of(data) != checksum:
        reason = f"its file {path} was damaged after it was written: the checksum is wrong"
        raise SpillFileError(reason, is_lost=True)
