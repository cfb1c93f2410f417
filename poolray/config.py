"""Configuration: every limit, size and time of poolray, with unit, default and reason.

What: one frozen `Config`; default < environment (`POOLRAY_<field>`) < argument.
Who calls: `init`, `Pool` and `Executor` make one; everything else is given it.
May touch: the environment, in `Config.load` and nowhere else.
Invariants: a value is checked when the config is made; nothing changes afterwards.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, get_type_hints

_PREFIX = "POOLRAY_"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Limits and times of one runtime.

    Raises
    ------
    ValueError
        When a value is out of its range; the message names the field.
    """

    #: CPUs that tasks may use at once; -1 means: as many as this process may run on.
    num_cpus: float = -1.0
    #: Bytes of the arena for large objects; 0 means: 30 % of the machine's memory. Sparse: pages
    #: are taken as they are first written.
    object_store_memory_bytes: int = 0
    #: Share of the arena in use beyond which objects that nobody looks at go to disk; from 1 on,
    #: they go only when there is no room for another one.
    object_spilling_threshold: float = 0.8
    #: Bytes of files that the runtime may have at once; 0 means: as much as the disk has room for.
    object_spilling_max_bytes: int = 0
    #: Objects go to one file until it has this many bytes: large writes, and few files.
    min_spilling_size_bytes: int = 100 * 1024 * 1024
    #: Threads that write and read files of objects, at the most.
    max_io_workers: int = 4
    #: After a failed write (the disk is full) the next attempt waits this long.
    spill_retry_s: float = 5.0
    #: A value larger than this travels through the arena, a smaller one inside its message. Copying
    #: 100 KiB twice costs about what one allocation and mapping does.
    inline_max_bytes: int = 100 * 1024
    #: A packet of short calls holds about this much work: short enough that one worker's queue
    #: never delays another's start noticeably, long enough to hide a wake-up.
    packet_target_s: float = 1e-3
    #: Calls in a packet at the most: bounds what a crash makes run again.
    packet_calls_max: int = 256
    #: Bytes in a packet at the most (one larger call goes alone): two packets fit a socket's
    #: default send buffer of 208 KiB.
    packet_bytes_max: int = 64 * 1024
    #: Packets on their way to one worker: one that runs and one that waits hide the round trip.
    packets_per_worker_max: int = 2
    #: Calls longer than this are never queued behind another one.
    prefetch_below_s: float = 20e-3
    #: A worker that has not answered for this long while calls wait behind the one it runs is
    #: asked to hand them back.
    nudge_after_s: float = 2e-3
    #: Results of a packet wait at the most this long for the packet's end.
    result_delay_max_s: float = 1e-3
    #: Poll without sleeping for up to this long, where recent waits were short: a sleeping core
    #: takes ten times as long to wake on virtual machines. A fifth of it while workers have use for
    #: every core. 0 switches spinning off.
    spin_s: float = 250e-6
    #: The background thread takes over this long after the last blocked caller left.
    takeover_s: float = 1e-3
    #: 1: do not show errors whose refs die before anybody looked at them.
    ignore_unhandled_errors: int = 0
    #: How often a task whose worker died is run again, unless it says so itself; also
    #: `POOLRAY_TASK_MAX_RETRIES`.
    max_retries: int = 3
    #: The second retry of a task whose workers die waits this long, each further one twice as long
    #: as the one before (the first does not wait: most deaths are not the task's fault).
    retry_delay_s: float = 0.05
    #: But never longer than this.
    retry_delay_max_s: float = 5.0
    #: Share of the machine's memory (of its container, if that has a limit) in use beyond which
    #: work is ended, before the operating system ends whatever it likes; from 1 on, none is.
    memory_usage_threshold: float = 0.95
    #: But not while so many bytes are free: 5 % of a large machine is a lot. -1: the share decides.
    min_memory_free_bytes: int = -1
    #: How often memory is looked at while something runs; 0 switches its protection off.
    memory_monitor_refresh_ms: int = 250
    #: How often a task that was ended for memory is tried again, apart from `max_retries`; -1: as
    #: long as other work of its owner ran beside it, for then the next attempt has more room.
    task_oom_retries: int = -1
    #: It waits this long first, each further time twice as long as the one before.
    task_oom_retry_delay_base_ms: int = 1000
    #: But never longer than this.
    task_oom_retry_delay_max_ms: int = 60_000
    #: When memory is short, idle workers that keep as much are stopped before any work is ended.
    idle_worker_killing_memory_threshold_bytes: int = 64 * 1024 * 1024
    #: 1: a task that uses more than its `memory=` is ended; 0: that is for scheduling only.
    enforce_memory_limits: int = 1
    #: What its worker may use beyond that: the interpreter's own, and what libraries keep.
    memory_limit_slack_bytes: int = 64 * 1024 * 1024
    #: A task that is cancelled by force and has not ended after this long, for it keeps its process
    #: from looking at signals, is killed with whatever else its worker has been given.
    force_after_s: float = 1.0
    #: A worker that has not said hello for this long is given up.
    worker_start_timeout_s: float = 60.0
    #: Workers that fail to start in a row before tasks that wait for them are failed.
    worker_start_failures_max: int = 3
    #: A polite stop is followed by SIGKILL after this long.
    stop_timeout_s: float = 5.0
    #: Workers alive at once in the group of plain tasks, blocked ones included.
    workers_max: int = 512
    #: An idle worker beyond one per CPU is stopped after this long.
    idle_worker_timeout_s: float = 10.0
    #: Tasks that wait for this long for what no node has are told of on standard error: long enough
    #: for a program that is about to cancel them.
    infeasible_notice_after_s: float = 1.0
    #: Silence after which the head declares a node dead.
    heartbeat_timeout_s: float = 5.0
    #: Interval of heartbeats and resource reports.
    heartbeat_interval_s: float = 0.5
    #: A message to a peer that is not acknowledged for this long is sent again.
    resend_after_s: float = 0.2
    #: Bytes that wait for one peer: with more, a node takes nothing from its drivers and workers
    #: until half of them have left.
    peer_backlog_max_bytes: int = 256 * 1024 * 1024
    #: A driver outside of the cluster that was cut off may come back within this long: until then
    #: its node keeps what it holds, and it waits.
    client_reconnect_grace_period_s: float = 30.0
    #: Bytes of a large object that one node asks another for at once: more of them gain little
    #: (256 MB in 4, 8 and 16 MiB: 3.0, 3.6, 3.7 GB/s), and who passes them on is later.
    transfer_chunk_bytes: int = 8 * 1024 * 1024
    #: Chunks of one object that were asked for and have not come, at the most: enough to hide the
    #: way there and back, few enough that control messages get through between them.
    transfer_window_chunks: int = 4
    #: Bytes of code, arguments and values of refs that the head keeps of one detached actor, so
    #: that it is made again when the node that made it is dead; larger ones end with that node.
    detached_actor_bytes_max: int = 64 * 1024 * 1024
    #: The same of all detached actors together.
    detached_actors_bytes_max: int = 1024 * 1024 * 1024
    #: Nodes that pull one object from one source at once: the next ones wait for who has it by
    #: then, so that a broadcast takes steps in the logarithm of its nodes.
    transfer_fanout: int = 2
    #: Nodes that one object is pulled from at once, a part from each, if so many have all of it and
    #: nothing else to do.
    transfer_sources: int = 3
    #: Threads of a node's daemon that send bytes of objects to other nodes, and as many that
    #: receive; each with any number of connections.
    transfer_threads: int = 2
    #: Calls of an actor after which later ones go straight to its process, and calls of a function,
    #: one at a time, after which a worker of a cluster is kept for them; 0: all go by way of the
    #: nodes.
    direct_calls_after: int = 16
    #: Bytes of a file with what a worker of a cluster prints, one for each of its two streams: the
    #: older half of a longer one goes. 0: there are no such files.
    worker_log_max_bytes: int = 16 * 1024 * 1024
    #: Bytes of all these files of a node: those of workers that ended first go first.
    worker_logs_total_max_bytes: int = 1024 * 1024 * 1024
    #: Files of workers that have ended, at the most.
    worker_logs_ended_max: int = 1000
    #: Ended tasks that are remembered, for `poolray.util.state` and `poolray.timeline`; 0: none.
    task_history_max: int = 10_000
    #: Transitions kept per failed task for its error message.
    history_max: int = 16
    #: Whether refs may be pickled outside of poolray (their objects are then kept for good).
    allow_out_of_band_object_ref_serialization: int = 1
    #: 1: remember where each ref was made, for `poolray memory`; costs some microseconds per call.
    record_ref_creation_sites: int = 0
    #: A function, or a function among the arguments of a task, that is larger than this by what it
    #: captures earns a warning.
    function_warn_bytes: int = 1024 * 1024
    #: The same larger than this is an error.
    function_max_bytes: int = 100 * 1024 * 1024
    #: 0: leave `print` alone while `poolray.experimental.tqdm_ray` shows bars; what is printed then
    #: tears them.
    tqdm_patch_print: int = 1
    #: Unread items and results that `imap` keeps at the most.
    imap_window_items: int = 4096
    #: Bytes of unread items and results that `imap` keeps at the most.
    imap_window_bytes: int = 64 * 1024 * 1024

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            minimum = _MINIMUM.get(field.name, 0)
            if not value >= minimum or value in (float("inf"), float("-inf")):
                raise ValueError(f"{field.name} is {value!r}: it must be at least {minimum}")

    @classmethod
    def load(cls, environment: Mapping[str, str] | None = None, **arguments: Any) -> Config:
        """A config from defaults, then `POOLRAY_*` variables, then arguments that are not None.

        Parameters
        ----------
        environment : mapping of str to str, default `os.environ`
            Where `POOLRAY_<field>` is looked up.
        **arguments
            Fields by name; None leaves a field as it is.

        Raises
        ------
        ValueError
            A variable does not parse or a value is out of range.
        TypeError
            An argument names no field.
        """
        variables = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        kinds = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            text = None
            for name in (field.name, _ALIASES.get(field.name, field.name)):
                for spelling in (name, name.upper()):
                    if text is None:
                        text = variables.get(_PREFIX + spelling)
            if text is not None:
                values[field.name] = _parse(field.name, text, kinds[field.name])
        values.update((name, value) for name, value in arguments.items() if value is not None)
        return cls(**values)


#: Fields that the reference's programs know by another name.
_ALIASES = {
    "max_retries": "task_max_retries",
    "client_reconnect_grace_period_s": "client_reconnect_grace_period",
}

_MINIMUM = {
    "num_cpus": -1,
    "packet_calls_max": 1,
    "packet_bytes_max": 1,
    "packets_per_worker_max": 1,
    "inline_max_bytes": 1,
    "max_retries": -1,
    "min_memory_free_bytes": -1,
    "task_oom_retries": -1,
    "workers_max": 1,
    "min_spilling_size_bytes": 1,
    "transfer_chunk_bytes": 1,
    "transfer_window_chunks": 1,
    "transfer_fanout": 1,
    "transfer_sources": 1,
    "transfer_threads": 1,
    "max_io_workers": 1,
    "imap_window_items": 1,
    "imap_window_bytes": 1,
    "worker_start_failures_max": 1,
}


_KINDS = {int: "a whole number", float: "a number"}


def _parse(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(
            f"environment variable {_PREFIX}{name} is {text!r}: it must be {_KINDS[kind]}"
        ) from None
