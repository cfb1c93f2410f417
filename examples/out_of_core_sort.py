"""Sort more bytes than the object store holds, with tasks: what has no room waits on disk.

    python examples/out_of_core_sort.py --store 64 --plot store.png

The input is real: every place of the standard library's sources (or of a folder given) with the
eight bytes that begin there, read as one number. In sorted order equal texts are neighbours, so
that the most frequent ones can be counted.

Tasks of a first round read files, sort their places and cut them at a few pivots; tasks of a second
round merge the pieces between two pivots. All pieces together are larger than the store: the
runtime moves them to disk and brings them back when a task needs them. The store never holds more
than its size, and the driver looks at one merged piece at a time. (To check the result it also
keeps numpy's own answer.)
"""

from __future__ import annotations

import argparse
import re
import struct
import sys
import sysconfig
import tempfile
import threading
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import poolray
from poolray.util import memory_summary

WIDTH = 8
MIB = 1 << 20
#: Bytes of text that one task of the first round reads: its places take eight times as much.
SHARE_BYTES = 1 * MIB
PLOT_SIZE = (960, 360)


def places_of(paths: list[Path]) -> NDArray[np.uint64]:
    """The number at each place of some files."""
    found = []
    for path in paths:
        text = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        if text.size >= WIDTH:
            windows = np.lib.stride_tricks.sliding_window_view(text, WIDTH)
            found.append(np.ascontiguousarray(windows).view(">u8").ravel().astype(np.uint64))
    return np.concatenate(found) if found else np.zeros(0, dtype=np.uint64)


@poolray.remote
def sort_share(paths: list[Path], pivots: NDArray[np.uint64]) -> list[NDArray[np.uint64]]:
    """The places of some files, sorted and cut at the pivots."""
    places = np.sort(places_of(paths))
    return np.split(places, np.searchsorted(places, pivots))


@poolray.remote
def merge(*pieces: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """All places between two pivots, sorted."""
    return np.sort(np.concatenate(pieces), kind="stable")


def shares_of(paths: list[Path]) -> list[list[Path]]:
    """Files in shares of about the same size."""
    shares: list[list[Path]] = [[]]
    size = 0
    for path in paths:
        if size > SHARE_BYTES:
            shares.append([])
            size = 0
        shares[-1].append(path)
        size += path.stat().st_size
    return shares


def pivots_of(paths: list[Path], pieces: int) -> NDArray[np.uint64]:
    """Numbers that cut the input into pieces of about the same size, from a sample of it."""
    sample = np.sort(places_of(paths[:: max(1, len(paths) // 50)]))
    return sample[[len(sample) * i // pieces for i in range(1, pieces)]]


class Watch(threading.Thread):
    """Notes now and then how full the store and its folder on disk are."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self._stopped = threading.Event()
        self.store_bytes: list[int] = []
        self.disk_bytes: list[int] = []

    def run(self) -> None:
        while not self._stopped.wait(0.05):
            text = memory_summary(stats_only=True, units="B")
            found = re.search(r"Shared memory: (\d+) B used", text)
            self.store_bytes.append(int(found[1]) if found else 0)
            self.disk_bytes.append(size_of(self._folder))

    def stop(self) -> None:
        """No more notes."""
        self._stopped.set()
        self.join()


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; they come and go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def sort(paths: list[Path], pieces: int) -> Any:
    """Yield the sorted places of all files, piece by piece."""
    pivots = pivots_of(paths, pieces)
    cut = sort_share.options(num_returns=pieces)
    rows: list[Any] = [cut.remote(share, pivots) for share in shares_of(paths)]
    columns = [[row[i] for row in rows] for i in range(pieces)]
    del rows
    merged = []
    while columns:
        merged.append(merge.remote(*columns.pop(0)))  # the pieces go as soon as they are merged
    while merged:
        yield poolray.get(merged.pop(0))


def plot(watch: Watch, store_bytes: int) -> NDArray[np.uint8]:
    """Store (blue) and disk (red) over time, and the size of the store (grey)."""
    width, height = PLOT_SIZE
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    top = max(store_bytes, *watch.store_bytes, *watch.disk_bytes) * 1.05
    limit = int((height - 1) * (1 - store_bytes / top))
    pixels[limit, :] = (160, 160, 160)
    for values, colour in ((watch.disk_bytes, (200, 40, 40)), (watch.store_bytes, (30, 80, 190))):
        at = np.linspace(0, len(values) - 1, width)
        levels = np.interp(at, np.arange(len(values)), values)
        rows = ((height - 1) * (1 - levels / top)).astype(int)
        for x in range(width):
            first, last = sorted((rows[x], rows[max(0, x - 1)]))
            pixels[max(0, first - 1) : last + 1, x] = colour
    return pixels


def png(pixels: NDArray[np.uint8]) -> bytes:
    """An image of (height, width, 3) bytes as a PNG file."""
    height, width, _ = pixels.shape
    above = np.vstack([np.zeros_like(pixels[:1]), pixels[:-1]])
    rows = (pixels - above).reshape(height, width * 3)
    filtered = np.hstack([np.full((height, 1), 2, dtype=np.uint8), rows])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Sort more bytes than the object store holds.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--store", type=int, default=64, metavar="MIB", help="size of the store")
    parser.add_argument("--files", type=int, default=2_000, help="read so many files at the most")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw store and disk over time")
    options = parser.parse_args()
    paths = sorted(p for p in options.folder.rglob("*.py") if p.is_file())[: options.files]
    total = sum(max(0, path.stat().st_size - WIDTH + 1) for path in paths) * WIDTH
    if not total:
        print(f"no Python files in {options.folder}", file=sys.stderr)
        return 1
    store_bytes = options.store * MIB
    pieces = max(2, -(-4 * total // store_bytes))  # a piece and its parts fit the store together
    expected = np.sort(places_of(paths))
    with tempfile.TemporaryDirectory() as folder:
        poolray.init(num_cpus=2, object_store_memory=store_bytes, object_spilling_directory=folder)
        watch = Watch(Path(folder))
        watch.start()
        started = time.perf_counter()
        frequent: Counter[int] = Counter()
        checked = 0
        for piece in sort(paths, pieces):
            if not np.array_equal(piece, expected[checked : checked + piece.size]):
                print("NOT what numpy says", file=sys.stderr)
                return 1
            checked += piece.size
            values, counts = np.unique(piece, return_counts=True)
            for index in np.argsort(counts)[-5:]:
                frequent[int(values[index])] += int(counts[index])
            del piece
        seconds = time.perf_counter() - started
        watch.stop()
        poolray.shutdown()
    print(
        f"{total / MIB:.0f} MiB in a store of {options.store} MiB, {pieces} pieces: {seconds:.1f} s"
    )
    peak, disk = max(watch.store_bytes, default=0), max(watch.disk_bytes, default=0)
    print(f"store at most {peak / MIB:.0f} MiB, disk at most {disk / MIB:.0f} MiB")
    print(f"as numpy says: {checked == expected.size}; the most frequent {WIDTH} bytes:")
    for number, count in frequent.most_common(5):
        print(f"  {count:>9,}  {number.to_bytes(WIDTH, 'big')!r}")
    if options.plot is not None and watch.store_bytes:
        options.plot.write_bytes(png(plot(watch, store_bytes)))
        print(f"{options.plot}: {options.plot.stat().st_size:,} bytes")
    return 0 if checked == expected.size and peak <= store_bytes else 1


if __name__ == "__main__":
    sys.exit(main())
