"""Values on storage that is no file system of this machine: what `fsspec` reaches.

What: the calls of `objects/spill_files.py` for URLs: write together, read one, load one, delete.
Who calls: `objects/spill_files.py`, for paths that are URLs; `local/session_folder.py` for folders.
May touch: the network and whatever a URL's protocol touches, through `fsspec` (an extra).
Invariants: as of `objects/spill_files.py`; a value is read into memory, for nothing of it can be
mapped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from poolray.objects.checksums import checksum_of

#: Protocols whose files only the process that wrote them can see.
_PRIVATE_PROTOCOLS = frozenset({"memory", "blockcache", "filecache", "simplecache"})


def is_url(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def check(url: str) -> None:
    """See to it that values can be written below a URL.

    Raises
    ------
    ValueError
        `fsspec` or a protocol's package is missing, or nothing can be written there.
    """
    protocol = url.partition("://")[0].partition("::")[0]
    if protocol in _PRIVATE_PROTOCOLS:
        raise ValueError(
            f"object_spilling_directory {url}: the files of {protocol}:// can only be seen by the "
            "process that wrote them; workers read them too."
        )
    try:
        import fsspec
    except ImportError as error:
        raise ValueError(
            f"object_spilling_directory {url}: URLs need the package fsspec: install "
            "poolray[fsspec], or name a folder of this machine."
        ) from error
    probe = f"{url.rstrip('/')}/poolray-probe"
    try:
        system, path = fsspec.core.url_to_fs(probe)
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        system.pipe_file(path, b"")
        system.rm_file(path)
    except Exception as error:  # each protocol has errors of its own
        raise ValueError(
            f"object_spilling_directory {url} cannot be written to "
            f"({type(error).__name__}: {error}). Check the address and its credentials."
        ) from error


def make_folder(url: str) -> None:
    """Make a folder, where the protocol knows such a thing."""
    with _as_oserror(url):
        system, path = _open(url)
        system.makedirs(path, exist_ok=True)


def remove_folder(url: str) -> None:
    """Delete a folder with all that is in it, if it is there.

    Raises
    ------
    OSError
        It cannot be reached.
    """
    with _as_oserror(url):
        system, path = _open(url)
        if system.exists(path):
            system.rm(path, recursive=True)


def remove_file(url: str) -> None:
    """Delete a file, if it is there."""
    with _as_oserror(url):
        system, path = _open(url)
        try:
            system.rm_file(path)
        except FileNotFoundError:
            pass  # its writer died before it made it, or somebody cleaned up


def write_objects(url: str, sources: Sequence[memoryview]) -> list[tuple[int, int]]:
    """Write values one after the other; gives offset and checksum of each.

    Raises
    ------
    OSError
        The storage did not take them; nothing is left of them.
    """
    places = []
    position = 0
    with _as_oserror(url):
        system, path = _open(url)
        try:
            with system.open(path, "wb") as stream:
                for source in sources:
                    stream.write(source)
                    places.append((position, checksum_of(source)))
                    position += source.nbytes
        except BaseException:
            with contextlib.suppress(Exception):  # the first error tells more
                system.rm_file(path)
            raise
    return places


def write_value(url: str, write: Callable[[memoryview], None], size_bytes: int) -> int:
    """Write one value, which is put together in memory first; gives its checksum."""
    frame = memoryview(bytearray(size_bytes))
    write(frame)
    return write_objects(url, [frame])[0][1]


def read(url: str, offset: int, size_bytes: int) -> bytes:
    """The bytes of a value; fewer where the file is too short.

    Raises
    ------
    FileNotFoundError
        The file is gone.
    OSError
        The storage cannot be reached.
    """
    with _as_oserror(url):
        system, path = _open(url)
        return bytes(system.cat_file(path, start=offset, end=offset + size_bytes))


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    return system, path


@contextlib.contextmanager
def _as_oserror(url: str) -> Any:
    """Whatever a protocol raises becomes an OSError that names the URL."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error
