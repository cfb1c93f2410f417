"""Files of workers' output: what is written, cut and read; and that nothing else is ever read."""

from __future__ import annotations

import os
import random
import shutil
import string
from pathlib import Path

import pytest

from poolray.cluster.worker_logs import WorkerLogs
from poolray.config import Config
from poolray.ids import TaskId, WorkerId
from poolray.local.fork_server import WorkerSetup
from poolray.local.log_files import LogFile, log_name
from poolray.node.effects import LookIntoLogs
from poolray.protocol.state import LogRow, LogTextRow, LogWish, StateKind
from poolray.protocol.worker import WorkerOutput

WORKER, JOB, PID = WorkerId(b"W" * 28), b"job1", 4711
OUT, ERR = (log_name(WORKER, JOB, PID, suffix) for suffix in ("out", "err"))
SETUP = WorkerSetup(config=Config(), job_id=JOB)
TASK, NOBODY = TaskId(b"T" * 24), TaskId(b"")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "session" / "logs"
    made.mkdir(parents=True)
    return made


def logs_in(folder: Path, kept: tuple[str, ...] = (), **config: int) -> WorkerLogs:
    return WorkerLogs(str(folder.parent), Config(**config), kept)  # type: ignore[arg-type]


class Host:
    """The workers that the daemon has."""

    setup = SETUP

    def pids(self) -> list[tuple[WorkerId, int]]:
        return [(WORKER, PID)]


class Writer:
    """A worker with its file, and the daemon that hears of it."""

    def __init__(self, folder: Path, logs: WorkerLogs, max_bytes: int = 1 << 20) -> None:
        self._file = LogFile(str(folder / OUT), max_bytes)
        self._logs = logs

    def write(self, text: str, task: TaskId = NOBODY) -> WorkerOutput:
        data = text.encode()
        output = WorkerOutput(
            stream=1,
            text=text,
            source=1,
            pid=PID,
            job_id=JOB,
            worker_id=WORKER,
            log_end=self._file.write(data),
            log_bytes=len(data),
        )
        if task:
            self._logs.note(output, task, 0)
        return output

    def stray_end(self) -> int:
        return self._file.stray_end()


def read(
    logs: WorkerLogs, name: str, start: int = 0, size: int = 1 << 20, task: TaskId = NOBODY
) -> LogTextRow:
    wish = LogWish(name=name, start=start, size_bytes=size, task_id=task)
    (row,) = logs.look(LookIntoLogs(7, StateKind.LOG_TEXT, wish)).rows
    assert isinstance(row, LogTextRow)
    return row


def names(logs: WorkerLogs, pattern: str = "*") -> list[str]:
    wish = LogWish(pattern=pattern)
    rows = logs.look(LookIntoLogs(7, StateKind.LOGS, wish)).rows
    return sorted(row.name for row in rows if isinstance(row, LogRow))


def test_what_is_printed_is_read_by_stream_place_and_task(folder: Path) -> None:
    logs = logs_in(folder)
    writer = Writer(folder, logs)
    writer.write("before\n")
    writer.write("by the ", TASK)
    with (folder / OUT).open("a") as other:
        other.write("program and the ")
    writer.write("task\n", TASK)
    writer.write("after\n")
    (folder / ERR).write_text("an error\n")
    assert read(logs, OUT).data == b"before\nby the program and the task\nafter\n"
    assert read(logs, OUT, start=7, size=6).data == b"by the"
    assert read(logs, OUT, start=-6).data == b"after\n"
    assert read(logs, ERR).data == b"an error\n"
    part = read(logs, OUT, task=TASK)
    assert part.data == b"by the program and the task\n"
    assert (part.start, part.first, part.end) == (7, 7, 35)
    assert read(logs, ERR, task=TASK).data == b""
    assert names(logs) == sorted([OUT, ERR])
    assert names(logs, "*.err") == [ERR]


def test_a_file_is_closed_with_its_worker_and_goes_when_others_come(folder: Path) -> None:
    logs = logs_in(folder, worker_logs_ended_max=2)
    Writer(folder, logs).write("words\n")
    assert not read(logs, OUT).is_closed
    logs.end(SETUP, WORKER, PID, "")
    assert read(logs, OUT).is_closed
    other = WorkerId(b"X" * 28)
    for pid in (1, 2):
        (folder / log_name(other, JOB, pid, "out")).write_text("more\n")
        logs.end(SETUP, other, pid, "")
    assert names(logs) == [log_name(other, JOB, pid, "out") for pid in (1, 2)]
    assert "no file" in read(logs, OUT).refusal


