"""What a node's machine and workers have for users, on its way to drivers.

What: output of workers to their job's driver; notices, warnings and errors that nobody has looked
at to all drivers of this node.
Who calls: the node's daemon, outside of its guard.
May touch: drivers' sessions; values on disk, through `ValueTraffic`.
Invariants: each item is handed over once, in the order in which it came.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, final

from poolray.cluster.jobs import Jobs
from poolray.cluster.sessions import Session
from poolray.cluster.value_traffic import ValueTraffic
from poolray.ids import ClientId, GroupId
from poolray.node.effects import GroupDrained, GroupFailed, Notice, UnhandledError, Warn
from poolray.protocol.cluster import Output, UserError, UserNotice
from poolray.protocol.worker import WorkerOutput

_logger = logging.getLogger(__name__)


@final
class Deliveries:
    """Hands over what is for users.

    Parameters
    ----------
    address : str
        The node's host, as drivers are shown it.
    sessions : mapping of ClientId to Session
        The node's drivers, as they come and go.
    end_group : callable
        Told of a group whose last worker has gone.
    """

    def __init__(
        self,
        address: str,
        jobs: Jobs,
        sessions: Mapping[ClientId, Session],
        traffic: ValueTraffic,
        end_group: Callable[[GroupId], None],
    ) -> None:
        self._address = address
        self._jobs = jobs
        self._sessions = sessions
        self._traffic = traffic
        self._end_group = end_group

    def hand_over(self, item: Any) -> None:
        """One thing that the node's shell has collected."""
        kind = type(item)
        if kind is WorkerOutput:
            self._jobs.on_output(
                Output(
                    job_id=item.job_id,
                    stream=item.stream,
                    text=item.text,
                    label=item.label,
                    pid=item.pid,
                    address=self._address,
                )
            )
        elif kind is GroupDrained:
            self._end_group(item.group_id)
        elif kind is GroupFailed:
            _logger.error("the workers of group %d do not start", item.group_id)
            self._jobs.on_group_failed(item.group_id)
        elif kind is Notice or kind is Warn:
            _logger.warning("%s", item.text)
            self._tell_all(UserNotice(text=item.text, is_warning=kind is Warn))
        elif kind is UnhandledError:
            if isinstance(item.value, bytes):
                self._tell_error(item.value)
            else:
                self._traffic.read(item.value, 0, item.value.size_bytes, self._tell_error)

    def _tell_error(self, data: bytes | memoryview | None) -> None:
        """Nobody has asked for the value of what failed: drivers are shown it."""
        if data is not None:
            self._tell_all(UserError(value=bytes(data)))

    def _tell_all(self, message: UserNotice | UserError) -> None:
        for session in list(self._sessions.values()):
            session.send(message)
