"""The examples run as a reader runs them: as programs, on small input."""

from __future__ import annotations

import importlib.util
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an example with this checkout's package, whatever else is installed."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Sixty files whose words can be counted by hand, a binary one, and folders to be left out."""
    folder = tmp_path / "library"
    for shelf in range(3):
        (folder / f"shelf{shelf}").mkdir(parents=True)
        for book in range(20):
            text = "whale sea whale\nship\n" + "x" * (shelf * 20 + book) + "\n"
            (folder / f"shelf{shelf}" / f"book{book:02}.txt").write_text(text)
    (folder / "image.bin").write_bytes(b"whale\0whale")
    for left_out in ("__pycache__", ".git"):
        (folder / left_out).mkdir()
        (folder / left_out / "whale.txt").write_text("whale " * 1000)
    return folder


def test_word_frequencies_finds_the_same_words_four_ways(library: Path) -> None:
    done = run("word_frequencies.py", library, "--workers", 2)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "120 whale" in lines
    assert "60 sea" in lines
    assert f"59 {Path('shelf2', 'book19.txt')}:3" in lines
    assert lines[0].startswith("60 files, ")
    assert lines[0].endswith("(1 binary or unreadable files skipped)")
    for way in ("a plain loop", "Pool.imap_unordered", "Executor.submit", "f.remote and wait"):
        assert any(line.startswith(way) for line in lines)
    assert lines[-1] == "All 4 ways gave the same answer."
    assert "\r" not in done.stderr, "a progress bar was drawn where there is no terminal"


def test_word_frequencies_reads_no_more_files_than_its_limit(library: Path) -> None:
    done = run("word_frequencies.py", library, "--workers", 2, "--limit", 7)
    assert done.returncode == 0, done.stderr
    # The binary file is the first in order.
    assert done.stdout.startswith("6 files, ")


@pytest.mark.parametrize("arguments", [("/nowhere/at/all",), ("--workers", 0), ("--limit", 0)])
def test_word_frequencies_refuses_wrong_arguments_in_words(arguments: tuple[object, ...]) -> None:
    done = run("word_frequencies.py", *arguments)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_word_frequencies_says_that_a_folder_is_empty(tmp_path: Path) -> None:
    done = run("word_frequencies.py", tmp_path)
    assert done.returncode == 2
    assert f"no file to read below {tmp_path}" in done.stderr


@pytest.fixture
def word_frequencies(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module."""
    where = EXAMPLES / "word_frequencies.py"
    spec = importlib.util.spec_from_file_location("word_frequencies_example", where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_word_frequencies_fails_when_one_way_disagrees(
    word_frequencies: ModuleType, library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = word_frequencies.with_a_loop
    ways = {"a plain loop": honest, "forgetful": lambda paths, options: honest(paths[1:], options)}
    word_frequencies.WAYS.clear()
    word_frequencies.WAYS.update(ways)
    assert word_frequencies.main([str(library / "shelf0")]) == 1
    assert "NOT the answer of the plain loop: forgetful" in capsys.readouterr().err


def decode_png(data: bytes) -> np.ndarray:
    """The pixels of a PNG of three 8-bit channels, its checksums verified."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: list[tuple[bytes, bytes]] = []
    at = 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(name + body),)
        chunks.append((name, body))
        at += 12 + length
    assert [name for name, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[0][1])
    assert kind == [8, 2, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[1][1]), np.uint8).reshape(height, 1 + width * 3)
    assert set(rows[:, 0]) == {2}, "every row is the difference to the row above"
    return np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).reshape(height, width, 3)


