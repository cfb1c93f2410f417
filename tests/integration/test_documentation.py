"""What the documentation shows is what happens: every session and program in it is run.

A block of Python with prompts is a session; the sessions of one page follow each other in one
interpreter. One without prompts is a program of its own; when the next block is text, that is what
the program prints. In expected output `...` stands for anything, and white space for white space.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from poolray.cluster_utils import Cluster
from tests.integration import run_page

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "poolray"
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])
#: Modules whose public names users import; each name has an example in its docstring.
USERS_IMPORT_FROM = ["poolray", "poolray.multiprocessing.pool", "poolray.util"]
WITHOUT_EXAMPLE = {
    # The standard library's, and what is only ever given to users.
    *(
        "__version__",
        "actor",
        "dag",
        "exceptions",
        "util",
        "deregister_serializer",
        "MaybeEncodingError",
        "RemoteTraceback",
        "ThreadPool",
    ),
    *("TimeoutError", "ApplyResult", "AsyncResult", "MapResult", "IMapUnorderedIterator"),
}


@dataclass(frozen=True)
class Program:
    """A program in a page, and what it prints, if the page says so."""

    page: Path
    line: int
    source: str
    output: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """The fenced blocks of a page: line, language, text."""
    language, start, lines = None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = run_page.FENCE.match(line)
        if fence and language is None:
            language, start, lines = fence[1], number + 1, []
        elif fence and language is not None:
            yield start, language, "\n".join(lines) + "\n"
            language = None
        else:
            lines.append(line)
    assert language is None, f"{page.name}: the block at line {start} has no end"


def programs() -> Iterator[Program]:
    for page in PAGES:
        found = [*blocks(page), (0, "", "")]
        for (line, language, text), after in itertools.pairwise(found):
            if language == "python" and ">>> " not in text:
                yield Program(page, line, text, after[2] if after[1] == "text" else None)


def lines_for_a_cluster() -> list[str]:
    """What the page on clusters shows that asks for one."""
    found = []
    for _, language, text in blocks(REPOSITORY / "docs" / "cluster.md"):
        if not language:
            found += re.findall(r"^(?:poolray\.init|Pool|Executor)\([^)]*\)", text, re.MULTILINE)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield made
    made.shutdown()


def with_sessions() -> list[Path]:
    return [
        page
        for page in PAGES
        if any(language == "python" and ">>> " in text for _, language, text in blocks(page))
    ]


def with_docstring_examples() -> list[str]:
    return [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(PACKAGE.rglob("*.py"))
        if re.search(r"^ *>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def run(*arguments: object, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program with this checkout's package, whatever else is installed."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
    )


@pytest.mark.parametrize("page", with_sessions(), ids=lambda page: page.stem)
def test_the_sessions_of_a_page_answer_as_it_says(page: Path, tmp_path: Path) -> None:
    done = run(Path(run_page.__file__), page, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("program", list(programs()), ids=str)
def test_the_programs_of_a_page_print_what_it_says(program: Program, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(program.source, encoding="utf-8")
    done = run("program.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    if program.output is not None:
        matches = doctest.OutputChecker().check_output
        assert matches(program.output, done.stdout, run_page.FLAGS), done.stdout


#: How each kind of line is put to use; `made` is what it gives.
_USES = {
    "poolray.init": "print(poolray.get(poolray.remote(lambda: 7).remote()))",
    "Pool": "with made as pool: print(pool.apply(abs, (-7,)))",
    "Executor": "with made as pool: print(pool.submit(abs, -7).result())",
}


@pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")
@pytest.mark.parametrize("line", lines_for_a_cluster())
def test_the_lines_that_connect_to_a_cluster_do(
    line: str, cluster: Cluster, tmp_path: Path
) -> None:
    shown = "10.0.0.5:6379"
    assert shown in line or "auto" in line
    made = line.replace(shown, cluster.address)
    use = _USES[line.partition("(")[0]]
    source = f"import poolray\nfrom poolray import Executor, Pool\nmade = {made}\n{use}\n"
    (tmp_path / "program.py").write_text(source, encoding="utf-8")
    done = run(
        "program.py",
        folder=tmp_path,
        POOLRAY_AUTH_TOKEN_PATH=cluster.auth_token_path,
        POOLRAY_TMPDIR=os.path.dirname(cluster.session_folder),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "7\n"


@pytest.mark.parametrize("module", with_docstring_examples())
def test_examples_in_docstrings_are_right(module: str, tmp_path: Path) -> None:
    done = run(Path(run_page.__file__), module, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", USERS_IMPORT_FROM)
def test_everything_that_users_import_has_an_example(module: str) -> None:
    imported = importlib.import_module(module)
    lacking = [
        name
        for name in imported.__all__
        if name not in WITHOUT_EXAMPLE
        and ">>> " not in (inspect.getdoc(getattr(imported, name)) or "")
    ]
    assert lacking == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    anchors = {
        target: {
            re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
        }
        for target in PAGES
    }
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors[target], f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_for_make_and_paths_of_examples_exist(page: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    shown = page.read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z]+)\b(?=[ `\n])", " ".join(code_of(shown))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
    for path in re.findall(r"\b(?:examples|benchmarks)/\w+\.py\b", shown):
        assert (REPOSITORY / path).exists(), f"{page.name} names {path}"


def code_of(page: str) -> list[str]:
    """What a page sets as code: fenced console blocks and inline code."""
    fenced = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [*fenced, *(f"{code} " for code in re.findall(r"`([^`\n]+)`", page))]


def test_there_are_pages_to_check() -> None:
    assert len(PAGES) > 5
    assert sum(1 for _ in programs()) > 2
    assert len(with_docstring_examples()) > 3
    assert len(lines_for_a_cluster()) > 5
