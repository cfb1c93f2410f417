"""In a notebook: a real kernel runs cells, is interrupted, shut down and killed."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from jupyter_core.utils import ensure_event_loop

from tests.integration.support import (
    DEADLINE_S,
    Gate,
    children_of,
    is_alive,
    kill,
    script_environment,
    wait_until,
)

pytestmark = pytest.mark.timeout(150)


@dataclass
class Cell:
    """What a cell that has run shows."""

    stdout: str = ""
    stderr: str = ""
    result: str | None = None  #: the text of its last expression
    error: str | None = None  #: the class of what it raised
    #: Of each thing displayed, the kinds of data that it came as.
    displayed: list[list[str]] = field(default_factory=list)

    def value(self) -> str:
        """The text of its last expression; it must have succeeded."""
        assert self.error is None, self
        assert self.result is not None, self
        return self.result


@dataclass
class Notebook:
    """A kernel and its front end."""

    manager: KernelManager
    client: BlockingKernelClient
    #: id of a cell's request -> what it has shown, late output included.
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        """The kernel's process."""
        assert self.manager.provisioner is not None
        return int(self.manager.provisioner.process.pid)  # type: ignore[attr-defined]

    def begin(self, code: str) -> str:
        """Start a cell; gives its name."""
        name = self.client.execute(code, store_history=True)
        self.cells[name] = Cell()
        return name

    def end(self, name: str) -> Cell:
        """Wait for the end of a cell."""
        while not self._read(name):
            pass
        return self.cells[name]

    def run(self, code: str) -> Cell:
        """Run a cell to its end."""
        return self.end(self.begin(code))

    def read_until(self, condition: Callable[[], bool]) -> None:
        """Read what cells show until something has been shown."""
        while not condition():
            self._read("")

    def _read(self, name: str) -> bool:
        """One message; whether it ends the cell of this name."""
        try:
            message: dict[str, Any] = self.client.get_iopub_msg(timeout=DEADLINE_S)
        except Empty:
            raise AssertionError(f"the kernel is silent; {self.cells}") from None
        parent = message["parent_header"].get("msg_id")
        cell = self.cells.get(parent)
        if cell is None:
            return False
        content = message["content"]
        match message["msg_type"]:
            case "stream" if content["name"] == "stdout":
                cell.stdout += content["text"]
            case "stream":
                cell.stderr += content["text"]
            case "display_data":
                cell.displayed.append(list(content["data"]))
            case "execute_result":
                cell.result = content["data"]["text/plain"]
            case "error":
                cell.error = content["ename"]
            case "status":
                return bool(parent == name and content["execution_state"] == "idle")
        return False


