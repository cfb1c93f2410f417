"""The jobs of the cluster: one per driver.

What: which drivers are there, on which node, and which have been there; all nodes are told of the
end of a job, so that nothing is kept for it.
Who calls: `head/head.py`.
May touch: nothing.
Invariants: a job runs or has ended, once; the jobs of a node end with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import msgspec

from poolray.head.state import HeadState
from poolray.ids import NodeId
from poolray.protocol.directory import JobEnded, JobRow, JobsFound, ListJobs
from poolray.protocol.node import FinishJob, RegisterJob

#: Ended jobs remembered, for the record.
_ENDED_MAX = 1_000

_TABLE = "jobs"
_decode_row = msgspec.msgpack.Decoder(JobRow).decode


@final
class Jobs:
    """The drivers of the cluster."""

    __slots__ = ("_ended", "_implied", "_running", "_state", "on_finished")

    def __init__(self, state: HeadState) -> None:
        self._state = state
        #: Told of each job that has ended.
        self.on_finished: Callable[[bytes], None] = lambda job_id: None
        self._running: dict[bytes, JobRow] = {}
        #: Of those, the ones that nobody has registered yet.
        self._implied: dict[bytes, None] = {}
        self._ended: dict[bytes, JobRow] = {}

    def restore(self, rows: Mapping[bytes, bytes]) -> None:
        """Jobs as they were in an earlier life of the head."""
        for row in map(_decode_row, rows.values()):
            (self._running if row.is_running else self._ended)[row.job_id] = row

    def register(self, message: RegisterJob) -> None:
        """A driver has come."""
        known = self._running.get(message.job_id)
        if (
            message.node_id not in self._state.members
            or (known is not None and known.job_id not in self._implied)
            or message.job_id in self._ended
        ):
            return
        self._implied.pop(message.job_id, None)
        row = self._running[message.job_id] = JobRow(
            job_id=message.job_id,
            node_id=message.node_id,
            entrypoint=message.entrypoint,
            namespace=message.namespace,
            info=message.info,
            started_s=self._state.now,
        )
        self._state.store(_TABLE, message.job_id, row)

    def imply(self, job_id: bytes, node_id: NodeId) -> bool:
        """Something belongs to a job; False: to one that has ended.

        A job that is not known is taken for one of that node until it is registered: what tells of
        it may have been lost with an earlier life of the head, and its node may die next.
        """
        if job_id in self._ended:
            return False
        if job_id not in self._running:
            self.register(RegisterJob(job_id=job_id, node_id=node_id))
            self._implied[job_id] = None
        return True

    def finish(self, message: FinishJob) -> None:
        """A driver has gone."""
        self._implied.pop(message.job_id, None)
        row = self._running.pop(message.job_id, None)
        if row is None:
            return
        ended = self._ended[row.job_id] = msgspec.structs.replace(
            row, is_running=False, ended_s=self._state.now, reason=message.reason
        )
        self._state.store(_TABLE, row.job_id, ended)
        self.on_finished(row.job_id)
        if len(self._ended) > _ENDED_MAX:
            oldest = next(iter(self._ended))
            del self._ended[oldest]
            self._state.drop(_TABLE, oldest)
        for node_id in self._state.members:
            self._state.send(node_id, JobEnded(job_id=row.job_id))

    def on_gone(self, node_id: NodeId) -> None:
        """A node is gone, and the drivers that spoke with it."""
        for job_id in [row.job_id for row in self._running.values() if row.node_id == node_id]:
            self.finish(FinishJob(job_id=job_id, reason="its node died"))

    def on_list(self, sender: NodeId, message: ListJobs) -> None:
        """Somebody wants to see the jobs."""
        rows = [*self._running.values(), *self._ended.values()]
        self._state.send(sender, JobsFound(request_id=message.request_id, jobs=rows))

    def count(self) -> int:
        """How many run."""
        return len(self._running)

    def check_invariants(self) -> None:
        """Raise AssertionError when tables do not agree."""
        assert not self._running.keys() & self._ended.keys()
        assert self._implied.keys() <= self._running.keys()
        assert all(row.node_id in self._state.members for row in self._running.values())
