"""Progress bars of workers, as the driver draws them."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

from tests.integration.support import DEADLINE_S, script_environment
from tests.integration.test_notebook import Notebook, loop_of_jupyter, notebook

__all__ = ["loop_of_jupyter", "notebook"]

PROGRAM = """
import os, poolray
from poolray.experimental import tqdm_ray

@poolray.remote
def work(count, name):
    return sum(1 for _ in tqdm_ray.tqdm(range(count), desc=name, flush_interval_s=0))
"""


def run(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(PROGRAM + textwrap.dedent(body))
    return subprocess.run(
        [sys.executable, str(script)],
        env=script_environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=folder,
    )


def last_states(shown: str) -> dict[str, str]:
    """Label of each bar -> how far it was when it was drawn last."""
    found = re.findall(r"(?:\(pid=\d+\) )?(\w+): [^\r\n]*?\| *([\d.]+)/([\d.]+) ", shown)
    return {label: f"{float(count):g}/{float(total):g}" for label, count, total in found}


def test_bars_of_tasks_actors_pools_and_the_driver_reach_their_end(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        @poolray.remote
        class Actor:
            async def work(self, count):
                with tqdm_ray.tqdm(total=count, desc="actor", unit="B") as bar:
                    for _ in range(count):
                        bar.update()

        poolray.init(num_cpus=2)
        refs = [work.remote(20, "first"), work.remote(30, "second"), Actor.remote().work.remote(40)]
        for _ in tqdm_ray.tqdm(range(3), desc="driver"):
            pass
        print(poolray.get(refs))
        with poolray.Pool(1) as pool:
            pool.map(lambda n: list(tqdm_ray.tqdm(range(n), desc="pool")), [50])
        print(tqdm_ray._board.count(), print.__name__)
        """,
    )
    assert done.stdout == "[20, 30, None]\n0 print\n", done.stderr
    assert last_states(done.stderr) == {
        "first": "20/20",
        "second": "30/30",
        "actor": "40/40",
        "driver": "3/3",
        "pool": "50/50",
    }


def test_description_total_and_count_may_change(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        bar = tqdm_ray.tqdm(desc="before", total=5, flush_interval_s=0)
        bar.update(2)
        bar.set_description("after")
        bar.total = 10
        bar.n = 7
        bar.refresh()
        print(bar.n, bar.total)
        bar.close()
        bar.close()
        """,
    )
    assert done.stdout == "7 10\n", done.stderr
    assert last_states(done.stderr)["after"] == "7/10"


def test_print_keeps_clear_of_the_bars_and_is_itself_again_afterwards(tmp_path: Path) -> None:
    body = """
    original = print
    bar = tqdm_ray.tqdm(desc="bar", total=2, flush_interval_s=0)
    bar.update()
    print(print is original)
    bar.close()
    print(print is original)
    """
    assert run(tmp_path, body).stdout == "False\nTrue\n"
    left_alone = f"import os; os.environ['POOLRAY_TQDM_PATCH_PRINT'] = '0'\n{PROGRAM}"
    script = tmp_path / "left_alone.py"
    script.write_text(f"{left_alone}\npoolray.init(num_cpus=1)\n{textwrap.dedent(body)}")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=script_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.stdout == "True\nTrue\n", done.stderr


def test_the_bars_of_a_killed_worker_go(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        f"""
        @poolray.remote
        class Holder:
            def begin(self):
                self.bar = tqdm_ray.tqdm(total=10, desc="lost", flush_interval_s=0)
                self.bar.update(3)
                return os.getpid()

        holder = Holder.remote()
        pid = poolray.get(holder.begin.remote())
        print(tqdm_ray._board.count())
        os.kill(pid, {int(signal.SIGKILL)})
        try:
            poolray.get(holder.begin.remote())
        except poolray.exceptions.ActorDiedError:
            pass
        tqdm_ray._LOOK_EVERY_S = 0
        bar = tqdm_ray.tqdm(desc="mine", total=1, flush_interval_s=0)
        bar.update()
        print(tqdm_ray._board.count())
        """,
    )
    assert done.stdout == "1\n1\n", done.stderr


def test_a_driver_that_does_nothing_holds_up_nobody(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import threading

        @poolray.remote
        class Busy:
            def __init__(self):
                self.begin, self.thread = threading.Event(), threading.Thread(target=self.show)
                self.thread.start()

            def show(self):
                self.begin.wait()
                for number in range(5000):
                    tqdm_ray.tqdm(total=1, desc="x" * 50).close()
                os.close(self.done)

            def start(self, path):
                self.done = os.open(path, os.O_WRONLY)
                self.begin.set()

        tqdm_ray._board.show = lambda state: None
        os.mkfifo("done")
        reader = os.open("done", os.O_RDONLY | os.O_NONBLOCK)
        busy = Busy.remote()
        poolray.get(busy.start.remote(os.path.abspath("done")))
        os.set_blocking(reader, True)
        print(os.read(reader, 1))
        """,
    )
    assert done.stdout == "b''\n", done.stderr


