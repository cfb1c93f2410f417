"""Questions of clients that the head answers, passed on by their node.

What: a question to the head with the client's number around it, and the answer with the same.
Who calls: clients send, the node machine passes on.
May touch: nothing.
Invariants: the number inside a question is the node's, the one around it the client's.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from poolray.protocol.directory import (
    ActorsFound,
    DrainNode,
    JobsFound,
    ListActorEntries,
    ListJobs,
    ListNodes,
    NodesFound,
)
from poolray.protocol.node import (
    HeadReply,
    KeyValueDelete,
    KeyValueExists,
    KeyValueGet,
    KeyValueList,
    KeyValuePut,
)

HeadQuestion: TypeAlias = (
    KeyValuePut
    | KeyValueGet
    | KeyValueDelete
    | KeyValueList
    | KeyValueExists
    | ListNodes
    | ListJobs
    | ListActorEntries
    | DrainNode
)
HeadAnswers: TypeAlias = HeadReply | NodesFound | JobsFound | ActorsFound


class AskHead(msgspec.Struct, frozen=True, array_like=True, tag=130, kw_only=True):
    """Ask the head this for me; the number inside is not looked at."""

    request_id: int
    question: HeadQuestion


class AskHeadPart(msgspec.Struct, frozen=True, array_like=True, tag=135, kw_only=True):
    """A part of a question that is too large for one packet of a worker's channel.

    The parts of a question have one number and come in order; the last has no `more`.
    """

    request_id: int
    data: bytes  #: of a `HeadQuestion`, in msgpack
    more: bool


class HeadAnswer(msgspec.Struct, frozen=True, array_like=True, tag=168, kw_only=True):
    """What the head says, or a part of it: a worker's control channel takes limited packets."""

    request_id: int
    data: bytes  #: of a `HeadAnswers`, in msgpack
    more: bool = False


encode_answer = encode_question = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(HeadQuestion).decode
_decode_answer = msgspec.msgpack.Decoder(HeadAnswers).decode


def read_answer(parts: list[HeadAnswer]) -> HeadAnswers:
    """What the head says, from all parts of it."""
    answer: HeadAnswers = _decode_answer(b"".join(part.data for part in parts))
    return answer
