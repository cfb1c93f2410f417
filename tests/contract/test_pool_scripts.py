"""What only a whole program shows: `__main__`, output, interrupts, the end of the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from pool_support import PoolClass, run_script


def test_functions_of_the_main_file_are_tasks(
    pool_implementation: PoolClass, tmp_path: Path
) -> None:
    result = run_script(
        pool_implementation,
        tmp_path / "script.py",
        """
        class Point:
            def __init__(self, x):
                self.x = x

        def move(point, by=1):
            return Point(point.x + by)

        if __name__ == "__main__":
            with Pool(2) as pool:
                points = pool.map(move, [Point(1), Point(2)])
                assert all(type(point) is Point for point in points)
                print([point.x for point in points], pool.apply(move, (Point(1),), {"by": 5}).x)
        """,
    )
    assert (result.exit_code, result.stdout) == (0, "[2, 3] 6\n"), result.stderr


def test_a_program_may_be_given_on_the_command_line_or_in_a_pipe(
    pool_implementation: PoolClass, tmp_path: Path
) -> None:
    result = run_script(
        pool_implementation,
        tmp_path / "script.py",
        f"""
        import subprocess, sys

        program = '''if True:
            from {pool_implementation.__module__} import Pool

            def add_one(x):
                return x + 1

            with Pool(2) as pool:
                print(pool.map(add_one, range(3)), flush=True)
        '''
        subprocess.run([sys.executable, "-c", program], check=True)
        subprocess.run([sys.executable, "-"], input=program, text=True, check=True)
        """,
    )
    assert (result.exit_code, result.stdout) == (0, "[1, 2, 3]\n" * 2), result.stderr


def test_what_tasks_print_reaches_the_output(
    pool_implementation: PoolClass, tmp_path: Path
) -> None:
    result = run_script(
        pool_implementation,
        tmp_path / "script.py",
        """
        import os, sys

        def speak(number):
            print(f"printed {number}")
            print(f"complained {number}", file=sys.stderr)
            sys.stdout.write(f"written {number}")

        def speak_to_descriptors():
            os.write(1, b"raw out\\n")
            os.write(2, b"raw err\\n")

        if __name__ == "__main__":
            pool = Pool(2, print, ("initialized",))
            pool.map(speak, range(3), 1)
            pool.apply(speak_to_descriptors)
            pool.close()
            pool.join()
            print("joined")
        """,
    )
    assert result.exit_code == 0, result.stderr
    # Two workers write to one file: their lines may be mixed.
    for number in range(3):
        assert f"printed {number}" in result.stdout
        assert f"written {number}" in result.stdout
        assert f"complained {number}" in result.stderr
    assert result.stdout.count("initialized") == 2
    assert "raw out" in result.stdout
    assert "raw err" in result.stderr
    assert "joined" in result.stdout


def test_what_was_buffered_before_the_pool_is_printed_once(
    pool_implementation: PoolClass, tmp_path: Path
) -> None:
    result = run_script(
        pool_implementation,
        tmp_path / "script.py",
        """
        import sys

        if __name__ == "__main__":
            sys.stdout.write("before")
            pool = Pool(2)
            pool.map(abs, range(10))
            pool.close()
            pool.join()
            sys.stdout.write(" after")
        """,
    )
    assert (result.exit_code, result.stdout) == (0, "before after"), result.stderr


def test_an_interrupt_ends_a_blocked_get_and_leaves_the_pool_usable(
    pool_implementation: PoolClass, tmp_path: Path
) -> None:
    result = run_script(
        pool_implementation,
        tmp_path / "script.py",
        """
        import os, pathlib, signal, time

        armed = False

        def interrupt_once(*_):
            global armed
            if armed:
                armed = False
                raise KeyboardInterrupt

        def interrupt(pid, caught):
            # Again and again: the standard class misses a signal that comes just before it blocks.
            while not caught.exists():
                os.kill(pid, signal.SIGINT)
                time.sleep(0.02)

        def interrupt_from(args):
            interrupt(*args)

        if __name__ == "__main__":
            signal.signal(signal.SIGINT, interrupt_once)
            pool = Pool(2)
            blocking_calls = {
                "apply": lambda *args: pool.apply(interrupt, args),
                "starmap": lambda *args: pool.starmap(interrupt, [args]),
                "imap": lambda *args: next(pool.imap(interrupt_from, [args])),
                "wait": lambda *args: pool.apply_async(interrupt, args).wait(),
                "get": lambda *args: pool.apply_async(interrupt, args).get(30),
            }
            for name, call in blocking_calls.items():
                caught = pathlib.Path(f"{__file__}.{name}")
                armed = True
                try:
                    call(os.getpid(), caught)
                except KeyboardInterrupt:
                    print("interrupted", name, pool.apply(abs, (-3,)))
                caught.touch()
            pool.terminate()
            pool.join()
        """,
    )
    expected = [f"interrupted {name} 3" for name in ("apply", "starmap", "imap", "wait", "get")]
    assert (result.exit_code, result.stdout.splitlines()) == (0, expected), result.stderr


@pytest.mark.parametrize("ending", ["pass", "sys.exit()", "raise SystemExit", "del pool"])
def test_the_interpreter_ends_with_a_pool_that_still_works(
    pool_implementation: PoolClass, tmp_path: Path, ending: str
) -> None:
    result = run_script(
        pool_implementation,
        tmp_path / "script.py",
        f"""
        import signal, sys

        if __name__ == "__main__":
            pool = Pool(2)
            print(pool.map(abs, [-1]), flush=True)
            waiting = pool.apply_async(signal.pause)
            many = pool.map_async(abs, range(1000), 1)
            {ending}
        """,
    )
    assert (result.exit_code, result.stdout) == (0, "[1]\n"), result.stderr


def test_a_pool_in_a_global_object_ends_with_the_interpreter(
    pool_implementation: PoolClass, tmp_path: Path
) -> None:
    result = run_script(
        pool_implementation,
        tmp_path / "script.py",
        """
        class Holder:
            def __init__(self):
                self.pool = Pool(1)

        if __name__ == "__main__":
            holder = Holder()
            holder.itself = holder
            holder.pool.map(float, range(10))
        """,
    )
    assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    assert "Traceback" not in result.stderr


def test_an_uncaught_error_of_a_task_prints_both_tracebacks(
    pool_implementation: PoolClass, tmp_path: Path
) -> None:
    result = run_script(
        pool_implementation,
        tmp_path / "script.py",
        """
        def fail(x):
            raise ValueError(f"cannot take {x}")  # the line in the task

        if __name__ == "__main__":
            with Pool(1) as pool:
                pool.map(fail, [7])  # the line of the call
        """,
    )
    assert result.exit_code == 1
    assert "# the line in the task" in result.stderr
    assert "# the line of the call" in result.stderr
    assert result.stderr.rstrip().endswith("ValueError: cannot take 7")


def test_an_unclosed_pool_is_reported_when_warnings_are_on(
    pool_implementation: PoolClass, tmp_path: Path
) -> None:
    body = """
        def use_a_pool():
            pool = Pool(1)
            pool.map(abs, [-1])

        if __name__ == "__main__":
            use_a_pool()
    """
    path = tmp_path / "script.py"
    loud = run_script(pool_implementation, path, body, "-W", "always::ResourceWarning")
    assert loud.exit_code == 0
    assert "ResourceWarning: unclosed running multiprocessing pool" in loud.stderr
    quiet = run_script(pool_implementation, path, body)
    assert (quiet.exit_code, quiet.stderr) == (0, "")


# The standard class forks at the call, so its workers know only what came before.
@pytest.mark.poolray_only
def test_functions_of_the_main_file_may_be_newer_than_the_pool(
    pool_implementation: PoolClass, tmp_path: Path
) -> None:
    result = run_script(
        pool_implementation,
        tmp_path / "script.py",
        """
        pool = Pool(2)
        print(pool.map(abs, [-1]))

        factor = 3

        def scale(x):
            return factor * x

        print(pool.map(scale, range(3)))
        pool.close()
        pool.join()
        """,
    )
    assert (result.exit_code, result.stdout) == (0, "[1]\n[0, 3, 6]\n"), result.stderr


@pytest.mark.poolray_only
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_lambda_sees_what_the_initializer_set(
    pool_implementation: PoolClass, tmp_path: Path, method: str
) -> None:
    result = run_script(
        pool_implementation,
        tmp_path / "script.py",
        f"""
        import multiprocessing

        def remember(value):
            global remembered
            remembered = value

        if __name__ == "__main__":
            context = multiprocessing.get_context("{method}")
            with Pool(1, remember, (7,), context=context) as pool:
                print(pool.map(lambda x: x * remembered, range(3)))
        """,
    )
    assert (result.exit_code, result.stdout) == (0, "[0, 7, 14]\n"), result.stderr


@pytest.mark.poolray_only
def test_arrays_that_live_until_the_end_of_the_program_die_in_silence(
    pool_implementation: PoolClass, tmp_path: Path
) -> None:
    result = run_script(
        pool_implementation,
        tmp_path / "script.py",
        """
        import numpy, os

        if __name__ == "__main__":
            pool = Pool(1)
            # Kept by a module that goes after all others.
            os.array = pool.apply(numpy.zeros, (100_000,))
            os.array[0] = 1.0
            pool.terminate()
        """,
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