def test_without_tqdm_the_program_runs_and_is_told_once(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import sys
        sys.modules["tqdm"] = sys.modules["tqdm.auto"] = None
        print(poolray.get([work.remote(20, "first"), work.remote(30, "second")]))
        """,
    )
    assert done.stdout == "[20, 30]\n"
    assert done.stderr.count("pip install 'poolray[tqdm]'") == 1, done.stderr


def test_a_bar_belongs_to_its_process(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import pickle
        try:
            pickle.dumps(tqdm_ray.tqdm(total=3))
        except TypeError as error:
            print(error)
        try:
            iter(tqdm_ray.tqdm(total=3)).__next__()
        except ValueError as error:
            print(error)
        """,
    )
    assert "make one in each task" in done.stdout
    assert "No iterable provided" in done.stdout


def test_in_a_terminal_each_bar_has_a_line_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    body = "print(poolray.get([work.remote(20, 'first'), work.remote(30, 'second')]))"
    script.write_text(f"{PROGRAM}\npoolray.init(num_cpus=2)\n{body}\n")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    program = subprocess.Popen(
        [sys.executable, str(script)],
        env=script_environment(tmp_path),
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 65536):
            shown += part
    except OSError:
        pass  # the last one has closed it
    os.close(master)
    assert program.wait(DEADLINE_S) == 0
    text = shown.decode()
    assert "[20, 30]" in text
    assert last_states(text) == {"first": "20/20", "second": "30/30"}


@pytest.mark.timeout(150)
def test_in_a_notebook_bars_are_widgets(notebook: Notebook) -> None:
    pytest.importorskip("ipywidgets")
    assert notebook.run(PROGRAM).error is None
    assert notebook.run("poolray.get([work.remote(20, 'a'), work.remote(30, 'b')])").value() == (
        "[20, 30]"
    )
    notebook.run("from tqdm.notebook import tqdm_notebook")
    assert notebook.run("issubclass(tqdm_ray._board._make, tqdm_notebook)").value() == "True"
    made = notebook.run(
        "bar = tqdm_ray.tqdm(total=3, desc='c', flush_interval_s=0); bar.update(2)\n"
        "[(s.bar.container.children[1].value, s.bar.container.children[1].max)"
        " for s in tqdm_ray._board._bars.values()]"
    )
    assert made.value() == "[(2.0, 3.0)]"


@pytest.mark.timeout(150)
def test_in_a_notebook_without_widgets_bars_are_text(notebook: Notebook) -> None:
    notebook.run("import sys; sys.modules['ipywidgets'] = None")
    assert notebook.run(PROGRAM).error is None
    cell = notebook.run("poolray.get([work.remote(20, 'a'), work.remote(30, 'b')])")
    assert cell.value() == "[20, 30]"
    # The kernel's stream is sent in the background.
    notebook.read_until(lambda: last_states(cell.stderr) == {"a": "20/20", "b": "30/30"})