def test_a_long_file_loses_its_older_half_and_keeps_its_places(folder: Path) -> None:
    logs = logs_in(folder)
    writer = Writer(folder, logs, max_bytes=128 << 10)
    lines = [f"line {number} {'x' * 90}\n" for number in range(3000)]
    for number, line in enumerate(lines):
        writer.write(line, TaskId(number.to_bytes(24, "big")))
    text = "".join(lines)
    row = read(logs, OUT, start=-1000)
    assert (row.end, row.data.decode()) == (len(text), text[-1000:])
    assert 64 << 10 <= row.end - row.first <= 128 << 10
    first = read(logs, OUT, start=0, size=100)
    assert first.start == row.first
    assert text[first.start :].startswith(first.data.decode())
    assert first.data.startswith(b"line ")  # from a whole line on
    for number in (2999, 2900, 2700):
        task = TaskId(number.to_bytes(24, "big"))
        assert read(logs, OUT, task=task).data.decode() == lines[number]
    assert read(logs, OUT, task=TaskId(bytes(24))).data == b""  # it is gone
    head = f"[{row.first:015d} bytes of earlier output are gone]\n"
    assert (folder / OUT).read_text() == head + text[row.first :]


def test_what_a_program_writes_is_measured_and_cut_now_and_then(folder: Path) -> None:
    logs = logs_in(folder, worker_log_max_bytes=128 << 10)
    writer = Writer(folder, logs)
    with (folder / OUT).open("ab", buffering=0) as program:
        program.write(b"no line" * 100_000)
        logs.tick(100.0, [Host()])  # type: ignore[list-item]
        assert os.stat(folder / OUT).st_size <= 65 << 10
        assert read(logs, OUT, start=-7).data == b"no line"
        assert read(logs, OUT).end == 700_000
        program.write(b"and more\n")
    writer.write("by the task\n", TASK)
    assert read(logs, OUT, task=TASK).data == b"by the task\n"
    assert read(logs, OUT, start=700_000).data == b"and more\nby the task\n"


def test_a_cut_text_begins_with_a_whole_character(folder: Path) -> None:
    logs = logs_in(folder)
    writer = Writer(folder, logs, max_bytes=128 << 10)
    for _ in range(3):
        writer.write("x" + "🎉" * 30_000)
    read(logs, OUT).data[: 4 * 1000].decode()


def test_an_earlier_life_of_the_daemon_is_remembered(folder: Path) -> None:
    (folder / OUT).write_text("of before\n")
    logs = logs_in(folder, kept=(OUT, ERR))
    assert read(logs, OUT).is_closed
    assert logs.kept() == [OUT, ERR]


def test_without_files_nothing_is_written(folder: Path) -> None:
    logs = logs_in(folder, worker_log_max_bytes=0)
    assert logs.worker_folder == ""
    logs.tick(100.0, [Host()])  # type: ignore[list-item]
    logs.end(SETUP, WORKER, PID, "")
    assert names(logs) == []


def test_a_folder_that_is_gone_costs_logs_and_nothing_else(folder: Path) -> None:
    logs = logs_in(folder)
    writer = Writer(folder, logs)
    shutil.rmtree(folder)
    writer.write("lost\n")
    with pytest.raises(OSError, match="No such"):
        LogFile(str(folder / ERR), 100)
    logs.tick(100.0, [Host()])  # type: ignore[list-item]
    logs.end(SETUP, WORKER, PID, "")
    assert names(logs) == []
    assert read(logs, OUT).refusal


def told(found: list[WorkerOutput]) -> str:
    return "".join(output.text for output in found)


def strays(logs: WorkerLogs, now: float) -> list[WorkerOutput]:
    return logs.strays(now, [Host()], lambda worker_id: "")  # type: ignore[list-item]


def past_python(folder: Path, text: str) -> None:
    with (folder / OUT).open("a") as file:
        file.write(text)


def test_what_is_written_past_python_is_told_once_and_in_its_place(folder: Path) -> None:
    logs = logs_in(folder)
    writer = Writer(folder, logs)
    first = writer.write("one\n")
    past_python(folder, "two\n")
    third = writer.write("three\n")
    assert told(logs.in_order(first)) == "one\n"
    assert told(logs.in_order(third)) == "two\nthree\n"
    assert logs.in_order(third) == []
    assert writer.stray_end() == 0
    past_python(folder, "four\n")
    fifth = writer.write("five\n")
    # What the daemon reads first is not shown again when it comes.
    assert strays(logs, 1.0) == []
    assert told(strays(logs, 2.0)) == "four\nfive\n"
    assert logs.in_order(fifth) == []
    assert strays(logs, 3.0) == []


