"""mypy and pyright find an error on each marked line of the files beside this, and nowhere else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
#: A line that checkers must refuse, and mypy's codes for why.
MARK = re.compile(r"  # type: ignore\[([a-z-]+(?:,[a-z-]+)*)\]")
MYPY_ERROR = re.compile(r"^(?P<path>.+?):(?P<line>\d+)(?::\d+)?: error: .*\[(?P<code>[a-z-]+)\]$")

#: (file, line) -> mypy's codes.
Refusals = dict[tuple[str, int], set[str]]

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def unmarked(tmp_path: Path) -> tuple[Path, Refusals]:
    """The files without their marks, in a folder of their own, and where the marks were."""
    expected: Refusals = {}
    for path in sorted(HERE.glob("[a-z]*.py")):
        if path.name == Path(__file__).name:
            continue
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            if found := MARK.search(line):
                expected[path.name, number] = set(found[1].split(","))
        (tmp_path / path.name).write_text(MARK.sub("", text), encoding="utf-8")
    return tmp_path, expected


def checker(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a type checker on this checkout's package, whatever else is installed."""
    return subprocess.run(
        [sys.executable, "-m", name, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "MYPYPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=360,
    )


def test_mypy_refuses_what_is_marked_and_accepts_the_rest(unmarked: tuple[Path, Refusals]) -> None:
    pytest.importorskip("mypy")
    folder, expected = unmarked
    # A cache of its own: mypy's repeats messages with the folder of the run that found them.
    cache = str(folder / "cache")
    files = [str(path) for path in sorted(folder.glob("*.py"))]
    done = checker("mypy", "--no-pretty", "--cache-dir", cache, *files)
    assert done.returncode == 1, done.stdout + done.stderr
    errors: Refusals = {}
    for line in done.stdout.splitlines():
        found = MYPY_ERROR.match(line)
        # Errors of the package itself are the affair of `make types`.
        if found and Path(found["path"]).resolve().parent == folder.resolve():
            place = Path(found["path"]).name, int(found["line"])
            errors.setdefault(place, set()).add(found["code"])
    assert errors == expected, done.stdout


def test_pyright_refuses_what_is_marked_and_accepts_the_rest(
    unmarked: tuple[Path, Refusals],
) -> None:
    pytest.importorskip("pyright")
    tomllib = pytest.importorskip("tomllib")
    started = checker("pyright", "--version")
    if started.returncode != 0:
        pytest.skip(f"pyright does not start: {(started.stderr or started.stdout).strip()[-300:]}")
    folder, expected = unmarked
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    settings = {**project["tool"]["pyright"], "include": ["."], "extraPaths": [str(REPOSITORY)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    done = checker(
        "pyright", "--project", str(folder), "--pythonpath", sys.executable, "--outputjson"
    )
    report = json.loads(done.stdout)
    errors = {
        (Path(found["file"]).name, found["range"]["start"]["line"] + 1)
        for found in report["generalDiagnostics"]
        if found["severity"] == "error"
    }
    assert errors == set(expected), done.stdout


def test_there_is_something_to_check(unmarked: tuple[Path, Refusals]) -> None:
    folder, expected = unmarked
    assert {name for name, _ in expected} == {path.name for path in folder.glob("*.py")}
    assert len(expected) > 50
