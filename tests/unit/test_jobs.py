"""What a node's daemon does with jobs: whose workers it makes, and with what they end."""

from __future__ import annotations

from typing import Any

from poolray.cluster.jobs import Job, Jobs
from poolray.ids import GroupId, NodeId, group_of_job
from poolray.protocol.cluster import JobStarted, Output

HERE, DRIVERS, OTHER, LAST = (NodeId(bytes([i]) * 28) for i in range(4))
JOB = b"job1"
GROUP = group_of_job(JOB)
FACTS = JobStarted(job_id=JOB, group_id=GROUP, namespace="", node_id=DRIVERS)


class Host:
    """A daemon that writes down what it is asked for."""

    node_id = HERE

    def __init__(self) -> None:
        self.groups: list[GroupId] = []
        self.sent: list[tuple[NodeId, Any]] = []

    def make_group(self, job: JobStarted) -> None:
        if job.group_id not in self.groups:
            self.groups.append(job.group_id)

    def drop_group(self, group_id: GroupId) -> None:
        self.groups.remove(group_id)

    def has_detached(self, group_id: GroupId) -> bool:
        return False

    def send_peer(self, node_id: NodeId, message: Any) -> None:
        self.sent.append((node_id, message))

    def register_job(self, message: Any) -> None:
        raise AssertionError("no driver is here")


def test_a_job_ends_with_its_drivers_node_and_with_no_other() -> None:
    """Another node has told of it: one that runs tasks of the job's tasks."""
    host = Host()
    jobs = Jobs(host)
    jobs.begin(Job(FACTS, node_id=FACTS.node_id))
    jobs.on_node_died(OTHER)
    assert host.groups == [GROUP]
    jobs.on_node_died(DRIVERS)
    assert host.groups == []
    jobs.begin(Job(FACTS, node_id=FACTS.node_id))  # what comes late makes no workers
    assert host.groups == []


def test_a_job_is_told_of_once_to_each_node_and_says_where_its_driver_is() -> None:
    host = Host()
    jobs = Jobs(host)
    jobs.begin(Job(FACTS, node_id=FACTS.node_id))
    for node_id in (OTHER, OTHER, DRIVERS, LAST):
        jobs.announce(GROUP, node_id)
    assert host.sent == [(OTHER, FACTS), (LAST, FACTS)]


def test_what_workers_print_goes_to_the_drivers_node() -> None:
    host = Host()
    jobs = Jobs(host)
    jobs.begin(Job(FACTS, node_id=FACTS.node_id))
    output = Output(job_id=JOB, stream=1, label="f", pid=1, text="hello\n", address="")
    jobs.on_output(output)
    assert host.sent == [(DRIVERS, output)]


def test_a_job_that_is_known_by_its_tasks_alone_learns_where_its_driver_is() -> None:
    host = Host()
    jobs = Jobs(host)
    jobs.ensure(GROUP)
    assert host.groups == [GROUP]
    jobs.on_node_died(DRIVERS)
    assert host.groups == [GROUP]
    jobs.begin(Job(FACTS, node_id=FACTS.node_id))
    jobs.on_node_died(DRIVERS)
    assert host.groups == []
