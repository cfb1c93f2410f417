"""How a node leaves the cluster politely.

    Drain ──▶ nothing new from others; what waits for others goes back; objects move to their owners
                │ what runs for others has ended, or the patience is over
                ▼
              LeaveCluster: the shell stops the process after sending it

What: which work a node that is being drained still takes, and when it has nothing of others left.
Who calls: `node/node.py` with the head's word and after every event; `node/peers.py` before it
takes tasks.
May touch: nothing.
Invariants: `LeaveCluster` is sent once; the calls of actors that live here are taken to the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from poolray.actors.lifecycle import DEAD
from poolray.node.effects import SendHead, SendPeer
from poolray.node.state import NodeState
from poolray.protocol.directory import Drain, DrainAnswer, LeaveCluster
from poolray.protocol.node import TakeObjects
from poolray.tasks.lifecycle import DELAYED, QUEUED, WAITING, TaskRecord

if TYPE_CHECKING:
    from poolray.node.actors import Actors
    from poolray.node.dispatch import Dispatcher
    from poolray.node.peers import Peers
    from poolray.node.tasks import Tasks


@final
class Draining:
    """The end of a node's membership."""

    __slots__ = (
        "_deadline_s",
        "_has_left",
        "_reason",
        "_state",
        "_tasks",
        "actors",
        "dispatcher",
        "is_draining",
        "peers",
    )

    def __init__(self, state: NodeState, tasks: Tasks) -> None:
        self._state = state
        self._tasks = tasks
        self.actors: Actors
        self.dispatcher: Dispatcher
        self.peers: Peers
        self.is_draining = False
        self._reason = ""
        #: When it leaves whatever it runs; None: as late as it wants.
        self._deadline_s: float | None = None
        self._has_left = False

    def on_drain(self, message: Drain) -> None:
        """The head wants us to leave."""
        if message.only_if_idle:
            is_idle = self.is_draining or self._is_idle()
            answer = DrainAnswer(node_id=self._state.node_id, is_idle=is_idle)
            self._state.effects.append(SendHead(answer))
            if not is_idle:
                return
        if self.is_draining:
            return
        self.is_draining = True
        self._reason = message.reason
        if message.patience_s > 0:
            self._deadline_s = self._state.now + message.patience_s
            self.dispatcher.watch_time(self._deadline_s)
        for record in list(self._state.tasks.values()):
            if (
                record.is_foreign
                and not record.actor_id
                and record.state in (QUEUED, WAITING, DELAYED)
                and record.task_id == record.root_id
                and self._state.tasks.get(record.task_id) is record
            ):
                self._tasks.return_unbegun(record)
        for node_id, names in self.peers.borrowing.kept_for_peers().items():
            self._state.effects.append(SendPeer(node_id, TakeObjects(object_ids=names)))

    def _is_idle(self) -> bool:
        """Whether nothing runs here or waits for it, and nobody needs what lies here."""
        resources = self._state.resources
        return (
            resources.available == resources.total
            and not any(queue.queued_calls for queue in self._state.classes.values())
            and not self._has_work_of_others()
        )

    def look(self) -> None:
        """Something has happened, or time has passed: maybe nothing is left to wait for."""
        if self._has_left:
            return
        if self._is_overdue() or not self._has_work_of_others():
            self._has_left = True
            leave = LeaveCluster(node_id=self._state.node_id, reason=self._reason)
            self._state.effects.append(SendHead(leave))
        elif self._deadline_s is not None:
            self.dispatcher.watch_time(self._deadline_s)

    def _is_overdue(self) -> bool:
        return self._deadline_s is not None and self._state.now >= self._deadline_s

    def _has_work_of_others(self) -> bool:
        return (
            any(map(_is_of_others, self._state.tasks.values()))
            or any(
                actor.life.state is not DEAD
                and actor.host is None
                # (Who may be made again is, elsewhere, without being charged for it.)
                and (actor.unfinished or not actor.message.max_restarts)
                for actor in self.actors.actors.values()
            )
            or bool(self.peers.borrowing.kept_for_peers())
        )


def _is_of_others(record: TaskRecord) -> bool:
    return record.is_foreign
