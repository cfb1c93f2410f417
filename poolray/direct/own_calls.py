"""Calls of poolray's own by way of the nodes: of methods that every actor has.

What: makes their classes and sends them.
Who calls: `direct/calls.py`; `local/actor_worker.py` has the methods.
May touch: the node, through the client's link.
Invariants: they wait for no call of a user's, and no user sees their errors.
"""

from __future__ import annotations

from typing import Any, final

from poolray.direct.interfaces import Owner
from poolray.ids import ActorId, ClassId, FunctionId, return_id
from poolray.objects.object_ref import make_ref
from poolray.protocol.actors import CallActor
from poolray.protocol.values import OWN_GROUP, CallKind, TaskClass, TaskSpec, identified

#: Methods that every actor has, for this alone.
LISTEN, AFTER, RESULT = "__poolray_listen__", "__poolray_after__", "__poolray_result__"


@final
class OwnCalls:
    """Such calls of one process."""

    def __init__(self, client: Owner) -> None:
        self._client = client
        #: By method and the name that users know.
        self._classes: dict[tuple[str, str], TaskClass] = {}

    def send(self, actor_id: ActorId, method: str, arguments: tuple[Any, ...]) -> None:
        """Make a call of which nobody wants a result."""
        client = self._client
        task_id = client.task_ids.next_call_id()
        spec = TaskSpec(
            task_id=task_id,
            class_id=self.class_of(method, method).class_id,
            calls=[client.inline((arguments, {}))],
        )
        client.link.submit(CallActor(actor_id=actor_id, task=spec))
        object_id = return_id(task_id, 0)
        ref = make_ref(object_id, client)
        client.counts[object_id] = 1
        # (Asked for, for if it fails with the actor, that is nothing to show to users.)
        client.link.when_ready(object_id, lambda reply: _ignore(client.read_reply(reply, ref)))

    def class_of(self, method: str, name: str) -> TaskClass:
        """A method that every actor has; under the user's name when it brings a user's result."""
        made = self._classes.get((method, name))
        if made is None:
            made = identified(
                TaskClass(
                    class_id=ClassId(b""),
                    function_id=FunctionId(b""),
                    name=name,
                    kind=CallKind.METHOD,
                    group_id=self._client.tasks_group,
                    max_retries=0,
                    method=method,
                    concurrency_group=OWN_GROUP,
                    is_listed=method == RESULT,
                )
            )
            self._client.definitions.define_class(made)
            self._classes[method, name] = made
        return made


def _ignore(answer: object) -> None:
    """Nobody wants to know."""