@pytest.fixture(scope="session", autouse=True)
def loop_of_jupyter() -> Iterator[None]:
    """The event loop that the front end keeps, made before anything is counted."""
    loop = ensure_event_loop()
    yield
    loop.close()


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    """A kernel with poolray imported."""
    with tempfile.TemporaryDirectory(prefix="kernel") as sockets:
        # Sockets in a folder, not ports: another test's kernel cannot take them in between.
        manager = KernelManager(
            transport="ipc", ip=f"{sockets}/s", shutdown_wait_time=2 * DEADLINE_S
        )
        environment = script_environment(tmp_path)
        environment["IPYTHONDIR"] = environment["JUPYTER_RUNTIME_DIR"] = str(tmp_path)
        # The debugger, which no test here uses, says on the error stream what it lacks.
        environment["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
        manager.start_kernel(env=environment, cwd=str(tmp_path))
        client = manager.blocking_client()
        book = Notebook(manager, client)
        try:
            client.start_channels()
            client.wait_for_ready(timeout=DEADLINE_S)
            cell = book.run("import os, poolray; from poolray import Executor, Pool")
            assert cell.error is None
            yield book
        finally:
            client.stop_channels()
            if manager.has_kernel:
                manager.shutdown_kernel(now=True)
            manager.cleanup_resources()


def family_of(notebook: Notebook) -> list[int]:
    """The kernel's process and all below it."""
    return [notebook.pid, *(child.pid for child in children_of(notebook.pid))]


# --- cells ----------------------------------------------------------------------------------------

CALLS = {
    "Pool.map": "pool.map(f, range(4), chunksize=1)",
    "Executor": "list(executor.map(f, range(4)))",
    "remote": "poolray.get([poolray.remote(f).remote(i) for i in range(4)])",
}


def test_functions_of_cells_run_in_workers_as_they_are_defined_at_the_call(
    notebook: Notebook,
) -> None:
    """Workers are forked from the state of the first cells; the later ones count all the same."""
    notebook.run("scale = 10\ndef helper(x): return x * scale\ndef f(x): return helper(x)")
    notebook.run("poolray.init(num_cpus=2); pool = Pool(2); executor = Executor(2)")
    notebook.run("remote = poolray.remote(f)")
    for call in CALLS.values():
        assert notebook.run(call).value() == "[0, 10, 20, 30]", call
    assert notebook.run("poolray.get(remote.remote(1))").value() == "10"
    # Another body, another helper, another global, and a name that was not there at the fork.
    notebook.run("def f(x): return ['new', helper(x)]")
    for call in CALLS.values():
        assert notebook.run(call).value() == str([["new", x * 10] for x in range(4)]), call
    notebook.run("def helper(x): return later(x)\ndef later(x): return -x * scale")
    for call in CALLS.values():
        assert notebook.run(call).value() == str([["new", -x * 10] for x in range(4)]), call
    notebook.run("scale = 100")
    for call in CALLS.values():
        assert notebook.run(call).value() == str([["new", -x * 100] for x in range(4)]), call


def test_lambdas_closures_and_classes_of_cells_travel(notebook: Notebook) -> None:
    notebook.run("poolray.init(num_cpus=2); pool = Pool(2); executor = Executor(2)")
    notebook.run(
        "class Point:\n"
        "    def __init__(self, x): self.x = x\n"
        "    def __eq__(self, other): return type(self) is type(other) and self.x == other.x\n"
        "def adder(n): return lambda x: x + n\n"
    )
    assert notebook.run("pool.map(lambda x: x ** 2, range(3))").value() == "[0, 1, 4]"
    assert notebook.run("executor.submit(adder(5), 1).result()").value() == "6"
    assert notebook.run("poolray.get(poolray.remote(adder(7)).remote(1))").value() == "8"
    for call in (
        "pool.apply(Point, (3,))",
        "executor.submit(Point, 3).result()",
        "poolray.get(poolray.remote(lambda: Point(3)).remote())",
    ):
        assert notebook.run(f"{call} == Point(3)").value() == "True", call


def test_a_map_shows_its_progress_in_the_cell(notebook: Notebook) -> None:
    pytest.importorskip("ipywidgets")
    cell = notebook.run("with Pool(2) as pool: n = sum(pool.map(abs, range(7), progress=True))\nn")
    assert cell.value() == "21"
    notebook.read_until(lambda: bool(cell.displayed))
    assert "application/vnd.jupyter.widget-view+json" in cell.displayed[0]


def test_a_map_shows_its_progress_as_text_where_there_are_no_widgets(notebook: Notebook) -> None:
    notebook.run("import sys; sys.modules['ipywidgets'] = None")
    cell = notebook.run("with Pool(2) as pool: n = sum(pool.map(abs, range(7), progress=True))\nn")
    assert cell.value() == "21"
    notebook.read_until(lambda: "7/7" in cell.stderr)


def test_an_exception_class_of_a_cell_comes_back_as_itself(notebook: Notebook) -> None:
    notebook.run("class Refusal(Exception): pass\ndef refuse(x): raise Refusal(x)")
    for call in (
        "Pool(1).apply(refuse, (3,))",
        "Executor(1).submit(refuse, 3).result()",
        "poolray.get(poolray.remote(refuse).remote(3))",
    ):
        cell = notebook.run(
            f"try:\n    {call}\nexcept Refusal as error:\n    caught = error.args\ncaught"
        )
        assert cell.value() == "(3,)", call


# --- output ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_what_tasks_print_is_shown_by_the_cell_that_waits_for_them(
    call: str, notebook: Notebook
) -> None:
    notebook.run(
        "import sys\n"
        "def f(x):\n"
        "    print('printed', x)\n"
        "    print('as an error', x, file=sys.stderr)\n"
        "poolray.init(num_cpus=2); pool = Pool(2); executor = Executor(2)"
    )
    for _ in range(2):  # the second time with workers, and threads of ours, that are there already
        name = notebook.begin(f"_ = {call}")
        cell = notebook.end(name)
        assert cell.error is None
        for x in range(4):
            assert cell.stdout.count(f"printed {x}\n") == 1, cell
            assert cell.stderr.count(f"as an error {x}\n") == 1, cell


