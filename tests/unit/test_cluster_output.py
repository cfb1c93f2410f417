"""What workers of a cluster print, as the driver shows it; logs of daemons rotate."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from poolray.cluster import places
from poolray.cluster.output import OutputFilter
from poolray.protocol.cluster import Output

HERE, THERE = "10.0.0.1", "10.0.0.2"


def printed(text: str, pid: int = 7, address: str = HERE, label: str = "f") -> Output:
    return Output(job_id=b"job1", stream=1, text=text, label=label, pid=pid, address=address)


def plain(capsys: pytest.CaptureFixture[str]) -> str:
    """What was shown, without colours."""
    return re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out)


def test_lines_name_task_process_and_the_address_of_other_nodes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shows = OutputFilter(HERE)
    shows.show(printed("one\ntwo\n"))
    shows.show(printed("three\n", pid=8, address=THERE))
    shows.show(printed("four\n", label=""))
    assert plain(capsys).splitlines() == [
        "(f pid=7) one",
        "(f pid=7) two",
        "(f pid=8, ip=10.0.0.2) three",
        "(pid=7) four",
    ]


def test_what_many_processes_say_is_shown_once_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shows = OutputFilter(HERE)
    for pid in range(4):
        shows.show(printed(f"step {pid}\n", pid=pid, address=THERE))
    shows.show(printed("step 9\n", pid=0, address=THERE))  # its own way to say it
    assert plain(capsys).splitlines() == [
        "(f pid=0, ip=10.0.0.2) step 0",
        "(f pid=0, ip=10.0.0.2) step 9",
    ]
    shows.flush_due()
    assert plain(capsys) == ""  # not yet
    shows.flush_all()
    assert plain(capsys) == "(f pid=3, ip=10.0.0.2) step 3 [repeated 3x across cluster]\n"


def test_nothing_is_counted_for_who_wants_every_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POOLRAY_DEDUP_LOGS", "0")
    shows = OutputFilter(HERE)
    for pid in range(3):
        shows.show(printed("same\n", pid=pid))
    assert len(plain(capsys).splitlines()) == 3


def test_logs_of_daemons_rotate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_LOG_BYTES", 2000)
    logger = logging.getLogger("poolray")
    before, propagates, level = list(logger.handlers), logger.propagate, logger.level
    try:
        path = Path(places.log_to(str(tmp_path), "node-1"))
        for number in range(200):
            logging.getLogger("poolray.cluster.node_daemon").info("line %d", number)
        names = sorted(file.name for file in path.parent.iterdir())
        assert names == ["node-1.log", *(f"node-1.log.{n}" for n in range(1, 5))]
        assert all(file.stat().st_size <= 2000 for file in path.parent.iterdir())
        assert "line 199" in path.read_text()
    finally:
        for handler in [h for h in logger.handlers if h not in before]:
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = propagates
        logger.setLevel(level)
