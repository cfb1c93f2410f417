"""Ctrl-C interrupts at once and leaves a usable runtime; a driver's death ends every process."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.support import (
    DEATH_S,
    Gate,
    Script,
    ScriptResult,
    children_of,
    is_alive,
    wait_until,
)

# How long an interrupt may take. A machine under load takes a tenth of a second to start a thread,
# and what is serialized or sent when the signal comes is finished first.
PROMPT_S = 1.0

# Each waits for something that does not come. `gate` is closed until the interrupt has come.
WAITS = {
    "get": "poolray.get(remote_hold.remote(started, gate))",
    "get of many": "poolray.get([remote_hold.remote(started, gate) for _ in range(20)])",
    "get with a timeout": "poolray.get(remote_hold.remote(started, gate), timeout=1000)",
    "wait": "poolray.wait([remote_hold.remote(started, gate)])",
    "Pool.apply": "pool.apply(announce_and_hold, (started, gate))",
    "Pool.map": "pool.map(partial(announce_and_hold, started, gate), range(20), chunksize=1)",
    "AsyncResult.wait": "pool.apply_async(announce_and_hold, (started, gate)).wait()",
    "Pool.imap": "next(pool.imap(partial(announce_and_hold, started, gate), range(20)))",
    "Pool.imap_unordered": "next(pool.imap_unordered(partial(announce_and_hold, started), [gate]))",
    "Future.result": "executor.submit(announce_and_hold, started, gate).result()",
    "futures.wait": "futures.wait([executor.submit(announce_and_hold, started, gate)])",
    "Executor.map": "list(executor.map(partial(announce_and_hold, started, gate), range(20)))",
}

SCRIPT = """
    import concurrent.futures as futures
    from functools import partial

    if __name__ == "__main__":
        started, gate = Gate("started"), Gate("gate")
        poolray.init(num_cpus=2)
        pool, executor = Pool(2), Executor(2)
        assert pool.apply(successor, (1,)) == executor.submit(successor, 1).result() == 2
        for _ in range(3):
            try:
                print("waiting", flush=True)
                {wait}
                print("it came")
            except KeyboardInterrupt:
                print("interrupted", flush=True)
            # What was waited for goes on, and can be left alone; other calls are served.
            gate.open(40)
            assert pool.map(successor, range(100)) == list(range(1, 101))
            assert poolray.get([remote_successor.remote(i) for i in range(100)])[-1] == 100
            assert executor.submit(successor, 1).result() == 2
            wait_until(lambda: statistics().tasks == 0)
            try:
                while True:
                    gate.wait(0)  # nobody needs these any more
            except TimeoutError:
                pass
        assert_nothing_is_left_over()
        pool.terminate()
        executor.shutdown()
        poolray.shutdown()
        assert not children_of(os.getpid())
        print("usable")
