"""What workers write arrives where the driver writes: whole, and also when the end is near."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from tests.integration.support import ScriptResult

RunScript = Callable[..., ScriptResult]

CALLS = {
    "Pool": "with Pool(2) as pool: pool.map({function}, range({count}), chunksize=1)",
    "Executor": "with Executor(2) as executor: list(executor.map({function}, range({count})))",
    "tasks": "poolray.get([poolray.remote({function}).remote(i) for i in range({count})])",
}
ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def without_prefix(line: str) -> str:
    """What a task printed, without the task's name and the worker's pid before it."""
    return re.sub(r"^\(.+? pid=\d+\) ", "", ANSI_COLOUR.sub("", line))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_all_that_tasks_write_arrives_whole_and_on_the_right_stream(
    call: str, script: RunScript
) -> None:
    result = script(
        f"""
        import subprocess

        def speak(number):
            print("printed", number)
            print("printed as an error", number, file=sys.stderr)
            sys.stdout.write(f"written in ")
            sys.stdout.write(f"two parts {{number}}\\n")
            os.write(1, f"by descriptor {{number}}\\n".encode())
            subprocess.run(["echo", "by a program", str(number)])

        if __name__ == "__main__":
            {call.format(function="speak", count=50)}
        """
    )
    kinds = ("printed", "written in two parts", "by descriptor", "by a program")
    lines = [without_prefix(line) for line in result.lines()]
    assert Counter(lines) == Counter(f"{kind} {number}" for kind in kinds for number in range(50))
    errors = [without_prefix(line) for line in result.stderr.splitlines()]
    assert Counter(errors) == Counter(f"printed as an error {number}" for number in range(50))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_what_was_buffered_when_workers_were_forked_is_written_once(
    call: str, script: RunScript
) -> None:
    result = script(
        f"""
        def speak(number):
            print("task")

        if __name__ == "__main__":
            sys.stdout.write("before ")  # stays in the buffer of a pipe
            {call.format(function="speak", count=4)}
            print("after")
        """
    )
    assert result.stdout.count("before") == 1
    assert result.stdout.count("task") == 4
    assert result.stdout.count("after") == 1


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("ending", ["\\n", ""])
def test_output_just_before_the_end_is_not_lost(call: str, ending: str, script: RunScript) -> None:
    """The worker is told to end, or killed, as soon as its result is there."""
    result = script(
        f"""
        def speak(number):
            print("some text", number, end="{ending}")

        if __name__ == "__main__":
            {call.format(function="speak", count=1)}
            poolray.shutdown()
        """
    )
    assert "some text 0" in ANSI_COLOUR.sub("", result.stdout), result


# --- streams that are objects --------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_replaced_stream_gets_what_tasks_print(call: str, script: RunScript) -> None:
    """A notebook's streams are no descriptors: text must come back to the driver's objects."""
    result = script(
        f"""
        import io

        def speak(number):
            print("printed", number)
            print("printed as an error", number, file=sys.stderr)
            print("wörter ✓ 🎉" * 3000)

        if __name__ == "__main__":
            real, sys.stdout, sys.stderr = sys.stdout, io.StringIO(), io.StringIO()
            {call.format(function="speak", count=30)}
            poolray.shutdown()
            out, err = sys.stdout.getvalue(), sys.stderr.getvalue()
            sys.stdout, sys.stderr = real, sys.__stderr__
            print(sum(f"printed {{number}}\\n" in out for number in range(30)))
            print(sum(f"printed as an error {{number}}\\n" in err for number in range(30)))
            print(out.count("wörter ✓ 🎉" * 3000 + "\\n"))
        """
    )
    assert result.lines() == ["30", "30", "30"]


def test_a_replaced_stream_gets_the_part_that_a_killed_worker_had_sent(script: RunScript) -> None:
    result = script(
        """
        import io
        from poolray.protocol.worker import WorkerOutput

        def speak(number):
            part = WorkerOutput(
                stream=1,
                text="half a sentence",
                source=threading.get_native_id(),
                unfinished=True,
            )
            sys.stdout._reports.send(sys.stdout._encode(part))
            os.kill(os.getpid(), signal.SIGKILL)

        if __name__ == "__main__":
            real, sys.stdout = sys.stdout, io.StringIO()
            with Pool(1, max_retries=0) as pool:
                try:
                    pool.apply(speak, (1,))
                except poolray.exceptions.WorkerCrashedError:
                    print("it was killed", file=real)
            poolray.shutdown()
            written, sys.stdout = sys.stdout.getvalue(), real
            print(written)
        """
    )
    assert result.lines() == ["it was killed", "half a sentence"], result


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_replaced_stream_gets_what_came_just_before_the_end(call: str, script: RunScript) -> None:
    result = script(
        f"""
        import io

        def speak(number):
            print("unfinished", number, end="")

        if __name__ == "__main__":
            real, sys.stdout = sys.stdout, io.StringIO()
            {call.format(function="speak", count=1)}
            poolray.shutdown()
            out, sys.stdout = sys.stdout.getvalue(), real
            print(out.count("unfinished 0"))
        """
    )
    assert result.lines() == ["1"]


def test_a_stream_that_fails_costs_text_and_nothing_else(script: RunScript) -> None:
    result = script(
        """
        class Broken:
            def write(self, text):
                raise OSError("no space left")

            def flush(self):
                raise OSError("no space left")

        def speak(number):
            print("lost")
            return number

        if __name__ == "__main__":
            real, sys.stdout = sys.stdout, Broken()
            with Pool(2) as pool:
                values = pool.map(speak, range(100), chunksize=1)
            sys.stdout = real
            print(values == list(range(100)))
        """
    )
    assert result.lines() == ["True"]


def test_a_closed_or_missing_stream_hurts_nobody(script: RunScript) -> None:
    """Programs without a console have None there."""
    result = script(
        """
        def speak(number):
            print("lost")
            return number

        if __name__ == "__main__":
            answers = []
            real = os.dup(1)
            sys.stdout = sys.stderr = None
            with Pool(2) as pool:
                answers.append(pool.map(speak, range(10)) == list(range(10)))
            answers.append(poolray.get(poolray.remote(speak).remote(3)) == 3)
            poolray.shutdown()
            sys.stdout = open(real, "w")
            print(answers)
        """
    )
    assert result.lines() == ["[True, True]"]


def test_much_output_does_not_block_results(script: RunScript) -> None:
    """Megabytes through the driver's stream, while nobody reads quickly."""
    result = script(
        """
        import io

        def shout(number):
            for line in range(2000):
                print(f"{number} {line} " + "x" * 200)
            return number

        if __name__ == "__main__":
            real, sys.stdout = sys.stdout, io.StringIO()
            with Pool(2) as pool:
                values = pool.map(shout, range(10), chunksize=1)
            poolray.shutdown()
            out, sys.stdout = sys.stdout.getvalue(), real
            print(values == list(range(10)), out.count("\\n"))
        """
    )
    assert result.lines() == ["True 20000"]


def test_streams_replaced_in_a_test_get_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    """`capsys` replaces the objects; what tests of users print is found there."""
    from poolray import Pool

    with Pool(1) as pool:
        pool.apply(print, ("captured",))
    assert capsys.readouterr().out == "captured\n"


def test_descriptors_captured_in_a_test_get_the_output(capfd: pytest.CaptureFixture[str]) -> None:
    from poolray import Pool

    with Pool(1) as pool:
        pool.apply(print, ("captured",))
    assert capfd.readouterr().out == "captured\n"


def test_a_worker_has_no_standard_input(script: RunScript) -> None:
    result = script(
        """
        def read():
            try:
                return input()
            except EOFError:
                return "nothing to read"

        if __name__ == "__main__":
            with Pool(1) as pool:
                print(pool.apply(read))
            print(poolray.get(poolray.remote(read).remote()))
        """
    )
    assert result.lines() == ["nothing to read", "nothing to read"]