def test_what_tasks_print_is_shown_although_nobody_waits(
    notebook: Notebook, gates: Callable[[str], Gate], tmp_path: Path
) -> None:
    gate = gates("print")
    notebook.run(
        "import poolray\n"
        "from tests.integration.support import Gate\n"
        f"gate = Gate({str(tmp_path / 'gate-print')!r})\n"
        "@poolray.remote\n"
        "def speak():\n"
        "    gate.wait()\n"
        "    print('late')\n"
    )
    notebook.run("ref = speak.remote()")
    notebook.run("'another cell'")
    gate.open()
    notebook.read_until(lambda: any("late\n" in cell.stdout for cell in notebook.cells.values()))


# --- interrupts -----------------------------------------------------------------------------------

WAITS = {
    "get": "poolray.get(poolray.remote(hold).remote(0))",
    "Pool.map": "pool.map(hold, range(4), chunksize=1)",
    "Executor": "executor.submit(hold, 0).result()",
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_an_interrupted_cell_ends_and_the_next_one_works(
    wait: str, notebook: Notebook, gates: Callable[[str], Gate], tmp_path: Path
) -> None:
    started, release = gates("started"), gates("release")
    cell = notebook.run(
        "from tests.integration.support import Gate, announce_and_hold\n"
        f"folder = {str(tmp_path)!r}\n"
        "started, release = Gate(folder + '/gate-started'), Gate(folder + '/gate-release')\n"
        "def hold(value): return announce_and_hold(started, release, value)\n"
        "poolray.init(num_cpus=2); pool = Pool(2); executor = Executor(2)"
    )
    assert cell.error is None
    for _ in range(2):
        name = notebook.begin(wait)
        started.wait()
        notebook.manager.interrupt_kernel()
        # While what it waits for goes on.
        assert notebook.end(name).error == "KeyboardInterrupt"
        release.open(count=16)
        assert notebook.run("pool.map(lambda x: x + 1, range(3))").value() == "[1, 2, 3]"
        assert notebook.run("executor.submit(pow, 2, 3).result()").value() == "8"
        assert notebook.run("poolray.get(poolray.remote(lambda: 16).remote())").value() == "16"
        # Those that were waited for end too, and leave both gates as they found them.
        drained = notebook.run(
            "from tests.integration.support import statistics, wait_until\n"
            "wait_until(lambda: statistics().tasks == 0)\n"
            "for gate in (started, release):\n"
            "    try:\n"
            "        while True: gate.wait(0)\n"
            "    except TimeoutError:\n"
            "        pass"
        )
        assert drained.error is None, drained


# --- ends -----------------------------------------------------------------------------------------

BUSY = """
from tests.integration.support import Gate, announce_and_hold
folder = {folder!r}
started, release = Gate(folder + '/gate-started'), Gate(folder + '/gate-release')
poolray.init(num_cpus=1)
pool, executor = Pool(1), Executor(1)
work = (
    pool.apply_async(announce_and_hold, (started, release)),
    executor.submit(announce_and_hold, started, release),
    poolray.remote(announce_and_hold).remote(started, release),
)
for _ in work: started.wait()
"""


@pytest.mark.parametrize("how", ["shutdown", "restart", "SIGTERM", "SIGKILL"])
def test_a_kernel_that_ends_leaves_no_process(
    how: str, notebook: Notebook, gates: Callable[[str], Gate], tmp_path: Path
) -> None:
    gates("started"), gates("release")
    assert notebook.run(BUSY.format(folder=str(tmp_path))).error is None
    family = family_of(notebook)
    assert len(family) >= 1 + 3 + 3, "the kernel, three fork servers, three workers"
    assert notebook.manager.provisioner is not None
    process = notebook.manager.provisioner.process  # type: ignore[attr-defined]
    match how:
        case "shutdown":
            notebook.manager.shutdown_kernel()
            assert process.returncode == 0, "it had to be killed"
        case "restart":
            notebook.manager.restart_kernel()
        case _:
            kill(family[0], getattr(signal, how))
            process.wait(DEADLINE_S)
    wait_until(lambda: not any(map(is_alive, family)), "the end of processes")
