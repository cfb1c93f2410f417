"""Nonsense from those who have the token, at every port of head and nodes: nobody dies of it."""

from __future__ import annotations

import enum
import os
import random
import sys
import time
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from msgspec import inspect

import poolray
from poolray.cluster.asking import ask
from poolray.cluster.auth import Credentials, read_token
from poolray.cluster.head_daemon import HEAD_ID
from poolray.cluster.switch import OUTSIDE, Switch, split_address
from poolray.cluster_utils import Cluster
from poolray.ids import NODE_ID_BYTES
from poolray.protocol import PROTOCOL_VERSION
from poolray.protocol.client import ClientRequest
from poolray.protocol.cluster import AskWho, BulkMessage, Hello, JobStarted, News, Output, Who
from poolray.protocol.node import HeadRequest, PeerMessage
from poolray.protocol.remote import RemoteRequest
from tests.integration.support import remote_successor, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")

_encode = msgspec.msgpack.Encoder().encode
_NUMBERS = [0, 1, -1, 2, 7, 255, 4096, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]


class Nonsense:
    """Draws messages that can be decoded and mean nothing."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        #: The same few ids come again, so that messages meet.
        self._ids = [self._draw.randbytes(n) for n in (4, 16, 20, 24, 28) for _ in range(3)]

    def message(self, union: Any) -> Any:
        """One of these types."""
        return self._value(inspect.type_info(self._draw.choice(_kinds(union))), 0)

    def _value(self, kind: Any, depth: int) -> Any:
        draw = self._draw
        match kind:
            case inspect.StructType():
                given = {
                    field.name: self._value(field.type, depth + 1)
                    for field in kind.fields
                    if field.required or draw.random() < 0.7
                }
                return kind.cls(**given)
            case inspect.UnionType():
                return self._value(draw.choice(kind.types), depth)
            case inspect.IntType():
                return draw.choice(_NUMBERS)
            case inspect.FloatType():
                return draw.choice([0.0, -1.0, 1e300, 0.5, float("inf"), float("nan")])
            case inspect.BoolType():
                return draw.random() < 0.5
            case inspect.StrType():
                return draw.choice(["", "x", "/etc/passwd", "CPU", "a\0b", "é" * 9, "file:///x"])
            case inspect.BytesType():
                return draw.choice([*self._ids, b"", draw.randbytes(draw.randrange(40))])
            case inspect.NoneType():
                return None
            case inspect.EnumType():
                return draw.choice(list(typing.cast(type[enum.Enum], kind.cls)))
            case inspect.ListType() | inspect.VarTupleType() | inspect.SetType():
                count = draw.choice([0, 1, 2]) if depth < 5 else 0
                return [self._value(kind.item_type, depth + 1) for _ in range(count)]
            case inspect.TupleType():
                return tuple(self._value(item, depth + 1) for item in kind.item_types)
            case inspect.DictType():
                count = draw.choice([0, 1, 2]) if depth < 5 else 0
                return {
                    self._value(kind.key_type, depth + 1): self._value(kind.value_type, depth + 1)
                    for _ in range(count)
                }
            case inspect.AnyType() | inspect.RawType():
                return 0
            case inspect.CustomType():
                return b""
            case _:
                raise AssertionError(f"no value is known of {kind}")

    def torn(self, body: bytes) -> bytes:
        """The same with a mistake."""
        changed = bytearray(body)
        for _ in range(self._draw.randrange(1, 4)):
            if changed:
                changed[self._draw.randrange(len(changed))] = self._draw.randrange(256)
        return bytes(changed[: self._draw.randrange(len(changed) + 1)])

    def bodies(self, union: Any, count: int) -> list[bytes]:
        """Messages as they travel, one in four torn."""
        bodies = []
        for _ in range(count):
            try:
                body = _encode(self.message(union))
            except OverflowError:  # (below what can be encoded)
                continue
            bodies.append(self.torn(body) if self._draw.random() < 0.25 else body)
        return bodies


def _kinds(union: Any) -> list[Any]:
    kinds = typing.get_args(union)
    return [k for kind in kinds for k in _kinds(kind)] if kinds else [union]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        made.add_node(num_cpus=1, resources={"there": 1})
        yield made
    finally:
        made.shutdown()


def say(cluster: Cluster, own_id: bytes, peer_id: bytes, address: str, bodies: list[bytes]) -> None:
    """Say all this to a daemon, which takes it."""
    switch = Switch(
        own_id=own_id,
        session=time.time_ns(),
        credentials=Credentials.of(read_token(cluster.auth_token_path)),
        resend_after_s=0.2,
        on_message=lambda *_: None,
    )
    try:
        switch.connect(peer_id, *split_address(address))

        def is_taken() -> bool:
            switch.tick(time.monotonic())
            switch.service(time.monotonic())
            return not switch.waiting(peer_id)

        for body in bodies:
            switch.send(peer_id, body)
        wait_until(is_taken, "the daemon's acknowledgement")
    finally:
        switch.close()


def check(cluster: Cluster) -> None:
    """All daemons answer, and do what they are for."""
    credentials = Credentials.of(read_token(cluster.auth_token_path))
    assert cluster.remaining_processes_alive
    for address in (cluster.address, *(node.address for node in cluster.list_all_nodes())):
        assert ask(address, AskWho(), Who, credentials).pid
    poolray.init(address=cluster.address)
    try:
        there = remote_successor.options(resources={"there": 1})
        assert poolray.get([there.remote(1), remote_successor.remote(2)], timeout=60) == [2, 3]
    finally:
        poolray.shutdown()


HELLO = _encode(
    Hello(pid=1, protocol_version=PROTOCOL_VERSION, entrypoint="nonsense", namespace="n")
)


#: (Ten times as many, of other seeds, have been said once.)
_SEEDS = range(3)


def test_nonsense_of_a_program_outside(cluster: Cluster) -> None:
    assert cluster.head_node is not None
    node, union = cluster.head_node, ClientRequest | RemoteRequest
    for seed in _SEEDS:
        nonsense = Nonsense(seed)
        for _ in range(8):  # (who says what makes no sense is dismissed: another one comes)
            own_id = OUTSIDE + os.urandom(16)
            bodies = [HELLO, *nonsense.bodies(union, 20)]
            say(cluster, own_id, bytes.fromhex(node.node_id), node.address, bodies)
    check(cluster)


def test_nonsense_of_a_node_to_another(cluster: Cluster) -> None:
    (node,) = cluster.worker_nodes
    union = PeerMessage | BulkMessage | JobStarted | Output | News
    for seed in _SEEDS:
        stranger = os.urandom(NODE_ID_BYTES)
        bodies = Nonsense(seed).bodies(union, 200)
        say(cluster, stranger, bytes.fromhex(node.node_id), node.address, bodies)
    check(cluster)


def test_nonsense_of_a_node_to_the_head(cluster: Cluster) -> None:
    for seed in _SEEDS:
        bodies = Nonsense(seed).bodies(HeadRequest, 200)
        say(cluster, os.urandom(NODE_ID_BYTES), HEAD_ID, cluster.address, bodies)
    check(cluster)