def test_mandelbrot_writes_a_picture_that_can_be_read_back(tmp_path: Path) -> None:
    output = tmp_path / "picture.png"
    # 70 rows: bands of 32 do not divide them.
    done = run("mandelbrot.py", "--size", "120x70", "--output", output, "--workers", 2)
    assert done.returncode == 0, done.stderr
    pixels = decode_png(output.read_bytes())
    assert pixels.shape == (70, 120, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_mandelbrot_colours_each_point_by_its_own_orbit(tmp_path: Path) -> None:
    output = tmp_path / "picture.png"
    done = run("mandelbrot.py", "--size", "60x40", "--output", output, "--workers", 2)
    assert done.returncode == 0, done.stderr
    pixels = decode_png(output.read_bytes())
    stays = np.array(
        [
            [
                never_escapes(-0.743643 + (x - 29.5) * 2e-4, 0.131826 - (y - 19.5) * 2e-4)
                for x in range(60)
            ]
            for y in range(40)
        ]
    )
    assert np.array_equal(stays, (pixels == 0).all(axis=2))


def never_escapes(real: float, imaginary: float) -> bool:
    """Whether a point's orbit is still near after as many steps as the example takes."""
    point = z = complex(real, imaginary)
    for _ in range(499):
        if abs(z) > 256:
            return False
        z = z * z + point
    return abs(z) <= 256


@pytest.mark.parametrize("size", ["0x10", "10", "axb", "-1x5"])
def test_mandelbrot_refuses_a_wrong_size_in_words(size: str) -> None:
    done = run("mandelbrot.py", f"--size={size}")
    assert done.returncode == 2
    assert "WIDTHxHEIGHT" in done.stderr


def test_out_of_core_sort_sorts_more_than_its_store_holds(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    generator = np.random.default_rng(1)
    for number in range(12):
        text = generator.integers(97, 123, 1_200_000, dtype=np.uint8).tobytes()
        (folder / f"{number}.py").write_bytes(text)
    output = tmp_path / "store.png"
    done = run("out_of_core_sort.py", folder, "--store", 64, "--plot", output)
    assert done.returncode == 0, done.stderr
    assert "as numpy says: True" in done.stdout
    found = re.search(r"store at most (\d+) MiB, disk at most (\d+) MiB", done.stdout)
    assert found, done.stdout
    assert 0 < int(found[1]) <= 64
    assert int(found[2]) > 0, "110 MiB of places do not fit into the store"
    pixels = decode_png(output.read_bytes())
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 4


def test_out_of_core_sort_says_that_there_is_nothing_to_sort(tmp_path: Path) -> None:
    done = run("out_of_core_sort.py", tmp_path)
    assert done.returncode == 1
    assert "no Python files" in done.stderr


def test_streaming_pipeline_finds_what_a_loop_finds(tmp_path: Path) -> None:
    folder = tmp_path / "sources"
    (folder / "package").mkdir(parents=True)
    for number in range(12):
        # Large enough that each file is a batch of its own.
        comments = f"    # {'x' * 93}\n" * (3000 + number)
        body = f"def f{number}():\n    'Does nothing.'\n{comments}    return 1\n"
        (folder / "package" / f"module{number:02}.py").write_text(body)
    (folder / "broken.py").write_text("def (:\n")
    done = run("streaming_pipeline.py", folder, "--lanes", 2, "--ahead", 1)
    assert done.returncode == 0, done.stderr
    assert "13 files, " in done.stdout
    assert "12 functions, 12 of them with a docstring" in done.stdout
    assert " 3014 lines  f11" in done.stdout
    most = re.search(r"at most (\d+) batches", done.stdout)
    assert most is not None
    assert int(most[1]) <= 6


def test_hyperparameter_search_stops_hopeless_trials_and_finds_a_good_one() -> None:
    pytest.importorskip("sklearn")
    done = run("hyperparameter_search.py", "--trials", 12, "--epochs", 9, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    stopped = re.search(r"12 trials in [\d.]+ s, (\d+) of them stopped early", done.stdout)
    run_epochs = re.search(r"(\d+) of 108 epochs were run", done.stdout)
    accuracy = re.search(r"reads ([\d.]+)% of the test digits", done.stdout)
    assert stopped, done.stdout
    assert run_epochs, done.stdout
    assert accuracy, done.stdout
    assert int(stopped[1]) > 0
    assert int(run_epochs[1]) < 108
    assert float(accuracy[1]) > 80


def test_hyperparameter_search_can_let_every_trial_come_to_its_end() -> None:
    pytest.importorskip("sklearn")
    done = run("hyperparameter_search.py", "--trials", 3, "--epochs", 2, "--workers", 2, "--all")
    assert done.returncode == 0, done.stderr
    assert "0 of them stopped early" in done.stdout
    assert "6 of 6 epochs were run" in done.stdout


def test_hyperparameter_search_refuses_a_wrong_number_in_words() -> None:
    done = run("hyperparameter_search.py", "--trials", "0")
    assert done.returncode == 2
    assert "is not a number of at least 1" in done.stderr
