"""Texts of workers that come in parts are given once, whole, and as far as they came."""

from __future__ import annotations

from poolray.local.output_parts import OutputParts
from poolray.protocol.worker import WorkerOutput


def part(text: str, *, source: int = 1, stream: int = 1, unfinished: bool = False) -> WorkerOutput:
    return WorkerOutput(
        stream=stream, text=text, source=source, unfinished=unfinished, label="f", job_id=b"job1"
    )


def test_parts_of_several_writers_are_put_together() -> None:
    parts = OutputParts()
    assert parts.add(part("whole")) == part("whole")
    assert parts.add(part("a", unfinished=True)) is None
    assert parts.add(part("x", source=2, unfinished=True)) is None
    assert parts.add(part("other stream", stream=2)) == part("other stream", stream=2)
    assert parts.add(part("b", unfinished=True)) is None
    done = parts.add(part("c"))
    assert done is not None
    assert done.text == "abc"
    assert parts.add(part("d")) == part("d")


def test_what_is_not_finished_is_given_with_whose_it_is() -> None:
    parts = OutputParts()
    parts.add(part("a", unfinished=True))
    parts.add(part("x", source=2, unfinished=True))
    (rest,) = parts.rest(1)
    assert (rest.text, rest.label, rest.job_id) == ("a", "f", b"job1")
    assert [each.text for each in parts.rest()] == ["x"]
    assert parts.rest() == []
