"""How fast are large values, small ones, and the way to disk and back?

What: put beside a warm copy into shared memory, get of a large array, arguments beside the standard
executor, small values, refs by the thousand, spilling and restoring beside plain writes and reads.
Who calls: `python -m benchmarks.objects`, by hand and in `make bench`.
May touch: processes, the clock, a folder for spilled files.
Invariants: contestants take turns in one run; what is read is checked.
"""

from __future__ import annotations

import concurrent.futures
import mmap
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import poolray
from benchmarks._harness import (
    COMPARISON_HEAD,
    Comparison,
    Samples,
    alternate,
    commit,
    machine,
    make_parser,
    print_table,
    rate,
    show,
    write_json,
)
from poolray.local import runtime as local_runtime

LARGE_BYTES = 100_000_000
ARGUMENT_BYTES = 1_000_000
TASKS = 20
SMALL = 2_000
#: Puts and gets of large values in a row: what other figures do to memory in between is not steady.
IN_A_ROW = 5
GETS = 50
REFS = 10_000
#: Of the store in the part about disks, and what passes through it.
STORE_BYTES = 256 << 20
PIECE_BYTES = 8 << 20
PIECES = 96
#: What an idle machine with two cores is to reach, a second.
RATE_TARGETS = {
    "gets of 100 MB": 10_000,
    "puts of small values": 100_000,
    "gets of small values": 100_000,
    f"refs, {REFS:,} in one value that is fetched": 1_000_000,
}


def first_of(array: Any) -> int:
    """A task that hardly looks at its argument."""
    return int(array[0])


def in_memory(rounds: int) -> tuple[list[Comparison], dict[str, Samples]]:
    """Values for which memory has room."""
    poolray.init(num_cpus=2, object_store_memory=1 << 30)
    large = np.ones(LARGE_BYTES, dtype=np.uint8)
    argument = np.ones(ARGUMENT_BYTES, dtype=np.uint8)
    remote_first_of = poolray.remote(first_of)
    shared = mmap.mmap(-1, LARGE_BYTES)
    target = np.frombuffer(shared, dtype=np.uint8)
    kept = poolray.put(large)
    assert poolray.get(kept)[-1] == 1
    with concurrent.futures.ProcessPoolExecutor(2) as executor:
        found = alternate(
            rounds,
            {
                "put": lambda: rate(
                    IN_A_ROW * LARGE_BYTES, lambda: [poolray.put(large) for _ in range(IN_A_ROW)]
                ),
                "copy": lambda: rate(
                    IN_A_ROW * LARGE_BYTES,
                    lambda: [np.copyto(target, large) for _ in range(IN_A_ROW)],
                ),
                "get": lambda: rate(GETS, lambda: [poolray.get(kept)[-1] for _ in range(GETS)]),
                "arguments": lambda: rate(
                    TASKS,
                    lambda: poolray.get([remote_first_of.remote(argument) for _ in range(TASKS)]),
                ),
                "executor": lambda: rate(
                    TASKS, lambda: list(executor.map(first_of, [argument] * TASKS))
                ),
                "small put": lambda: rate(SMALL, lambda: [poolray.put(1) for _ in range(SMALL)]),
                "small get": small_gets,
                "refs": refs_in_a_value,
            },
        )
    poolray.shutdown()
    comparisons = [
        Comparison("put of 100 MB, steady", found["put"], found["copy"], "a warm copy", "B/s", 0.8),
        Comparison(
            "1 MB to each of 20 tasks", found["arguments"], found["executor"], "executor", "/s", 5
        ),
    ]
    alone = {
        "gets of 100 MB": found["get"],
        "puts of small values": found["small put"],
        "gets of small values": found["small get"],
        f"refs, {REFS:,} in one value that is fetched": found["refs"],
    }
    return comparisons, alone


def small_gets() -> float:
    """Reads of one small value each."""
    refs = [poolray.put(number) for number in range(SMALL)]
    return rate(SMALL, lambda: [poolray.get(ref) for ref in refs])


def refs_in_a_value() -> float:
    """Refs a second, of a list of them that is fetched."""
    outer = poolray.put([poolray.put(number) for number in range(REFS)])
    inner: list[Any] = []
    fetched = rate(REFS, lambda: inner.extend(poolray.get(outer)))
    assert poolray.get(inner[-1]) == REFS - 1
    return fetched


def on_disk(rounds: int, folder: Path) -> list[Comparison]:
    """Three times the store goes to disk and comes back; beside it a plain file."""
    piece = np.random.default_rng(1).integers(0, 256, PIECE_BYTES, dtype=np.uint8)

    def spill_and_restore() -> tuple[float, float]:
        poolray.init(num_cpus=1, object_store_memory=STORE_BYTES, object_spilling_directory=folder)
        writing = rate(PIECES * PIECE_BYTES, lambda: refs.extend(put_all()))
        reading = rate(PIECES * PIECE_BYTES, lambda: [read(ref) for ref in refs])
        runtime = local_runtime.current()
        assert runtime is not None
        assert runtime.statistics().store.spilled_bytes > (PIECES * PIECE_BYTES - STORE_BYTES)
        refs.clear()
        poolray.shutdown()
        return writing, reading

    refs: list[Any] = []

    def put_all() -> list[Any]:
        return [poolray.put(piece) for _ in range(PIECES)]

    def read(ref: Any) -> None:
        assert poolray.get(ref)[-1] == piece[-1]

    def plain_file() -> tuple[float, float]:
        path = folder / "plain"
        block = memoryview(piece)
        with path.open("wb", buffering=0) as file:
            writing = rate(PIECES * PIECE_BYTES, lambda: [file.write(block) for _ in range(PIECES)])
        with path.open("rb", buffering=0) as file:
            reading = rate(
                PIECES * PIECE_BYTES, lambda: [file.read(PIECE_BYTES) for _ in range(PIECES)]
            )
        path.unlink()
        return writing, reading

    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(spill_and_restore())
        theirs.append(plain_file())
    return [
        Comparison(
            f"{what} three times the store",
            Samples(tuple(pair[index] for pair in ours)),
            Samples(tuple(pair[index] for pair in theirs)),
            "a plain file",
            "B/s",
            0.7,
        )
        for index, what in enumerate(("putting", "reading"))
    ]


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--folder", help="where files go; default: the temporary folder")
    arguments = parser.parse_args()
    where = machine()
    print(
        f"{arguments.rounds} rounds; {where['cores']} cores, {where['processor']}, "
        f"{where['python']}, load {where['load_average'][0]:.2f}, commit {commit()}"
    )
    found, alone = in_memory(arguments.rounds)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found += on_disk(arguments.rounds, Path(folder))
    print_table(COMPARISON_HEAD, [comparison.row() for comparison in found])
    for name, samples in alone.items():
        met = "yes" if samples.median >= RATE_TARGETS[name] else "NO"
        print(
            f"{name}: {show(samples.median)} /s; at least {RATE_TARGETS[name]:,} /s on an idle "
            f"machine: {met}"
        )
    figures: dict[str, Any] = {comparison.name: comparison.as_json() for comparison in found}
    figures |= {name: samples.as_json() for name, samples in alone.items()}
    write_json(arguments.json, "objects", figures)


if __name__ == "__main__":
    main()