"""


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_an_interrupt_ends_a_wait_at_once_and_the_runtime_stays_usable(
    wait: str, tmp_path: Path
) -> None:
    with Script(tmp_path / "script.py", SCRIPT.format(wait=wait)) as script:
        for _ in range(3):
            assert script.read_line() == "waiting"
            Gate(tmp_path / "started").wait()  # a task has begun
            wait_until_asleep(script.pid)
            script.signal(signal.SIGINT)
            assert script.read_line(PROMPT_S) == "interrupted"
        assert script.finish().lines()[-1] == "usable"


def wait_until_asleep(pid: int) -> None:
    """Wait until a process's main thread sleeps for a while: the storms below interrupt earlier.

    An interrupt at the start of the standard `futures.wait` can leave its event's lock taken.
    """

    def is_asleep() -> bool:
        time.sleep(0.002)
        return state_of(pid) == "S"

    wait_until(lambda: all(is_asleep() for _ in range(10)))


def test_an_interrupt_of_the_whole_process_group_reaches_the_driver_alone(tmp_path: Path) -> None:
    """What Ctrl-C in a terminal does: calls under way go on, and programs that tasks start are
    interrupted as they would be without us."""
    body = """
        import subprocess
        from functools import partial

        def run_program(started):
            program = subprocess.Popen(
                [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )
            program.stdout.readline()
            started.open()
            return program.wait()

        if __name__ == "__main__":
            started, gate = Gate("started"), Gate("gate")
            with Pool(3) as pool:
                held = pool.apply_async(announce_and_hold, (started, gate, "done"))
                program = pool.apply_async(run_program, (started,))
                pids = set(pool.map(own_pid, range(20), chunksize=1))
                started.wait()
                started.wait()
                try:
                    print("waiting", flush=True)
                    held.get()
                except KeyboardInterrupt:
                    print("interrupted", flush=True)
                gate.open()
                print(held.get(), program.get() in (-signal.SIGINT, 1, 130))
                print(pids <= set(worker_pids()))
    """
    with Script(tmp_path / "script.py", body) as script:
        assert script.read_line() == "waiting"
        script.signal_group(signal.SIGINT)
        assert script.read_line(PROMPT_S) == "interrupted"
        assert script.finish().lines()[-2:] == ["done True", "True"]


# What the driver does, over and over, when the interrupt comes at a random moment.
STORMS = {
    "get": """
        refs = [remote_successor.remote(i) for i in range(20)]
        assert poolray.get(refs) == list(range(1, 21))
    """,
    "bulk submission": """
        refs = [remote_successor.remote(i) for i in range(3000)]
        assert poolray.get(refs[-1]) == 3000
    """,
    "wait": """
        ready, rest = poolray.wait([remote_successor.remote(i) for i in range(50)], num_returns=25)
        assert len(ready) == 25
    """,
    "put": """
        array = numpy.arange(100_000 + ROUND)
        ref = poolray.put(array)
        assert poolray.get(remote_sum.remote(ref)) == array.sum()
        assert poolray.get(ref)[-1] == array[-1]
    """,
    "Pool.apply": """
        assert pool.apply(successor, (ROUND,)) == ROUND + 1
    """,
    "Pool.apply_async": """
        results = [pool.apply_async(successor, (i,)) for i in range(500)]
        assert [result.get() for result in results] == list(range(1, 501))
    """,
    "Pool.map": """
        assert pool.map(successor, range(2000), chunksize=1) == list(range(1, 2001))
    """,
    "Pool.imap": """
        assert list(pool.imap(successor, range(500))) == list(range(1, 501))
        assert list(pool.imap(successor, iter(range(500)), 7)) == list(range(1, 501))
    """,
    "Pool.map of arrays": """
        arrays = pool.map(make_array, [100_000] * 3, chunksize=1)
        assert [array.sum() for array in arrays] == [100_000.0] * 3
    """,
    "Executor": """
        results = [executor.submit(successor, i) for i in range(200)]
        assert [future.result() for future in results] == list(range(1, 201))
        assert list(executor.map(successor, range(50))) == list(range(1, 51))
    """,
    "mixed": """
        refs = [remote_successor.remote(i) for i in range(100)]
        results = [pool.apply_async(successor, (i,)) for i in range(100)]
        future = executor.submit(successor, 1)
        assert poolray.get(refs) == list(range(1, 101))
        assert future.result() == 2
        assert [result.get() for result in results] == list(range(1, 101))
    """,
}

STORM = """
    import gc, json, random
    import numpy

    ROUND = 0

    @poolray.remote
    def remote_sum(array):
        return array.sum()

    def make_array(length):
        return numpy.ones(length)

    def work(pool, executor):
{work}

    class Sender(threading.Thread):
        '''Interrupts the main thread once after each arming.'''

        def __init__(self):
            super().__init__(daemon=True)
            self.random = random.Random({seed})
            self.armed = threading.Semaphore(0)
            self.start()

        def run(self):
            while True:
                self.armed.acquire()
                time.sleep(self.random.choice([0.0, 0.001, 0.005, 0.02]) * self.random.random())
                self.sent = time.monotonic()
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    if __name__ == "__main__":
        poolray.init(num_cpus=2)
        pool, executor = Pool(2), Executor(2)
        work(pool, executor)
        sender = Sender()
        delays = []
        for _ in range({times}):
            try:
                sender.armed.release()
                while True:
                    ROUND += 1
                    work(pool, executor)
            except KeyboardInterrupt:
                delays.append(time.monotonic() - sender.sent)
        # Everything works, and nothing is kept of what was interrupted.
        for _ in range(3):
            work(pool, executor)
        wait_until(lambda: statistics().tasks == 0, "the end of all tasks", 10)
        sys.last_traceback = sys.last_value = None
        assert_nothing_is_left_over()
        assert not pool._cache, pool._cache
        pool.close()
        pool.join()
        executor.shutdown()
        poolray.shutdown()
        assert not children_of(os.getpid())
        print(json.dumps(delays))
"""


@pytest.mark.parametrize("work", STORMS.keys())
def test_fifty_interrupts_at_random_moments_leave_the_runtime_usable_and_clean(
    work: str, script: Callable[..., ScriptResult]
) -> None:
    indented = "".join(f"    {line}\n" for line in STORMS[work].strip("\n").splitlines())
    seed = sum(map(ord, work))
    result = script(STORM.format(work=indented, seed=seed, times=50))
    delays = json.loads(result.lines()[-1])
    assert len(delays) == 50
    assert sorted(delays)[45] < PROMPT_S, delays


def test_an_interrupt_in_one_of_our_finalizers_is_raised_by_the_next_call(
    script: Callable[..., ScriptResult],
) -> None:
    """The interpreter would print and drop it."""
    result = script(
        """
        if __name__ == "__main__":
            poolray.init(num_cpus=1)
            ref = poolray.put(1)
            poolray.get(remote_successor.remote(1))
            client = ref._client
            client.sync_references()
            client.ring_when_dropped(lambda: os.kill(os.getpid(), signal.SIGINT))
            del ref
            client.ring_when_dropped(lambda: None)
            print("deleted")
            try:
                poolray.put(2)
            except KeyboardInterrupt:
                print("interrupted")
            assert poolray.get(remote_successor.remote(1)) == 2
        """
    )
    assert result.lines() == ["deleted", "interrupted"]
    assert result.stderr == ""


def test_ctrl_c_is_held_back_also_where_a_kernel_has_put_the_default_handler_back(
    script: Callable[..., ScriptResult],
) -> None:
    """A notebook's kernel does so before each cell; the machine must not be torn for that."""
    result = script(
        """
        from poolray.local import runtime as local_runtime

        if __name__ == "__main__":
            poolray.init(num_cpus=1)
            runtime = local_runtime.current()
            for enter in (runtime.guard.__enter__, runtime.guard.enter):
                signal.signal(signal.SIGINT, signal.default_int_handler)
                enter()
                os.kill(os.getpid(), signal.SIGINT)
                print("held back", flush=True)
                if enter == runtime.guard.__enter__:
                    runtime.guard.lock.release()
                try:
                    runtime.guard.leave()
                except KeyboardInterrupt:
                    print("raised", flush=True)
            assert poolray.get(remote_successor.remote(1)) == 2
        """
    )
    assert result.lines() == ["held back", "raised"] * 2, result
    assert result.exit_code == 0


def test_a_handler_of_the_program_is_left_alone(script: Callable[..., ScriptResult]) -> None:
    result = script(
        """
        class Stop(Exception):
            pass

        def stop(number, frame):
            raise Stop

        if __name__ == "__main__":
            signal.signal(signal.SIGINT, stop)
            with Pool(1) as pool:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
                try:
                    pool.apply(signal.sigtimedwait, ([signal.SIGUSR1], 20))
                except Stop:
                    print("stopped")
                assert signal.getsignal(signal.SIGINT) is stop
            poolray.shutdown()
            assert signal.getsignal(signal.SIGINT) is stop
        """
    )
    assert result.lines() == ["stopped"]


def test_the_interpreters_own_handler_is_put_back(script: Callable[..., ScriptResult]) -> None:
    result = script(
        """
        if __name__ == "__main__":
            before = signal.getsignal(signal.SIGINT)
            for _ in range(2):
                poolray.init(num_cpus=1)
                poolray.get(remote_successor.remote(1))
                poolray.shutdown()
                assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler
            print("put back")
        """
    )
    assert result.lines() == ["put back"]


def test_a_program_that_ignores_interrupts_is_not_interrupted(
    script: Callable[..., ScriptResult],
) -> None:
    result = script(
        """
        if __name__ == "__main__":
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            with Pool(2) as pool:
                for _ in range(20):
                    result = pool.map_async(successor, range(100), chunksize=1)
                    os.killpg(0, signal.SIGINT)
                    assert result.get(20) == list(range(1, 101))
            print("went on")
        """
    )
    assert result.lines() == ["went on"]


# --- death of the driver -------------------------------------------------------------------------

# What workers do when their driver dies. The C loops never come back to the interpreter.
OCCUPATIONS = {
    "idle": "",
    "sleeping": "[pool.apply_async(time.sleep, (600,)) for _ in range(4)]",
    "native loop": "[pool.apply_async(sum, (range(10**13),)) for _ in range(4)]",
    "tiny calls": "results = [pool.apply_async(successor, (i,)) for i in range(200_000)]",
    "blocked in get": "refs = [remote_outer.remote() for _ in range(4)]",
    "nested pool": "[executor.submit(nested, started) for _ in range(2)]; started.wait()",
    "ignoring signals": "[pool.apply_async(ignore_all) for _ in range(2)]",
}

DOOMED = """
    @poolray.remote
    def remote_sleep():
        time.sleep(600)

    @poolray.remote
    def remote_outer():
        return poolray.get(remote_sleep.remote())

    def nested(started):
        with Pool(1) as inner:
            inner.apply(successor, (1,))
            print(*worker_pids(), *fork_server_pids(), flush=True)
            started.open()
            inner.apply(time.sleep, (600,))

    def ignore_all():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(600)

    if __name__ == "__main__":
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it (nohup)
        started = Gate("started")
        poolray.init(num_cpus=4)
        pool, executor = Pool(2), Executor(2)
        pool.apply(successor, (1,))
        executor.submit(successor, 1).result()
        poolray.get(remote_successor.remote(1))
        held = {occupation}
        print("doomed", flush=True)
        {last}
"""


def start_doomed(path: Path, occupation: str, last: str = "signal.pause()") -> tuple[Script, list]:
    """A driver with workers that do something; also all of its processes."""
    body = DOOMED.format(occupation=OCCUPATIONS[occupation] or "None", last=last)
    with contextlib.ExitStack() as stack:
        script = stack.enter_context(Script(path, body))
        while script.read_line() != "doomed":
            pass
        family = children_of(script.pid)
        assert len(family) >= 6, family
        stack.pop_all()
        return script, family
    raise AssertionError("unreachable")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("occupation", OCCUPATIONS)
def test_a_dead_driver_takes_all_its_processes_along_within_a_second(
    occupation: str, number: signal.Signals, tmp_path: Path
) -> None:
    script, family = start_doomed(tmp_path / "script.py", occupation)
    with script:
        script.signal(number)
        wait_until(lambda: not is_alive(script.pid), "the driver's death", 5)
        taken_s = wait_until(
            lambda: not any(is_alive(process.pid) for process in family), "its children's", 10
        )
        assert taken_s < DEATH_S


@pytest.mark.parametrize("last", ["os._exit(3)", "os.abort()"])
def test_a_driver_that_leaves_without_cleaning_up_takes_its_processes_along(
    last: str, tmp_path: Path
) -> None:
    when_told = "signal.sigwait([signal.SIGUSR1])"
    blocked = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])"
    script, family = start_doomed(
        tmp_path / "script.py", "native loop", f"{blocked}; {when_told}; {last}"
    )
    with script:
        script.signal(signal.SIGUSR1)
        wait_until(lambda: not is_alive(script.pid), "the driver's death", 5)
        wait_until(
            lambda: not any(is_alive(process.pid) for process in family), "its children's", DEATH_S
        )


