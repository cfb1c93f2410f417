"""The node's daemon: a Node machine with workers, drivers on its machine, peers and a head.

    drivers ══Unix sockets══▶ DriverSession ─┐                   ┌─▶ workers (`local/workers.py`)
    peers   ══ZeroMQ, CURVE══▶ Switch ───────┼─▶ NodeShell, Node ┼─▶ Switch ══▶ peers, head
    head    ══ZeroMQ, CURVE══▶   "   ────────┘                   └─▶ DriverSession ══▶ drivers

What: carries messages to and from one Node machine, keeps the workers of each job apart.
Who calls: `poolray start` starts it as a process of its own.
May touch: processes, sockets, the clock, files.
Invariants: one thread does everything; the workers of a job run nobody else's tasks and end with
it; when this process ends, however it does, its workers end at once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import time
from collections import deque
from typing import Any, final

import msgspec

from poolray.cluster import daemon, places
from poolray.cluster.auth import Credentials
from poolray.cluster.bulk import Bulk
from poolray.cluster.deliveries import Deliveries
from poolray.cluster.head_daemon import HEAD_ID
from poolray.cluster.jobs import Job, Jobs, groups_in
from poolray.cluster.node_answers import answer, facts
from poolray.cluster.options import NodeOptions, Ready
from poolray.cluster.pressure import Pressure
from poolray.cluster.remote_sessions import RemoteReception
from poolray.cluster.sessions import DriverSession, Reception, Session
from poolray.cluster.storage_threads import StorageThreads
from poolray.cluster.switch import OUTSIDE, Switch, split_address
from poolray.cluster.transfer import ChunkStore
from poolray.cluster.value_traffic import ValueTraffic
from poolray.cluster.worker_logs import WorkerLogs
from poolray.config import Config
from poolray.exceptions import InternalError
from poolray.ids import (
    ClientId,
    GroupId,
    NodeId,
    WorkerId,
    group_of_job,
    is_actor_call,
    job_of_group,
)
from poolray.local import process_state
from poolray.local.fork_server import WorkerSetup
from poolray.local.machine import Wishes, describe
from poolray.local.node_shell import SHELL, NodeShell, store_bytes
from poolray.local.reactor import Waitable
from poolray.local.workers import WorkerHost
from poolray.node.effects import (
    LookIntoLogs,
    Reply,
    SendHead,
    SendPeer,
)
from poolray.node.peers import absorb
from poolray.node.workers import GroupState
from poolray.protocol.client import RangeGranted
from poolray.protocol.cluster import (
    Answer,
    BulkPort,
    CloseBulk,
    DaemonMessage,
    Hello,
    JobStarted,
    News,
    OpenBulk,
    Output,
    Question,
    Welcome,
)
from poolray.protocol.directory import JobEnded, LeaveCluster
from poolray.protocol.node import (
    ClientLeft,
    ClusterView,
    FinishJob,
    ForwardedResults,
    ForwardTasks,
    HeadBack,
    HeadMessage,
    HeadRequest,
    Heartbeat,
    NodeDied,
    NodeView,
    PeerMessage,
    Refused,
    RegisterJob,
    RegisterNode,
)
from poolray.protocol.worker import WorkerExited, WorkerNews, WorkerOutput

_logger = logging.getLogger(__name__)

_DAEMON = ClientId(b"daemon")
#: The head has been silent for this long: whoever started it has forgotten us.
_HEAD_SILENCE_MAX_S = 60.0
#: A drained node waits so long for others to have what it told them.
_FAREWELL_S = 5.0
#: Threads that speak with storage elsewhere for peers and drivers, at the most.
_STORAGE_THREADS_MAX = 8


@final
class NodeDaemon(NodeShell):
    """One node of a cluster."""

    def __init__(self, options: NodeOptions) -> None:
        config = Config.load(None, **options.config)
        machine = describe(
            config,
            Wishes(
                num_gpus=options.num_gpus,
                memory_bytes=options.memory_bytes,
                resources=options.resources,
                labels=options.labels,
            ),
            store_bytes(config),
            options.host,
            options.is_head,
        )
        super().__init__(
            config, machine, options.spill_directories, _DAEMON, bytes(4), has_head=True
        )
        self.reactor.is_always_led = True
        self._options = options
        self.jobs = Jobs(self)
        self._sessions: dict[ClientId, Session] = {}
        self._addresses: dict[NodeId, tuple[str, int]] = {}
        #: Living nodes as the head told of them last, this one among them.
        self._views: dict[NodeId, NodeView] = {}
        #: Peer -> tasks or results for it that others of the same turn may join.
        self._open: dict[NodeId, PeerMessage] = {}
        #: What threads that read and write files have to tell; they append.
        self._spill_news: deque[Any] = deque()
        self._stop = Waitable()
        #: The head counts this node; or it does not and has said why, or this node ends.
        self.answered, self.refusal = Waitable(), ""
        self.is_rejoining = False
        #: It ends: peers hear of that from the head, and nothing more from here. What this end
        #: does to its workers would be taken for what their tasks and actors came to.
        self._is_mute = False
        #: It was drained: its last word to the head, and when that is said at the latest.
        self._farewell: tuple[LeaveCluster, float] | None = None
        #: group -> fork servers in a row that died before a worker came of them.
        self._server_failures: dict[GroupId, int] = {}
        #: The switch has something to send, or may have something to read …
        self.is_switch_due = True
        #: … anywhere: now and then all is looked at.
        self._looks_everywhere = True
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode_peer = msgspec.msgpack.Decoder(PeerMessage | DaemonMessage).decode
        self._decode_request = msgspec.msgpack.Decoder(HeadRequest).decode
        self._decode_head = msgspec.msgpack.Decoder(HeadMessage).decode
        self._chunks = ChunkStore(self.arena, self._path_of)
        self._switch = Switch(
            own_id=self.node_id,
            session=time.time_ns(),
            credentials=Credentials.of(options.token) if options.token else None,
            resend_after_s=config.resend_after_s,
            on_message=self._on_message,
            crowd_bytes=config.peer_backlog_max_bytes,
        )
        self._pressure = Pressure(self._switch, self.reactor, self._sources)
        self._switch.answer = self._answer_question
        self._switch.on_restarted = self._on_restarted
        self._switch.on_refused = self._on_refused
        self._switch.on_given_up = self._on_given_up
        self._switch.on_socket = self._watch_socket
        self._switch.on_socket_closed = self._unwatch_socket
        self._storage = StorageThreads(_STORAGE_THREADS_MAX, self.reactor.wake)
        self._outside = RemoteReception(
            self, self._switch, config.client_reconnect_grace_period_s, self._storage
        )
        self._channels: dict[int, daemon.Polled] = {}
        port = self._switch.listen(options.host, options.port)
        self.address = f"{options.host}:{port}"
        self._bulk = Bulk(
            host=options.host,
            port=options.bulk_port,
            machine=places.machine_id(),
            arena=self.arena,
            chunks=self._chunks,
            threads=config.transfer_threads,
            host_of=lambda node_id: self._addresses.get(node_id, ("", 0))[0],
            tell=self.send_peer,
            wake=self.reactor.wake,
        )
        self._traffic = ValueTraffic(
            bulk=self._bulk,
            chunks=self._chunks,
            send_peer=self.send_peer,
            send_head=self._send_head,
            in_thread=self._spill_threads.start,
            storage=self._storage,
        )
        self._act.update(self._traffic.acts)
        self._logs = WorkerLogs(options.session_folder, config, options.worker_logs)
        self._users = Deliveries(
            options.host, self.jobs, self._sessions, self._traffic, self._end_group
        )
        self._reception = Reception(
            self, places.socket_name("node", options.temp_dir, options.head_address)
        )
        self._owner = (
            daemon.Owner(options.owner_pid, self.reactor, self.stop) if options.owner_pid else None
        )
        process_state.on_fork_in_child(self._abandon)
        self._switch.connect(HEAD_ID, *split_address(options.head_address))
        self._head_heard_s = time.monotonic()
        self._register()

    def ready(self) -> Ready:
        """What to tell who started us."""
        return Ready(
            pid=os.getpid(),
            address=self.address,
            socket_name=self._reception.name,
            node_id=self.node_id.hex(),
        )

    def kept_logs(self) -> list[str]:
        """Names of files of its workers that stay when this daemon ends."""
        return self._logs.kept()

    # ---- life ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until stopped."""
        _logger.info("node=%s listens at %s", self.node_id.hex()[:12], self.address)
        self.reactor.wait(self._stop, None)
        self._shut_down()
        _logger.info("node=%s has ended", self.node_id.hex()[:12])

    def stop(self) -> None:
        """End; safe in a signal handler."""
        self._stop.finish()
        self.answered.finish()
        self.reactor.wake()

    @property
    def is_stopped(self) -> bool:
        """Whether it ends, or has ended."""
        return self._stop.done

    def _shut_down(self) -> None:
        if not self.is_rejoining:
            self._send_head(LeaveCluster(node_id=self.node_id, reason="it was stopped"))
        reason = "its node has left the cluster" if self.is_rejoining else "the cluster was stopped"
        self._reception.close()
        for session in list(self._sessions.values()):
            session.dismiss(reason)
        self._storage.stop()
        self._is_mute = True
        self._end_groups()
        self._closed = True
        self.reactor.stop()
        self._spill_threads.stop()
        self._bulk.close()
        now = time.monotonic()
        self._switch.service(now)
        self._switch.close(linger_s=0.2)
        self._close_shell()

    def _abandon(self) -> None:
        """In a forked child (a fork server): let go of what is the daemon's."""
        self._abandon_shell()
        self._bulk.abandon()
        self._switch.abandon()
        daemon.close_network_sockets()

    def _end_groups(self) -> None:
        for handle in list(self._groups.values()):
            self.terminate_group(handle)
        deadline = time.monotonic() + self.config.stop_timeout_s
        for handle in list(self._groups.values()):
            self.reactor.wait(handle, max(0.0, deadline - time.monotonic()))
            self._end_group(handle.group_id)

    # ---- the reactor's side ----------------------------------------------------------------------

    def watch(self, channel: socket.socket, owner: Any) -> None:
        """Call the owner's `answer` when the channel can be read."""
        self.reactor.watch_other(channel, owner)

    def unwatch(self, channel: socket.socket) -> None:
        """Do not, any more."""
        self.reactor.unwatch_other(channel)

    def _watch_socket(self, descriptor: int) -> None:
        channel = self._channels[descriptor] = daemon.Polled(descriptor, self.on_socket_news)
        self.reactor.watch_other(channel, channel)  # type: ignore[arg-type]
        self.is_switch_due = True

    def _unwatch_socket(self, descriptor: int) -> None:
        channel = self._channels.pop(descriptor, None)
        if channel is not None:
            self.reactor.unwatch_other(channel)  # type: ignore[arg-type]

    def on_server_news(self, host: Any) -> None:
        """A channel has something: a fork server's, a driver's, or the network's."""
        if isinstance(host, (DriverSession, Reception, daemon.Polled, daemon.Owner)):
            host.answer()
        else:
            super().on_server_news(host)

    def on_packet(self, host: Any, packet: bytes) -> bool:
        """A worker's report."""
        try:
            return super().on_packet(host, packet)
        except InternalError:
            # A report that came too late, or a bug: one job may suffer, the others must not.
            _logger.exception("a worker's report cannot be taken")
            return bool(self._collected)

    def on_all_read(self) -> None:
        """Calls of workers."""
        try:
            super().on_all_read()
        except InternalError:
            _logger.exception("a worker's calls cannot be taken")

    def _take_output(self, message: WorkerOutput) -> None:
        # (Its worker has not reported the end of the attempt that printed it.)
        record = self.node.state.tasks.get(message.task_id)
        if record is not None and not record.actor_id:
            self._logs.note(message, record.task_id, record.attempts)
        elif record is None and message.task_id and not is_actor_call(message.task_id):
            self._logs.note(message, message.task_id, 0)  # of a call of a worker on loan
        for text in self._logs.in_order(message):
            super()._take_output(text)

    def _take_news(self, host: WorkerHost, message: WorkerNews) -> None:
        """Pass them on at once: on every link they stay before the results that follow them."""
        job_id, address = job_of_group(host.group_id), self._options.host
        news = News(job_id=job_id, topic=message.topic, data=message.data, address=address)
        self.jobs.on_news(news)

    def on_socket_news(self, descriptor: int) -> None:
        """A socket of the network may have something: `settle` looks."""
        self._switch.note_readable(descriptor)
        self.is_switch_due = True

    def is_unsettled(self) -> bool:
        """Whether something waits to be read or handed over."""
        return bool(
            self.is_switch_due
            or self._deliveries
            or self._bulk.has_news
            or self._spill_news
            or self._storage.has_news
        )

    def settle(self) -> None:
        """Read the network; hand over what is for users."""
        if self.is_switch_due:
            self.is_switch_due = False
            if self._open:
                self._close_messages()
            more = self._switch.service(time.monotonic(), self._looks_everywhere)
            self._looks_everywhere = False
            self.is_switch_due = more or self.is_switch_due
            if self._switch.crowded or self._pressure.is_on:
                self._pressure.look(time.monotonic())
        if self._spill_news or self._bulk.has_news:
            self._take_threads_news()
        self._storage.settle()
        if self._outside.flush():
            self.is_switch_due = True
        while self._deliveries:
            self._users.hand_over(self._deliveries.popleft())
        if self._farewell is not None:
            self._leave_when_heard()

    def _sources(self) -> list[socket.socket]:
        """Where drivers and workers of this node write."""
        drivers = [s.channel for s in self._sessions.values() if isinstance(s, DriverSession)]
        return [*drivers, *(host.reports for host in self._hosts.values())]

    def _on_spill_news(self, message: Any) -> None:
        """A thread has written or read a file: what follows is done on the daemon's own."""
        self._spill_news.append(message)
        self.reactor.wake()

    def _take_threads_news(self) -> None:
        """Files and chunks that threads are done with."""
        told, instead = self._bulk.settle()
        for effect in instead:
            self._traffic.send_by_link(effect)
        with self.guard:
            while self._spill_news:
                self.feed(SHELL, self._spill_news.popleft())
            for message in told:
                self.feed(SHELL, message)

    def next_timeout(self) -> float | None:
        """Seconds until `tick` is due."""
        timeout = super().next_timeout()
        deadline = self._switch.next_deadline()
        opening = self._bulk.next_deadline()
        if opening is not None:
            deadline = opening if deadline is None else min(deadline, opening)
        if self._farewell is not None:
            leave_s = self._farewell[1]
            deadline = leave_s if deadline is None else min(deadline, leave_s)
        if deadline is None:
            return timeout
        left = deadline - time.monotonic()
        return left if timeout is None else min(timeout, left)

    def _has_unsent(self) -> bool:
        return super()._has_unsent() or any(session.waits for session in self._sessions.values())

    def tick(self) -> None:
        """Time has passed."""
        for session in list(self._sessions.values()):
            session.flush()
        now = time.monotonic()
        self._switch.tick(now)
        for effect in self._bulk.tick(now):
            self._traffic.send_by_link(effect)
        self._outside.tick(now)
        self._reception.tick()
        self.is_switch_due = self._looks_everywhere = True
        self._logs.tick(now, self._hosts.values())
        if not self._pressure.is_on:  # (else workers wait with what they have to tell)
            self._deliveries.extend(self._logs.strays(now, self._hosts.values(), self._running))
        super().tick()
        heard = self._switch.heard_s(HEAD_ID)
        if now - max(heard, self._head_heard_s) > _HEAD_SILENCE_MAX_S:
            _logger.error("the head has been silent for %.0f s: this node ends", now - heard)
            self.stop()

    # ---- effects ---------------------------------------------------------------------------------

    def _act_reply(self, effect: Reply) -> None:
        session = self._sessions.get(effect.client_id)
        if session is None:
            super()._act_reply(effect)
            return
        message = effect.message
        if type(message) is RangeGranted and message.offset < 0:
            message = self._with_path(message)
        session.send(message)

    def _act_look_into_logs(self, effect: LookIntoLogs) -> None:
        self._echoes.append(self._logs.look(effect))

    def _act_send_head(self, effect: SendHead) -> None:
        if isinstance(effect.message, LeaveCluster):  # it was drained
            self._farewell = effect.message, time.monotonic() + _FAREWELL_S
        else:
            self._send_head(effect.message)

    def _leave_when_heard(self) -> None:
        """Go, once others have what we told them last: else they might hear of our end before our
        results, by way of the head, and take these for lost.
        """
        if self._farewell is None or self._stop.done:
            return
        message, deadline_s = self._farewell
        unheard = any(self._switch.waiting(node_id) for node_id in self._addresses)
        if not unheard or time.monotonic() >= deadline_s:
            self._send_head(message)
            self.stop()

    def _send_head(self, message: Any) -> None:
        self._switch.send(HEAD_ID, self._encode(message))
        self.is_switch_due = True

    def _act_send_peer(self, effect: SendPeer) -> None:
        for group_id in groups_in(effect.message):
            self.jobs.announce(group_id, effect.node_id)
        self.send_peer(effect.node_id, effect.message)

    def send_peer(self, node_id: NodeId, message: Any) -> None:
        """Send a message to another node's daemon."""
        if self._is_mute:
            return
        if not self._switch.is_reachable(node_id):
            address = self._addresses.get(node_id)
            if address is None:
                _logger.warning("node=%s is nowhere", node_id.hex()[:12])
                return
            self._switch.connect(node_id, *address)
        self.is_switch_due = True
        open_message = self._open.get(node_id)
        if open_message is not None:
            if absorb(open_message, message):
                return
            del self._open[node_id]
            self._switch.send(node_id, self._encode(open_message))
        if type(message) in (ForwardTasks, ForwardedResults):
            self._open[node_id] = message
        else:
            self._switch.send(node_id, self._encode(message))

    def _close_messages(self) -> None:
        """Nothing more is added to messages of this turn."""
        with self.guard.lock:
            opened, self._open = self._open, {}
        for node_id, message in opened.items():
            self._switch.send(node_id, self._encode(message))

    def _path_of(self, file_number: int) -> str:
        granted = RangeGranted(request_id=0, offset=-1, file_number=file_number)
        named = self._with_path(granted)
        if named.refusal:
            raise OSError(named.refusal)
        return named.path

    # ---- drivers ---------------------------------------------------------------------------------

    def holds_file(self, path: str) -> bool:
        """Whether a file is one of this node's values."""
        return self._folders.holds(path)

    def serve_switch(self) -> None:
        """The switch was given something to send."""
        self.is_switch_due = True

    def arena_descriptor(self) -> int:
        """What drivers map."""
        return self.arena.descriptor

    def welcome(self, session: Session, hello: Hello) -> Welcome:
        """A driver has signed on: its job begins."""
        job_id = os.urandom(4)
        group_id = group_of_job(job_id)
        session.job_id = job_id
        self._sessions[session.client_id] = session
        self.node.state.pids[session.client_id] = hello.pid
        job = JobStarted(
            job_id=job_id,
            group_id=group_id,
            namespace=hello.namespace,
            log_to_driver=hello.log_to_driver,
            node_id=self.node_id,
        )
        self.jobs.begin(Job(job, session=session))
        self._send_head(
            RegisterJob(
                job_id=job_id,
                node_id=self.node_id,
                entrypoint=hello.entrypoint,
                namespace=hello.namespace,
                info={"pid": str(hello.pid)},
            )
        )
        _logger.info("job=%s begins: pid %d, %s", job_id.hex(), hello.pid, hello.entrypoint)
        return Welcome(
            node_id=self.node_id,
            job_id=job_id,
            group_id=group_id,
            client_id=session.client_id,
            arena_bytes=self.arena.capacity_bytes,
            config=dataclasses.asdict(self.config),
            labels=dict(self.node.state.labels),
            head_address=self._options.head_address,
            node_address=self._options.host,
            session_folder=self._options.session_folder,
            direct_ports=self._options.worker_ports,
        )

    def on_request(self, session: Session, message: Any) -> None:
        """A driver wants something."""
        try:
            with self.guard:
                self.feed(session.client_id, message)
        except InternalError:
            _logger.exception("a driver's request cannot be taken")

    def on_left(self, session: Session) -> None:
        """A driver is gone: what it held is let go, and its job ends everywhere."""
        self._sessions.pop(session.client_id, None)
        self.node.state.pids.pop(session.client_id, None)
        _logger.info("job=%s ends", session.job_id.hex())
        with self.guard:
            self.feed(SHELL, ClientLeft(client_id=session.client_id))
        self._send_head(FinishJob(job_id=session.job_id))
        self.jobs.end(session.job_id)

    def make_group(self, job: JobStarted) -> None:
        """Workers for a job, unless it has some."""
        if job.group_id in self._groups or self._closed:
            return
        setup = WorkerSetup(
            config=self.config,
            namespace=job.namespace,
            job_id=job.job_id,
            forward_output=True,
            label_output=True,
            log_folder=self._logs.worker_folder,
            tasks_group=job.group_id,
            head_address=self._options.head_address,
            machine=places.machine_id(),
            direct_host=self._options.host,
            direct_ports=self._options.worker_ports,
        )
        self.create_group(
            size=0, start_now=False, setup=setup, out_of_band_all=True, group_id=job.group_id
        )

    def drop_group(self, group_id: GroupId) -> None:
        """The workers of a job end."""
        handle = self._groups.get(group_id)
        if handle is not None:
            self.terminate_group(handle)

    def _replace_server(self, host: WorkerHost) -> bool:
        """A job's fork server has nothing that a new one would not have."""
        group_id = host.group_id
        group, handle = self.node.state.groups.get(group_id), self._groups.get(group_id)
        if handle is None or group is None or group.state is not GroupState.OPEN or self._closed:
            return False
        failures = 0 if host.has_served else self._server_failures.get(group_id, 0) + 1
        self._server_failures[group_id] = failures
        if failures >= self.config.worker_start_failures_max:
            return False  # it would die again
        try:
            fresh = WorkerHost(group_id, self.arena, host.setup, host.start_method, None)
        except OSError:
            _logger.exception("no fork server can be made")
            return False
        _logger.warning("a fork server was killed, pid %d; another one is made", host.server_pid)
        with self.guard:
            handle.host = self._hosts[group_id] = fresh
            self.reactor.watch(fresh)
        return True

    def _end_group(self, group_id: GroupId) -> None:
        self._server_failures.pop(group_id, None)
        host = self._hosts.get(group_id)
        left = [] if host is None else [(host.setup, *w, self._running(w[0])) for w in host.pids()]
        super()._end_group(group_id)
        for worker in left:
            self._deliveries.extend(self._logs.end(*worker))

    def has_detached(self, group_id: GroupId) -> bool:
        """Whether a detached actor lives, or is to live, among these workers."""
        return self.node.has_detached(group_id)

    def _lose_worker(
        self,
        host: WorkerHost,
        worker_id: WorkerId,
        message: WorkerExited | None,
        *,
        with_server: bool = False,
    ) -> None:
        handle, name = host.workers.get(worker_id), self._running(worker_id)
        super()._lose_worker(host, worker_id, message, with_server=with_server)
        if handle is not None:
            pid = message.pid if message is not None else 0
            left = self._logs.end(host.setup, worker_id, handle.pid or pid, name)
            self._deliveries.extend(left)

    def _running(self, worker_id: WorkerId) -> str:
        """The name of the task or actor in a worker."""
        worker = self.node.state.workers.get(worker_id)
        if worker is None or worker.runs is None:
            return ""
        name = worker.runs.task_class.name
        return name.partition(".")[0] if worker.is_actor else name

    def _on_worker_exited(self, host: WorkerHost, message: WorkerExited) -> None:
        super()._on_worker_exited(host, message)
        self.jobs.look_after_ended()

    # ---- peers and the head ----------------------------------------------------------------------

    def _register(self) -> None:
        with self.guard:
            self.node.address = self.address
            self.node.info = facts(self._options, self.address, self._reception.name)
            message = self.node.register()
        self._send_head(message)

    def _on_restarted(self, peer: bytes, lost: list[bytes]) -> None:
        if peer.startswith(OUTSIDE):
            self._outside.on_restarted(peer)
        if peer != HEAD_ID:
            return
        _logger.warning("the head was started again; %d message(s) go to it again", len(lost))
        with self.guard:
            self.feed(SHELL, HeadBack())  # it registers, and asks again what was not answered
        self.jobs.register_again()
        for payload in lost:
            try:
                message = self._decode_request(payload)
            except msgspec.MsgspecError:
                continue  # its first part had arrived before
            if not isinstance(message, (RegisterNode, Heartbeat)):
                self._send_head(message)

    def _on_refused(self, peer: bytes, reason: str) -> None:
        _logger.error("peer=%s refuses us: %s", peer.hex()[:12], reason)
        if peer == HEAD_ID:
            self.stop()

    def _on_given_up(self, peer: bytes) -> None:
        """The head sees a node that we do not reach, and our memory is not to fill up with what
        waits for it. Which of us is at fault nobody can tell; whoever takes us for dead tries again
        elsewhere, and does nothing twice.
        """
        if peer == HEAD_ID or peer.startswith(OUTSIDE):
            return  # these are given up by the clock
        _logger.error(
            "node=%s has not been reached for so long that too much waits for it: this node ends, "
            "and joins again as a new one. Look at the network between them.",
            peer.hex()[:12],
        )
        self.is_rejoining = True
        self.stop()

    def register_job(self, message: RegisterJob) -> None:
        """Tell the head of a job that it may have forgotten."""
        self._send_head(message)

    def _on_message(self, peer: bytes, payload: bytes) -> None:
        if peer == HEAD_ID:
            self._on_head(self._decode_head(payload))
            return
        if peer.startswith(OUTSIDE):
            self._outside.on_message(peer, payload)
            return
        message = self._decode_peer(payload)
        if isinstance(message, JobStarted):
            self.jobs.begin(Job(message, node_id=message.node_id))
        elif isinstance(message, Output):
            self.jobs.on_output(message)
        elif isinstance(message, News):
            self.jobs.on_news(message)
        elif isinstance(message, (OpenBulk, BulkPort, CloseBulk)):
            for effect in self._bulk.on_message(NodeId(peer), message):
                self._traffic.send_by_link(effect)
        else:
            self._feed_remote(peer, message)

    def _on_head(self, message: HeadMessage) -> None:
        if isinstance(message, ClusterView):
            for view in message.nodes:
                self._views[view.node_id] = view
                if view.address and view.node_id != self.node_id:
                    self._addresses[view.node_id] = split_address(view.address)
            self.answered.finish()
        elif isinstance(message, Refused):
            if self._stop.done:
                return  # it has heard that we leave
            _logger.error("the head refuses this node: %s", message.reason)
            self.is_rejoining, self.refusal = message.is_dead, message.reason
            self.stop()
            return
        self._feed_remote(HEAD_ID, message)
        if isinstance(message, NodeDied):
            _logger.warning("node=%s %s", message.node_id.hex()[:12], message.reason)
            self._open.pop(message.node_id, None)
            self._switch.forget(message.node_id)
            self._bulk.forget_peer(message.node_id)
            self._addresses.pop(message.node_id, None)
            self._views.pop(message.node_id, None)
            self.jobs.on_node_died(message.node_id)
        elif isinstance(message, JobEnded):
            self.jobs.end(message.job_id)

    def _feed_remote(self, peer: bytes, message: Any) -> None:
        for group_id in groups_in(message):
            self.jobs.ensure(group_id)
        try:
            with self.guard:
                self.feed(peer, message)
        except InternalError as error:
            _logger.warning("%s of %s: %s", type(message).__name__, peer.hex()[:12], error)
        except Exception:
            # A message that makes no sense, or a bug of ours: all others go on.
            _logger.exception("%s of %s cannot be taken", type(message).__name__, peer.hex()[:12])

    def _answer_question(self, question: Question) -> Answer:
        return answer(question, self.node_id, self._options.session_folder, self._views.values())