def test_word_of_text_that_is_there_is_enough_and_the_end_of_a_worker_too(folder: Path) -> None:
    logs = logs_in(folder)
    writer = Writer(folder, logs)
    past_python(folder, "begun")
    word = WorkerOutput(
        stream=1,
        text="",
        source=1,
        pid=PID,
        job_id=JOB,
        worker_id=WORKER,
        label="work",
        log_end=writer.stray_end(),
    )
    (found,) = logs.in_order(word)
    assert (found.text, found.label, found.pid) == ("begun\n", "work", PID)
    past_python(folder, "whole\nnot whole")
    strays(logs, 1.0)
    assert told(strays(logs, 2.0)) == "whole\n"
    (left,) = logs.end(SETUP, WORKER, PID, "")
    assert (left.text, left.label) == ("not whole\n", "work")


def test_a_flood_past_python_is_told_in_part(folder: Path) -> None:
    logs = logs_in(folder)
    writer = Writer(folder, logs, max_bytes=8 << 20)
    past_python(folder, ("x" * 63 + "\n") * 20_000)
    shown = told(logs.in_order(writer.write("the end\n")))
    assert shown.endswith("x\nthe end\n")
    assert len(shown) == (256 << 10) + len("the end\n")


def test_no_name_leads_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    """Whoever has the token can do worse, but not by asking for logs."""
    secret = tmp_path / "session" / "secret"
    secret.write_text("SECRET")
    (folder / "link").symlink_to(secret)
    (folder / "folder").mkdir()
    (folder / "folder" / "inner").write_text("SECRET")
    (folder / "away").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    (folder / "plain").write_text("words")
    logs = logs_in(folder)
    assert names(logs) == ["plain"]
    tried = [
        *("", ".", "..", "/", "//", "link", "folder", "folder/inner", "away/session/secret"),
        *("pipe", "../secret", "./plain", "folder/../plain", "plain/", "plain\0", "\0"),
        *(str(secret), f"/{secret}", f"{folder}/plain", "../logs/plain", "..\\secret", "~"),
        *("x" * 255, "x" * 256, "x" * 100_000, "/proc/self/environ", "/dev/zero", "%2e%2e/secret"),
    ]
    draw = random.Random(7)
    pieces = [
        "..",
        ".",
        "/",
        "secret",
        "link",
        "away",
        "session",
        "folder",
        "inner",
        "\0",
        "~",
        "*",
    ]
    pieces += list(string.printable)
    for _ in range(3000):
        tried.append("".join(draw.choices(pieces, k=draw.randrange(1, 8))))
    before = len(os.listdir("/proc/self/fd"))
    for name in tried:
        row = read(logs, name, start=draw.choice((0, -1, -(2**62), 2**62)), size=2**62)
        assert row.refusal or name == "plain", name
        assert b"SECRET" not in row.data, name
    for pattern in ["../*", "/*", "**", "*/*", "[", "[!", "*" * 1000 + "b", "x" * 5000, "\0", ""]:
        assert set(names(logs, pattern)) <= {"plain"}
    assert read(logs, "plain").data == b"words"
    assert len(os.listdir("/proc/self/fd")) == before


def test_any_place_and_size_gives_what_is_there(folder: Path) -> None:
    (folder / "plain").write_bytes(bytes(range(200)))
    logs = logs_in(folder)
    draw = random.Random(11)
    for _ in range(2000):
        start, size = draw.randrange(-300, 300), draw.randrange(-10, 300)
        row = read(logs, "plain", start=start, size=size)
        begin = max(0, 200 + start) if start < 0 else min(200, start)
        assert row.start == begin
        assert row.data == bytes(range(200))[begin : begin + max(0, size)]


def test_what_a_worker_tells_late_is_told_from_its_file_and_no_line_is_missing(
    folder: Path,
) -> None:
    logs = logs_in(folder)
    writer = Writer(folder, logs, max_bytes=16 << 20)
    lines = [f"line {number} ".ljust(8 << 10, "x") + "\n" for number in range(600)]
    shown = told(logs.in_order(writer.write(lines[0])))
    late = [writer.write(line) for line in lines[1:400]]  # it waits for room in its channel
    assert strays(logs, 1.0) == []
    looks = [told(strays(logs, now)) for now in (2.0, 3.0)]
    assert all(looks)
    shown += "".join(looks)
    for output in late:
        shown += told(logs.in_order(output))
    shown += "".join(told(logs.in_order(writer.write(line))) for line in lines[400:])
    assert shown == "".join(lines)
