"""The jobs that a node's daemon knows: who their workers are, and who hears what they print.

What: makes the workers of a job when it comes, ends them with it, finds the way to its driver.
Who calls: the node's daemon.
May touch: nothing by itself.
Invariants: a job's workers are there before its first task is; they end with the job, unless a
detached actor lives among them, and then with that.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol, final

import msgspec

from poolray.cluster.sessions import Session
from poolray.ids import GroupId, NodeId, job_of_group
from poolray.protocol.cluster import JobStarted, News, Output
from poolray.protocol.node import ForwardedResults, RegisterJob

_logger = logging.getLogger(__name__)

#: Ended jobs remembered: what comes late for them makes no workers.
_ENDED_MAX = 4_096


@final
class Job(msgspec.Struct):
    """A job that has tasks here."""

    facts: JobStarted
    #: Its driver's session, if that is here; else the node where it is, if that is known. (Not the
    #: one that told of it: that may have sent a task of a task.)
    session: Any = None
    node_id: NodeId = NodeId(b"")
    #: Nodes that know of it.
    announced: dict[NodeId, None] = {}


class Host(Protocol):
    """What jobs need of the daemon."""

    node_id: NodeId

    def make_group(self, job: JobStarted) -> None:
        """Workers for a job, unless it has some."""

    def drop_group(self, group_id: GroupId) -> None:
        """The workers of a job end."""

    def has_detached(self, group_id: GroupId) -> bool:
        """Whether a detached actor lives, or is to live, among these workers."""

    def send_peer(self, node_id: NodeId, message: Any) -> None:
        """Send a message to another node's daemon."""

    def register_job(self, message: RegisterJob) -> None:
        """Tell the head of a job that it may have forgotten."""


@final
class Jobs:
    """The jobs of one node."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._jobs: dict[bytes, Job] = {}
        self._ended: dict[bytes, None] = {}

    def begin(self, job: Job) -> None:
        """A job has come to this node."""
        job_id = job.facts.job_id
        if job_id in self._ended:
            return
        known = self._jobs.get(job_id)
        if known is None:
            self._jobs[job_id] = job
        elif known.session is None and not known.node_id:
            known.facts, known.node_id = job.facts, job.node_id
        self._host.make_group(job.facts)

    def ensure(self, group_id: GroupId) -> None:
        """Tasks for these workers are coming."""
        job_id = job_of_group(group_id)
        if job_id not in self._jobs:
            # A detached actor that outlived its job, or an ended one's late task: whose result
            # nobody waits for, but somebody has to say so.
            facts = JobStarted(job_id=job_id, group_id=group_id, namespace="")
            self._jobs[job_id] = Job(facts)
        self._host.make_group(self._jobs[job_id].facts)

    def announce(self, group_id: GroupId, node_id: NodeId) -> None:
        """A peer is about to be sent tasks for these workers."""
        job = self._jobs.get(job_of_group(group_id))
        if job is not None and node_id not in job.announced and node_id != job.node_id:
            job.announced[node_id] = None
            self._host.send_peer(node_id, job.facts)

    def on_output(self, output: Output) -> None:
        """A worker of a job has printed something."""
        job = self._jobs.get(output.job_id)
        if job is not None and job.facts.log_to_driver:
            self._tell_driver(job, output)

    def on_news(self, news: News) -> None:
        """A library in a worker of a job has something for its part in the driver."""
        job = self._jobs.get(news.job_id)
        if job is not None:
            self._tell_driver(job, news)

    def _tell_driver(self, job: Job, message: Output | News) -> None:
        session: Session | None = job.session
        if session is not None:
            session.send(message)
        elif job.node_id and job.node_id != self._host.node_id:
            self._host.send_peer(job.node_id, message)

    def on_group_failed(self, group_id: GroupId) -> None:
        """A job's fork servers died one after the other: the next task tries again."""
        self._host.drop_group(group_id)

    def end(self, job_id: bytes) -> None:
        """A job's driver is gone."""
        job = self._jobs.get(job_id)
        self._ended[job_id] = None
        if len(self._ended) > _ENDED_MAX:
            del self._ended[next(iter(self._ended))]
        if job is None:
            return
        job.session, job.node_id = None, NodeId(b"")
        self._drop(job)

    def _drop(self, job: Job) -> None:
        group_id = job.facts.group_id
        if self._host.has_detached(group_id):
            return
        self._jobs.pop(job.facts.job_id, None)
        self._host.drop_group(group_id)

    def look_after_ended(self) -> None:
        """The last detached actor of a job that has ended may have gone."""
        for job_id, job in list(self._jobs.items()):
            if job_id in self._ended:
                self._drop(job)

    def on_node_died(self, node_id: NodeId) -> None:
        """Another node is dead, and with it the drivers that spoke with it."""
        for job_id, job in list(self._jobs.items()):
            job.announced.pop(node_id, None)
            if job.node_id == node_id:
                self.end(job_id)

    def register_again(self) -> None:
        """The head was started again."""
        for job in self._jobs.values():
            session: Session | None = job.session
            if session is not None and session.hello is not None:
                self._host.register_job(
                    RegisterJob(
                        job_id=job.facts.job_id,
                        node_id=self._host.node_id,
                        entrypoint=session.hello.entrypoint,
                        namespace=session.hello.namespace,
                        info={"pid": str(session.hello.pid)},
                    )
                )


def groups_in(message: Any) -> list[GroupId]:
    """Groups of workers that a message of a peer or of the head counts on."""
    if type(message) is ForwardedResults:
        return []  # (One of those that come once per call.)
    found = [task_class.group_id for task_class in getattr(message, "classes", ())]
    single = getattr(message, "task_class", None)
    if single is not None:
        found.append(single.group_id)
    creation = getattr(getattr(message, "entry", None), "creation", None) or getattr(
        message, "creation", None
    )
    if creation is not None:
        found.append(creation.task_class.group_id)
    return [group_id for group_id in dict.fromkeys(found) if group_id]
