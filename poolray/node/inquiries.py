"""Clients' questions to the head, on their way there and back.

What: numbers a question, passes it on, and gives the answer to who asked.
Who calls: `node/node.py`.
May touch: nothing.
Invariants: each question is answered once, also when the head is another one by then; questions
may be asked twice, so what they ask for may be carried out twice.
"""

from __future__ import annotations

from typing import final

import msgspec

from poolray.ids import ClientId
from poolray.node.effects import Reply, SendHead
from poolray.node.state import NodeState
from poolray.protocol.inquiry import (
    AskHead,
    AskHeadPart,
    HeadAnswer,
    HeadAnswers,
    HeadQuestion,
    decode_question,
    encode_answer,
)

#: A reply to a worker must fit one packet of its control channel.
_PART_BYTES = 64 * 1024


@final
class Inquiries:
    """The open questions of a node's clients."""

    __slots__ = ("_next", "_open", "_parts", "_state")

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._next = 0
        #: our number -> who asked, under which number, and what.
        self._open: dict[int, tuple[ClientId, int, HeadQuestion]] = {}
        #: client -> its number -> the parts of a question that is not complete.
        self._parts: dict[ClientId, dict[int, list[bytes]]] = {}

    def on_ask(self, client_id: ClientId, message: AskHead) -> None:
        """A client wants to know something."""
        self._next = number = self._next + 1
        question = msgspec.structs.replace(message.question, request_id=number)
        self._open[number] = (client_id, message.request_id, question)
        self._state.effects.append(SendHead(question))

    def on_part(self, client_id: ClientId, message: AskHeadPart) -> None:
        """A part of what a client wants to know; nothing is asked before the last."""
        mine = self._parts.setdefault(client_id, {})
        parts = mine.setdefault(message.request_id, [])
        parts.append(message.data)
        if message.more:
            return
        del mine[message.request_id]
        if not mine:
            del self._parts[client_id]
        question = decode_question(b"".join(parts))
        self.on_ask(client_id, AskHead(request_id=message.request_id, question=question))

    def on_left(self, client_id: ClientId) -> None:
        """A client is gone: what it began to ask will not be completed."""
        self._parts.pop(client_id, None)

    def on_answer(self, message: HeadAnswers) -> None:
        """The head has answered."""
        asked = self._open.pop(message.request_id, None)
        if asked is not None:
            client_id, request_id, _ = asked
            data = encode_answer(message)
            size = len(data) if client_id == self._state.local_client else _PART_BYTES
            for start in range(0, len(data), size):
                part = data[start : start + size]
                more = start + size < len(data)
                reply = HeadAnswer(request_id=request_id, data=part, more=more)
                self._state.effects.append(Reply(client_id, reply))

    def outstanding(self) -> list[HeadQuestion]:
        """Questions without an answer, in order."""
        return [question for _, _, question in self._open.values()]
