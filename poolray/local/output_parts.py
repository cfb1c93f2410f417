"""The parts of what workers print, put together.

What: long texts come in packets, between those of other workers; gives each text once, whole.
Who calls: the node's shell.
May touch: nothing.
Invariants: the texts of one thread keep their order; what whoever wrote it will not finish is given
as far as it came.
"""

from __future__ import annotations

from typing import final

import msgspec

from poolray.protocol.worker import WorkerOutput


@final
class OutputParts:
    """Texts that are not complete."""

    def __init__(self) -> None:
        #: (source, stream) -> what has come.
        self._parts: dict[tuple[int, int], list[WorkerOutput]] = {}

    def add(self, message: WorkerOutput) -> WorkerOutput | None:
        """A text, if it is complete with this."""
        key = (message.source, message.stream)
        if message.unfinished or key in self._parts:
            self._parts.setdefault(key, []).append(message)
        if message.unfinished:
            return None
        parts = self._parts.pop(key, None)
        return _joined(parts) if parts else message

    def rest(self, source: int | None = None) -> list[WorkerOutput]:
        """What this thread (None: anybody) has begun and will not finish."""
        keys = [key for key in self._parts if source is None or key[0] == source]
        return [_joined(self._parts.pop(key)) for key in keys]


def _joined(parts: list[WorkerOutput]) -> WorkerOutput:
    return msgspec.structs.replace(parts[0], text="".join(part.text for part in parts))