@pytest.mark.parametrize(
    ("last", "exit_code"),
    [("pass", 0), ("raise SystemExit(5)", 5), ("raise ValueError('the end')", 1)],
)
@pytest.mark.parametrize("occupation", ["idle", "sleeping", "native loop", "blocked in get"])
def test_a_driver_that_ends_with_work_under_way_ends_at_once_and_cleans_up(
    occupation: str, last: str, exit_code: int, tmp_path: Path
) -> None:
    """Executors finish what they were given, as the standard one does; pools and tasks do not."""
    body = DOOMED.format(occupation=OCCUPATIONS[occupation] or "None", last=last)
    (folder := tmp_path / "folder").mkdir()
    with Script(folder / "script.py", body) as script:
        while script.read_line() != "doomed":
            pass
        taken_s = wait_until(lambda: not is_alive(script.pid), "the driver's end", 20)
        result = script.finish()
        assert result.exit_code == exit_code, result
        assert taken_s < 2.0
        assert ("ValueError: the end" in result.stderr) == (exit_code == 1)
    left = {path.name for path in folder.iterdir()}
    assert left <= {"script.py", "started"}, "files are left in the temporary folder"


def test_a_stopped_driver_keeps_its_workers(tmp_path: Path) -> None:
    """SIGSTOP, a debugger, a laptop that sleeps: nobody is dead."""
    script, family = start_doomed(tmp_path / "script.py", "sleeping")
    with script:
        script.signal(signal.SIGSTOP)
        wait_until(lambda: state_of(script.pid) == "T", "the stop", 5)
        with pytest.raises(AssertionError):
            wait_until(
                lambda: not all(is_alive(process.pid) for process in family), "a death", DEATH_S
            )
        script.signal(signal.SIGCONT)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
