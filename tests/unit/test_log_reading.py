"""Files of logs are read in parts: the last lines, what comes meanwhile, characters, colours."""

from __future__ import annotations

from typing import Any

import pytest

from poolray.ids import NodeId
from poolray.protocol.state import LogTextRow, LogWish
from poolray.util import state_logs


class File:
    """A file of logs on a node; `growth` is appended by and by, once all was read."""

    def __init__(self, data: bytes, growth: list[bytes] | None = None, gone: int = 0) -> None:
        self.data = data
        self.gone = gone
        self.growth = growth or []

    def answer(self, node_id: NodeId, wish: LogWish, timeout_s: float) -> LogTextRow:
        end = self.gone + len(self.data)
        start = max(self.gone, min(end, wish.start))
        at = start - self.gone
        data = self.data[at : at + wish.size_bytes]
        is_closed = not self.growth
        if not data and wish.size_bytes and self.growth:
            self.data += self.growth.pop(0)
        return LogTextRow(
            name="f", data=data, start=start, first=self.gone, end=end, is_closed=is_closed
        )


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Any:
    def all_of(
        file: File,
        tail: int = -1,
        follow: bool = False,
        part_bytes: int = 7,
        encoding: str | None = "utf-8",
        ansi: bool = True,
    ) -> Any:
        monkeypatch.setattr(state_logs, "_PART_BYTES", part_bytes)
        monkeypatch.setattr(state_logs, "log_text", file.answer)
        log = state_logs._Log(NodeId(b"N"), "f", 1.0)
        parts = state_logs._parts(log, log.read(0, 0), tail, 0.0 if follow else None)
        if encoding is None:
            return b"".join(part for part, _ in parts)
        return "".join(state_logs._decoded(parts, encoding, "strict", not ansi))

    return all_of


@pytest.mark.parametrize("part_bytes", [1, 2, 7, 1000])
@pytest.mark.parametrize("end", ["\n", ""])
def test_the_last_lines_are_those_at_the_end(read: Any, part_bytes: int, end: str) -> None:
    lines = [f"line {number}" for number in range(20)]
    lines[10] = ""
    text = "\n".join(lines) + end
    for count in (0, 1, 2, 9, 10, 19, 20, 21, 1000):
        found = read(File(text.encode(), gone=5), tail=count, part_bytes=part_bytes)
        assert found == ("\n".join(lines[-count:]) + end if count else ""), count
    assert read(File(b""), tail=3, part_bytes=part_bytes) == ""
    assert read(File(b"\n\n\n"), tail=2, part_bytes=part_bytes) == "\n\n"


@pytest.mark.parametrize("part_bytes", [1, 2, 3, 5, 1000])
def test_characters_and_colours_across_parts_stay_whole(read: Any, part_bytes: int) -> None:
    text = "ä🎉\x1b[36mblue\x1b[0m\x1b[1;31m plain ✓\x1bM end"
    assert read(File(text.encode()), part_bytes=part_bytes) == text
    assert read(File(text.encode()), encoding=None, part_bytes=part_bytes) == text.encode()
    assert read(File(text.encode()), ansi=False, part_bytes=part_bytes) == "ä🎉blue plain ✓ end"
    with pytest.raises(UnicodeDecodeError):
        read(File("half ✓".encode()[:-1]), part_bytes=part_bytes)


def test_who_follows_reads_on_until_it_is_closed(read: Any) -> None:
    growth = [b"more\n", b"", b"and more\n", b""]
    assert read(File(b"a\nb\n", growth), tail=1, follow=True) == "b\nmore\nand more\n"
    assert read(File(b"a\nb\n", [b"more\n"])) == "a\nb\n"
