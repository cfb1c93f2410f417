"""What a client tells its node of its handles, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from poolray import actor_calls
from poolray.client import Client
from poolray.config import Config
from poolray.ids import ActorId, ObjectId, TaskId, TaskIdSource, actor_of, handle_of
from poolray.objects.serialization import Serializer
from poolray.protocol.actors import ActorReply
from poolray.protocol.client import AddReferences, ReleaseReferences

ACTOR: ActorId = actor_of(TaskId(b"a" * 24))
HANDLE: ObjectId = handle_of(ACTOR)


class Node:
    """A link to a node that counts one client."""

    def __init__(self) -> None:
        self.held: dict[ObjectId, None] = {}
        #: What happens in the process between the node's answer and its reading.
        self.meanwhile: Callable[[], None] = lambda: None

    def enter(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def send(self, message: Any) -> None:
        if isinstance(message, AddReferences):
            self.held.update(dict.fromkeys(message.object_ids))
        elif isinstance(message, ReleaseReferences):
            for object_id in message.object_ids:
                self.held.pop(object_id, None)

    def ask(self, make: Callable[[int], Any]) -> Any:
        make(1)
        self.held[HANDLE] = None
        self.meanwhile()
        return ActorReply(request_id=1, actor_id=ACTOR, description=b"")


def made() -> tuple[Node, Client]:
    node = Node()
    source, serializer = (
        TaskIdSource(bytes(16)),
        Serializer(main_definitions={}, out_of_band_all=True),
    )
    return node, Client(node, None, Config(), source, serializer)  # type: ignore[arg-type]


def look_up(client: Client) -> Any:
    found = actor_calls.look_up_actor(client, "", "name")
    assert found is not None
    return found[2]


def test_a_handle_that_dies_while_its_actor_is_looked_up_takes_no_new_one_along() -> None:
    node, client = made()
    handles = [look_up(client)]

    def drop() -> None:
        handles.clear()
        client.sync_references()

    node.meanwhile = drop
    again = look_up(client)
    client.sync_references()
    assert HANDLE in node.held, "the process has a handle"
    del again
    client.sync_references()
    assert HANDLE not in node.held


def test_a_handle_that_died_during_a_failed_look_up_is_given_back_afterwards() -> None:
    node, client = made()
    handles = [look_up(client)]

    def drop() -> None:
        handles.clear()
        client.sync_references()
        raise TimeoutError

    node.meanwhile = drop
    try:
        look_up(client)
    except TimeoutError:
        client.sync_references()
    assert HANDLE not in node.held
