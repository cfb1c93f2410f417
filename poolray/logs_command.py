"""`poolray logs`: which files of logs a cluster's nodes have, and what is in them.

What: attaches to the cluster as a program does, and prints what `poolray.util.state` reads.
Who calls: the command line.
May touch: the cluster's daemons, standard streams.
Invariants: names and flags are those of the reference's; with `--follow` it ends with who writes,
or with Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from poolray.exceptions import PoolrayError

_LINES = 1000
_WHAT = ("cluster", "actor", "worker", "task")


def add_logs(commands: Any) -> None:
    """Put `logs` among the commands."""
    logs = commands.add_parser(
        "logs",
        help="files of logs of a cluster, and what actors, tasks and workers print",
        description="List the files of logs of a node of a cluster, or print one. "
        "`poolray logs NAME` is short for `poolray logs cluster NAME`.",
    )
    kinds = logs.add_subparsers(required=True, metavar="what")
    cluster = kinds.add_parser(
        "cluster",
        help="files of a node (default: of the head's), by their names",
        description="List the files whose names match; print it if there is only one.",
    )
    cluster.set_defaults(run=_cluster)
    cluster.add_argument("glob_filter", nargs="?", default="*", help="as in a shell (default: *)")
    cluster.add_argument("--encoding", default="utf-8", help="of the file (default: utf-8)")
    cluster.add_argument(
        "--encoding-errors", default="strict", help="what to do with other bytes (default: strict)"
    )
    actor = kinds.add_parser("actor", help="what an actor has printed")
    actor.set_defaults(run=_actor)
    actor.add_argument("--id", "-a", metavar="HEX", help="the actor's")
    actor.add_argument("--pid", "-pid", type=int, help="of its process")
    worker = kinds.add_parser("worker", help="what a worker has printed")
    worker.set_defaults(run=_worker)
    worker.add_argument("--pid", "-pid", type=int, required=True, help="of its process")
    task = kinds.add_parser("task", help="what a task has printed")
    task.set_defaults(run=_task)
    task.add_argument("--id", required=True, metavar="HEX", help="the task's")
    task.add_argument("--attempt-number", "-a", type=int, default=0, metavar="N", help="from 0 on")
    for parser in (actor, worker, task):
        parser.add_argument(
            "--err", action="store_true", help="standard error (default: standard output)"
        )
    for parser in (cluster, actor, worker, task):
        add = parser.add_argument
        add("--node-id", "-id", metavar="HEX", help="the node")
        add("--node-ip", "-ip", metavar="HOST", help="the same by its host")
        add("--follow", "-f", action="store_true", help="go on with what is written meanwhile")
        add(
            "--tail",
            type=int,
            default=_LINES,
            metavar="N",
            help=f"last lines; -1: all (default: {_LINES})",
        )
        add("--interval", type=float, metavar="S", help="seconds between looks with --follow")
        add("--timeout", type=int, default=30, metavar="S", help="seconds that a node may take")
        add(
            "--address",
            help="HOST:PORT, or poolray://HOST:PORT from outside (default: POOLRAY_ADDRESS, then "
            "the cluster of this machine)",
        )


def with_subject(arguments: Sequence[str]) -> list[str]:
    """`logs NAME` in full."""
    given = list(arguments)
    if given[:1] == ["logs"] and given[1:2] not in ([what] for what in (*_WHAT, "-h", "--help")):
        given.insert(1, "cluster")
    return given


def _run(options: argparse.Namespace, act: Callable[[], None]) -> int:
    """Attach to the cluster and act; gives the exit code."""
    from poolray import session
    from poolray.cluster import launch
    from poolray.cluster.speaking import fail

    address = options.address or os.environ.get("POOLRAY_ADDRESS") or launch.find_head()
    if address is None:
        return fail("no cluster runs on this machine: name one with --address=HOST:PORT")
    try:
        session.init(address=address, log_to_driver=False)
        try:
            act()
        finally:
            session.shutdown()
    except KeyboardInterrupt:
        return 0 if options.follow else 130
    except BrokenPipeError:  # `poolray logs … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (PoolrayError, ValueError, LookupError, OSError) as error:
        return fail(str(error))
    return 0


def _node(options: argparse.Namespace) -> dict[str, str]:
    """The node that was named; else the head's, or the one that serves us where there is none."""
    if options.node_id or options.node_ip:
        given = {"node_id": options.node_id, "node_ip": options.node_ip}
        return {name: value for name, value in given.items() if value}
    from poolray.util.state import list_nodes

    rows = [row for row in list_nodes() if row.state == "ALIVE"]
    rows.sort(key=lambda row: not row.is_head_node)
    return {"node_id": rows[0].node_id}


def _print(options: argparse.Namespace, **which: Any) -> None:
    from poolray.util.state import get_log

    texts = get_log(
        follow=options.follow,
        tail=options.tail,
        timeout=options.timeout,
        suffix="err" if getattr(options, "err", False) else "out",
        encoding=getattr(options, "encoding", "utf-8"),
        errors=getattr(options, "encoding_errors", "replace"),
        _interval=options.interval,
        **which,
    )
    for text in texts:
        sys.stdout.write(text)
        sys.stdout.flush()


def _cluster(options: argparse.Namespace) -> int:
    def act() -> None:
        from poolray.util.state import list_logs

        node = _node(options)
        found = list_logs(glob_filter=options.glob_filter, timeout=options.timeout, **node)
        names = [name for names in found.values() for name in names]
        if len(names) == 1:
            _print(options, filename=names[0], **node)
            return
        lines = [f"Node {name.removeprefix('node_')}: {value}" for name, value in node.items()]
        for component, files in found.items():
            lines += [f"{component}:", *(f"- {name}" for name in files)]
        sys.stdout.write("\n".join(lines) + "\n")

    return _run(options, act)


def _actor(options: argparse.Namespace) -> int:
    if options.id is None and options.pid is None:
        from poolray.cluster.speaking import fail

        return fail("logs actor: one of --id and --pid is needed")
    if options.id is None:
        return _worker(options)
    return _run(options, lambda: _print(options, actor_id=options.id))


def _worker(options: argparse.Namespace) -> int:
    return _run(options, lambda: _print(options, pid=options.pid, **_node(options)))


def _task(options: argparse.Namespace) -> int:
    def act() -> None:
        _print(options, task_id=options.id, attempt_number=options.attempt_number)

    return _run(options, act)
