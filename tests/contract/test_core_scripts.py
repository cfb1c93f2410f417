"""Whole programs: functions of `__main__`, output of workers, interrupts, how a program ends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from core_implementation import ScriptResult, better_than_reference, run_script
from executor_support import is_alive, wait_until

ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def worker_lines(output: str) -> list[tuple[str, str]]:
    """(task name, text) of each line that came from a worker, as the driver showed it."""
    plain = ANSI_COLOUR.sub("", output)
    return re.findall(r"^\((.+?) pid=\d+\) (.*)$", plain, re.MULTILINE)


def assert_success(result: ScriptResult) -> None:
    assert result.exit_code == 0, result.stderr


# --- __main__ ----------------------------------------------------------------------------------


def test_functions_and_classes_of_main(script: Path) -> None:
    result = run_script(
        script,
        """
        class Number:
            def __init__(self, value):
                self.value = value

        class Mistake(Exception):
            pass

        @ray.remote
        def inner(number):
            return Number(number.value + 1)

        @ray.remote
        def outer(number):
            return ray.get(inner.remote(number))

        @ray.remote
        def fail():
            raise Mistake("of __main__")

        if __name__ == "__main__":
            ray.init(num_cpus=2)
            number = ray.get(outer.remote(Number(1)))
            print(type(number) is Number, number.value)
            try:
                ray.get(fail.remote())
            except Mistake as error:
                print("caught", error.cause)
        """,
    )
    assert_success(result)
    assert result.lines() == ["True 2", "caught of __main__"]


def test_main_may_define_functions_at_any_time(script: Path) -> None:
    result = run_script(
        script,
        """
        ray.init(num_cpus=2)

        def helper(x):
            return x + OFFSET

        @ray.remote
        def late(x):
            return helper(x)

        OFFSET = 1
        # The first call captures what the function uses, as it is now.
        OFFSET = 10
        print(ray.get(late.remote(1)))
        OFFSET = 100
        print(ray.get(late.remote(1)))

        def helper(x):
            return -x

        @ray.remote
        def late(x):
            return helper(x)

        print(ray.get(late.remote(1)))
        """,
    )
    assert_success(result)
    assert result.lines() == ["11", "11", "-1"]


def test_what_main_changes_after_init_is_seen_by_functions_first_called_later(script: Path) -> None:
    result = run_script(
        script,
        """
        SETTING = "before init"

        @ray.remote
        def setting():
            return SETTING

        ray.init(num_cpus=2)
        SETTING = "after init"
        print(ray.get(setting.remote()))
        """,
    )
    assert_success(result)
    assert result.lines() == ["after init"]


def test_a_main_without_guard_runs_once(script: Path) -> None:
    result = run_script(
        script,
        """
        print("main runs")
        ray.init(num_cpus=2)
        print(ray.get([ray.remote(lambda i=i: i).remote() for i in range(4)]))
        """,
    )
    assert_success(result)
    assert result.lines() == ["main runs", "[0, 1, 2, 3]"]


def test_tasks_import_modules_beside_the_script(script: Path) -> None:
    (script.parent / "beside_the_script.py").write_text("def answer():\n    return 42\n")
    result = run_script(
        script,
        """
        import beside_the_script

        @ray.remote
        def lazily():
            import beside_the_script
            return beside_the_script.answer()

        ray.init(num_cpus=2)
        print(ray.get(ray.remote(beside_the_script.answer).remote()), ray.get(lazily.remote()))
        """,
    )
    assert_success(result)
    assert result.lines() == ["42 42"]


def test_workers_have_the_environment_of_the_driver_at_init(script: Path) -> None:
    result = run_script(
        script,
        """
        import os

        @ray.remote
        def variable(name):
            return os.environ.get(name)

        os.environ["SET_BEFORE"] = "seen"
        ray.init(num_cpus=2)
        print(ray.get([variable.remote("FROM_OUTSIDE"), variable.remote("SET_BEFORE")]))
        """,
        environment={"FROM_OUTSIDE": "seen"},
    )
    assert_success(result)
    assert result.lines() == ["['seen', 'seen']"]


# --- output ------------------------------------------------------------------------------------


def test_output_of_workers_arrives_with_name_and_pid(script: Path) -> None:
    result = run_script(
        script,
        """
        import os
        import sys

        @ray.remote
        def talk(text):
            print(text)
            print("error of", text, file=sys.stderr)
            return os.getpid()

        ray.init(num_cpus=2)
        print("the driver has no prefix")
        pid = ray.get(talk.remote("first"))
        print("worker", pid)
        ray.get(talk.options(name="a name").remote("second"))
        linger()
        """,
    )
    assert_success(result)
    assert sorted(worker_lines(result.stdout)) == [("a name", "second"), ("talk", "first")]
    assert worker_lines(result.stderr) == [
        ("talk", "error of first"),
        ("a name", "error of second"),
    ]
    assert "the driver has no prefix" in result.lines()
    pid = re.search(r"^worker (\d+)$", result.stdout, re.MULTILINE)
    assert pid is not None
    assert f"(talk pid={pid[1]})" in result.stdout


def test_every_line_of_a_worker_arrives_in_order(script: Path) -> None:
    result = run_script(
        script,
        """
        import sys

        @ray.remote
        def talk():
            print("two", "words")
            print("several\\nlines")
            print()
            sys.stdout.write("in ")
            sys.stdout.write("pieces\\n")
            for i in range(100):
                print("line", i)

        ray.init(num_cpus=2)
        ray.get(talk.remote())
        linger()
        """,
    )
    assert_success(result)
    texts = [text for _, text in worker_lines(result.stdout)]
    expected = ["two words", "several", "lines", "in pieces"]
    expected += [f"line {i}" for i in range(100)]
    # Whether an empty line is shown is left open.
    assert [text for text in texts if text] == expected


def test_output_around_python_arrives_too(script: Path) -> None:
    result = run_script(
        script,
        """
        import os

        @ray.remote
        def talk():
            os.write(1, b"to the descriptor\\n")
            os.system("echo from a child")

        ray.init(num_cpus=2)
        ray.get(talk.remote())
        linger()
        """,
    )
    assert_success(result)
    # With the task's name in the reference; that is left open.
    assert re.search(r"to the descriptor$", result.stdout, re.MULTILINE)
    assert re.search(r"from a child$", result.stdout, re.MULTILINE)


def test_lines_of_different_workers_do_not_mix(script: Path) -> None:
    result = run_script(
        script,
        """
        @ray.remote
        def talk(letter):
            for _ in range(50):
                print(letter * 200)

        ray.init(num_cpus=2)
        ray.get([talk.remote("a"), talk.remote("b")])
        linger()
        """,
    )
    assert_success(result)
    texts = [text for _, text in worker_lines(result.stdout)]
    assert sorted(texts) == ["a" * 200] * 50 + ["b" * 200] * 50


def test_output_of_workers_can_be_switched_off(script: Path) -> None:
    result = run_script(
        script,
        """
        @ray.remote
        def talk():
            print("unheard")

        ray.init(num_cpus=2, log_to_driver=False)
        ray.get(talk.remote())
        linger()
        print("driver")
        """,
    )
    assert_success(result)
    assert "unheard" not in result.stdout + result.stderr
    assert "driver" in result.lines()


@better_than_reference("it reads its workers' logs now and then", always=False)
@pytest.mark.parametrize("ending", ["ray.shutdown()", "pass"])
def test_what_is_printed_last_is_not_lost(script: Path, ending: str) -> None:
    result = run_script(
        script,
        f"""
        import sys

        @ray.remote
        def talk():
            print("last words")
            sys.stdout.write("without a newline")

        ray.init(num_cpus=2)
        ray.get(talk.remote())
        {ending}
        """,
    )
    assert_success(result)
    texts = [text for _, text in worker_lines(result.stdout)]
    assert texts == ["last words", "without a newline"]


# --- errors ------------------------------------------------------------------------------------


def test_an_uncaught_error_of_a_task_ends_the_driver_with_its_traceback(script: Path) -> None:
    result = run_script(
        script,
        """
        @ray.remote
        def fail():
            raise ValueError("nobody catches this")

        ray.init(num_cpus=2)
        ray.get(fail.remote())
        print("not reached")
        """,
    )
    assert result.exit_code == 1
    assert "ValueError: nobody catches this" in result.stderr
    assert re.search(r"script\.py.*in fail", result.stderr)
    assert not result.stdout


def test_errors_that_nobody_looks_at_are_shown_when_their_refs_die(script: Path) -> None:
    result = run_script(
        script,
        """
        @ray.remote
        def fail(message):
            raise ValueError(message)

        @ray.remote
        def pass_on(value):
            return value

        ray.init(num_cpus=2)
        fail.remote("dropped before it failed")
        dropped, got, waited_for = map(fail.remote, ["dropped", "got", "waited for"])
        try:
            ray.get(got)
        except ValueError:
            pass
        # Waiting is looking too, and so is passing on: then the dependent's error counts.
        ray.wait([waited_for])
        passed_on = pass_on.remote(fail.remote("passed on"))
        del dropped, got, waited_for, passed_on
        linger()
        """,
    )
    assert_success(result)
    shown = re.findall(r"^ValueError: (.*)$", ANSI_COLOUR.sub("", result.stderr), re.MULTILINE)
    assert sorted(shown) == ["dropped", "dropped before it failed", "passed on"]


# --- interrupts and ends -----------------------------------------------------------------------

INTERRUPTED_GET = """
    import os
    import signal
    import threading
    import time

    @ray.remote
    def slow():
        time.sleep(2)
        return "finished"

    ray.init(num_cpus=1)
    ref = slow.remote()
    # To the whole group, as a terminal does on Ctrl-C.
    threading.Timer(0.5, os.killpg, (os.getpgrp(), signal.SIGINT)).start()
    start = time.monotonic()
    try:
        ray.get(ref)
    except KeyboardInterrupt:
        print("interrupted")
        print("promptly" if time.monotonic() - start < 0.8 else "late")
    print(ray.get(ref))
    print(ray.get(ray.remote(lambda: "usable").remote()))
