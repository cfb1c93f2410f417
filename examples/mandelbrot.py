"""Draw a corner of the Mandelbrot set into a PNG file, with nothing but numpy and a pool.

    python examples/mandelbrot.py --size 1920x1280 --output mandelbrot.png

Two rounds over bands of rows. The first computes how fast each point escapes; the second colours
the bands. The colours depend on the whole picture, so each band goes back to the workers as an
argument: arrays of this size travel through shared memory, both ways, and are mapped on arrival.
"""

from __future__ import annotations

import argparse
import os
import re
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poolray import Pool

CENTRE = complex(-0.743643, 0.131826)
WIDTH_OF_VIEW = 0.012
STEPS_MAX = 500
# Far beyond the escape radius of 2, which makes the fractional part of a step count smooth.
ESCAPE_SQUARED = 2.0**16
BAND_ROWS = 32
# Black to blue to white to gold to brown, at equal shares of the picture's points.
PALETTE = np.array(
    [(4, 6, 30), (18, 62, 138), (96, 170, 220), (250, 246, 225), (236, 164, 48), (92, 36, 12)],
    dtype=np.float64,
)
SHADES = 256


def escape_times(width: int, height: int, top: int, bottom: int) -> NDArray[np.float32]:
    """Smooth step counts until escape for the rows [top, bottom); infinite where there is none."""
    pixel = WIDTH_OF_VIEW / width
    columns = CENTRE.real + (np.arange(width) - (width - 1) / 2) * pixel
    rows = CENTRE.imag - (np.arange(top, bottom) - (height - 1) / 2) * pixel
    start = (columns[None, :] + 1j * rows[:, None]).ravel()
    times = np.full(start.size, np.inf, dtype=np.float32)
    z, alive = start.copy(), np.arange(start.size)
    for step in range(1, STEPS_MAX + 1):
        squared = z.real**2 + z.imag**2
        gone = squared > ESCAPE_SQUARED
        if gone.any():
            times[alive[gone]] = step - np.log2(np.log2(squared[gone]) / 2)
            keep = ~gone
            z, start, alive = z[keep], start[keep], alive[keep]
        z = z * z + start
    return times.reshape(bottom - top, width)


def colour(times: NDArray[np.float32], limits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Red, green and blue of one band: a point's shade is the number of limits that it passed."""
    shades = np.searchsorted(limits, times.ravel())
    position = np.arange(SHADES) / (SHADES - 1) * (len(PALETTE) - 1)
    channels = [np.interp(position, np.arange(len(PALETTE)), PALETTE[:, c]) for c in range(3)]
    table = np.stack(channels, axis=1).astype(np.uint8)
    pixels = table[shades]
    pixels[np.isinf(times.ravel())] = 0
    return pixels.reshape(*times.shape, 3)


def shade_limits(times: NDArray[np.float32]) -> NDArray[np.float32]:
    """The step counts that cut the escaping points of a picture into shares of equal size."""
    escaping = times[np.isfinite(times)]
    if not escaping.size:
        return np.zeros(SHADES - 1, dtype=np.float32)
    return np.quantile(escaping, np.linspace(0, 1, SHADES + 1)[1:-1]).astype(np.float32)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """An image of (height, width, 3) bytes as a PNG file."""
    height, width, _ = pixels.shape
    # Each row begins with the number of its filter; 2 stands for the difference to the row above.
    above = np.vstack([np.zeros_like(pixels[:1]), pixels[:-1]])
    rows = (pixels - above).reshape(height, width * 3)
    filtered = np.hstack([np.full((height, 1), 2, dtype=np.uint8), rows])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def draw(width: int, height: int, pool: Any) -> NDArray[np.uint8]:
    """The picture, computed and coloured by the pool's workers."""
    tops = range(0, height, BAND_ROWS)
    bands = pool.starmap(
        escape_times,
        [(width, height, top, min(top + BAND_ROWS, height)) for top in tops],
        chunksize=1,  # rows that never escape take far longer than others
    )
    limits = shade_limits(np.concatenate(bands))
    return np.concatenate(pool.starmap(colour, [(band, limits) for band in bands]))


def size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 1200x800")
    return int(found[1]), int(found[2])


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw a corner of the Mandelbrot set.")
    parser.add_argument("--size", type=size, default=(1200, 800), metavar="WIDTHxHEIGHT")
    parser.add_argument("--output", type=Path, default=Path("mandelbrot.png"))
    parser.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 2))
    parser.add_argument("--address", help="work on the cluster at this address")
    options = parser.parse_args()
    width, height = options.size
    started = time.perf_counter()
    with Pool(options.workers, **({"address": options.address} if options.address else {})) as pool:
        pixels = draw(width, height, pool)
    seconds = time.perf_counter() - started
    options.output.write_bytes(png(pixels))
    written = options.output.stat().st_size
    print(f"{width} x {height} points with {options.workers} workers in {seconds:.2f} s")
    print(f"{options.output}: {written:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
