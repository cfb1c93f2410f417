"""`poolray status` and `poolray drain-node`: what a cluster has, does and waits for; who leaves it.

What: asks the head, and puts its answer in the form that the reference's users know.
Who calls: `cluster/commands.py`.
May touch: a connection to the head, standard streams, the clock for the headline.
Invariants: looking changes nothing; a node that is drained is told so once, however often it is
asked for.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from poolray.cluster import launch
from poolray.cluster.asking import ask
from poolray.cluster.auth import Credentials
from poolray.cluster.speaking import fail, say
from poolray.exceptions import ClusterConnectionError, PoolrayError
from poolray.ids import NODE_ID_BYTES, NodeId
from poolray.protocol.cluster import AskDrain, AskNodes, DrainStarted, Nodes
from poolray.protocol.directory import NodeRow, NodeStatus
from poolray.scheduling.bundles import Strategy
from poolray.scheduling.resources import from_fixed

_RULE = "-" * 63
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_IDLE, _PREEMPTION = "DRAIN_NODE_REASON_IDLE_TERMINATION", "DRAIN_NODE_REASON_PREEMPTION"
#: A node says within this long whether it is idle; how often the head is asked what it has said.
_DRAIN_ANSWERS_S = 10.0
_AGAIN_S = 0.02
#: Dead nodes that are shown, the last.
_FAILURES_MAX = 20


def add_status(commands: Any) -> None:
    """Put `status` among the commands."""
    status = commands.add_parser(
        "status",
        help="nodes, resources and what waits",
        description="Print the nodes of a cluster, what they have, what of it is used, and what "
        "waits, by the resources that it asks for.",
    )
    status.set_defaults(run=_status)
    _add_address(status)


def add_drain(commands: Any) -> None:
    """Put `drain-node` among the commands."""
    drain = commands.add_parser(
        "drain-node",
        help="take a node out of its cluster politely",
        description="Tell a node to leave: it begins nothing new, what waits there goes to other "
        "nodes, so do the objects that it keeps for them, and when what it runs for others has "
        "ended, its daemon ends.",
    )
    drain.set_defaults(run=_drain)
    _add_address(drain)
    add = drain.add_argument
    add("--node-id", metavar="HEX", help="the node (default: the one on this machine)")
    add("--reason", required=True, choices=[_IDLE, _PREEMPTION], help=f"{_IDLE} spares busy nodes")
    add("--reason-message", required=True, metavar="TEXT", help="why, for logs and lists")
    add(
        "--deadline-remaining-seconds",
        type=int,
        metavar="S",
        help="what it runs may take so long; then it leaves all the same (default: no limit)",
    )


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", help="HOST:PORT (default: POOLRAY_ADDRESS, then the cluster of this machine)"
    )
    parser.add_argument("--auth-token-file", metavar="FILE", help="the file with its token")


def _address_of(options: argparse.Namespace) -> str | None:
    given = options.address or os.environ.get("POOLRAY_ADDRESS") or "auto"
    return launch.find_head() if given == "auto" else given.removeprefix("poolray://")


def _no_cluster() -> int:
    return fail("no cluster runs on this machine: name one with --address=HOST:PORT")


# ---- status --------------------------------------------------------------------------------------


def _status(options: argparse.Namespace) -> int:
    address = _address_of(options)
    if address is None:
        return _no_cluster()
    try:
        credentials = launch.credentials_for(address, options.auth_token_file)
        nodes = ask(address, AskNodes(), Nodes, credentials)
    except (PoolrayError, ValueError) as error:
        return fail(str(error))
    say(format_status(address, nodes, datetime.now()))
    return 0


def format_status(address: str, nodes: Nodes, now: datetime) -> str:
    """A cluster in words."""
    alive = [row for row in nodes.nodes if row.status is not NodeStatus.DEAD]
    dead = [row for row in nodes.nodes if row.status is NodeStatus.DEAD][-_FAILURES_MAX:]
    draining = [row for row in alive if row.status is NodeStatus.DRAINING]
    lines = [
        f"======== Cluster status: {now} ========",
        f"Address: {address}, jobs: {nodes.jobs}",
        "Node status",
        _RULE,
        "Active:",
        *_or_none([_node_line(row) for row in alive if row not in draining], "(no active nodes)"),
        "Draining:",
        *_or_none([_node_line(row) for row in draining], "(no draining nodes)"),
        "Recent failures:",
        *_or_none([f" {_node_line(row).strip()}: {row.reason}" for row in dead], "(no failures)"),
        "",
        "Resources",
        _RULE,
        "Total Usage:",
        *_or_none(_usage(alive), "(no resources)"),
        "",
        "Pending Demands:",
        *_or_none(_demands(alive) + _group_demands(nodes), "(no resource demands)"),
    ]
    return "\n".join(lines)


def _or_none(lines: list[str], otherwise: str) -> list[str]:
    return lines or [f" {otherwise}"]


def _node_line(row: NodeRow) -> str:
    hostname = row.info.get("hostname", "")
    head = ", head" if row.info.get("is_head") else ""
    return f" 1 node_{row.node_id.hex()} ({row.address} {hostname}{head})"


def _usage(rows: list[NodeRow]) -> list[str]:
    total: dict[str, int] = {}
    free: dict[str, int] = {}
    for row in rows:
        for name, amount in row.total.items():
            total[name] = total.get(name, 0) + amount
            # (Overdrawn for a moment is used up.)
            free[name] = free.get(name, 0) + max(0, row.available.get(name, 0))
    used = from_fixed({name: total[name] - free[name] for name in total})
    return [
        f" {_amount(name, used.get(name, 0.0))}/{_amount(name, whole)} {name}"
        for name, whole in sorted(from_fixed(total).items())
        if not name.startswith("node:")
    ]


def _amount(name: str, amount: float) -> str:
    if name not in ("memory", "object_store_memory"):
        return str(float(amount))
    unit = 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.2f}{_UNITS[unit]}" if unit else f"{amount:.0f}B"


def _demands(rows: list[NodeRow]) -> list[str]:
    counts: dict[str, int] = {}
    for row in rows:
        for demand in row.demands:
            shape = _shape(demand.resources)
            counts[shape] = counts.get(shape, 0) + demand.count
    return [f" {shape}: {count}+ pending tasks/actors" for shape, count in sorted(counts.items())]


def _group_demands(nodes: Nodes) -> list[str]:
    counts: dict[str, int] = {}
    for row in nodes.pending_groups:
        shapes: dict[str, int] = {}
        placed = row.nodes or [NodeId(b"")] * len(row.spec.bundles)
        for bundle, node_id in zip(row.spec.bundles, placed, strict=True):
            if not node_id:
                shapes[_shape(bundle)] = shapes.get(_shape(bundle), 0) + 1
        bundles = ", ".join(f"{shape} * {count}" for shape, count in shapes.items())
        text = f"{bundles} ({Strategy(row.spec.strategy).name})"
        counts[text] = counts.get(text, 0) + 1
    return [f" {text}: {count}+ pending placement groups" for text, count in counts.items()]


def _shape(resources: Mapping[str, int]) -> str:
    return str(dict(sorted(from_fixed(resources).items())))


# ---- drain ---------------------------------------------------------------------------------------


def _drain(options: argparse.Namespace) -> int:
    patience_s = options.deadline_remaining_seconds
    if patience_s is not None and patience_s <= 0:
        return fail("--deadline-remaining-seconds must be more than 0; leave it out for no limit")
    address = _address_of(options)
    if address is None:
        return _no_cluster()
    try:
        credentials = launch.credentials_for(address, options.auth_token_file)
        if options.node_id:
            node_id = _node_id(options.node_id)
        else:
            node_id = launch.find_node(address, credentials).node_id
        question = AskDrain(
            node_id=node_id,
            reason=options.reason_message,
            patience_s=float(patience_s or 0),
            only_if_idle=options.reason == _IDLE,
        )
        refusal = _ask_to_leave(address, question, credentials)
    except (PoolrayError, ValueError) as error:
        return fail(str(error))
    if refusal:
        return fail(f"The drain request is not accepted: node {node_id.hex()}: {refusal}.")
    say(f"Node {node_id.hex()} has been told to leave.")
    return 0


def _ask_to_leave(address: str, question: AskDrain, credentials: Credentials | None) -> str:
    """Gives why a node does not leave; empty: it does.

    Raises
    ------
    ClusterConnectionError
        The head cannot be reached, or the node does not answer it.
    """
    started = ask(address, question, DrainStarted, credentials)
    was_pending = started.is_pending
    deadline_s = time.monotonic() + _DRAIN_ANSWERS_S
    while started.is_pending:  # the head has asked the node
        if time.monotonic() > deadline_s:
            raise ClusterConnectionError(
                f"Node {question.node_id.hex()} does not say within {_DRAIN_ANSWERS_S:g} s whether "
                "it is idle."
            )
        time.sleep(_AGAIN_S)
        started = ask(address, question, DrainStarted, credentials)
    return "" if was_pending and started.has_left else started.refusal


def _node_id(text: str) -> NodeId:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != NODE_ID_BYTES:
        raise ValueError(
            f"Invalid hex ID of a Ray node, got {text!r}: `poolray status` prints the "
            f"{2 * NODE_ID_BYTES} digits behind node_."
        )
    return NodeId(found)


__all__ = ["add_drain", "add_status", "format_status"]