"""


def test_an_interrupted_get_leaves_the_task_and_the_runtime_alone(script: Path) -> None:
    result = run_script(script, INTERRUPTED_GET)
    assert_success(result)
    lines = result.lines()
    assert lines[0] == "interrupted"
    assert lines[2:] == ["finished", "usable"]


@better_than_reference("it looks for signals once a second", always=False)
def test_an_interrupt_ends_a_get_at_once(script: Path) -> None:
    assert "promptly" in run_script(script, INTERRUPTED_GET).lines()


@pytest.mark.parametrize(
    "ending", ["pass", "ray.shutdown()", "sys.exit(0)", "slow.remote(); sys.exit(0)"]
)
def test_no_worker_outlives_the_program(script: Path, ending: str) -> None:
    result = run_script(
        script,
        f"""
        import os
        import sys
        import time

        @ray.remote
        def pid():
            return os.getpid()

        @ray.remote
        def slow():
            time.sleep(60)

        ray.init(num_cpus=2)
        print(*set(ray.get([pid.remote() for _ in range(20)])))
        {ending}
        """,
    )
    assert_success(result)
    workers = [int(pid) for pid in result.stdout.split()]
    assert workers
    wait_until(lambda: not any(map(is_alive, workers)))


def test_the_exit_code_is_the_drivers(script: Path) -> None:
    result = run_script(
        script,
        """
        import sys

        ray.init(num_cpus=1)
        ray.get(ray.remote(lambda: 1).remote())
        sys.exit(7)
        """,
    )
    assert result.exit_code == 7
