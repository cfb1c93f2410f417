"""A node's daemon as a process: it starts, joins, serves, and may begin anew.

What: makes the daemon, and says that it is up once the head counts it.
Who calls: `cluster/__main__.py`.
May touch: what the daemon may.
Invariants: who has heard that a node is up finds it in the head's list; a node that the head does
not take in is not left behind.
"""

from __future__ import annotations

import os
import sys

import msgspec

from poolray.cluster import daemon
from poolray.cluster.node_daemon import NodeDaemon
from poolray.cluster.options import NodeOptions
from poolray.exceptions import ClusterConnectionError

#: The head has so long to take a node in that is started.
_JOIN_S = 10.0


def main() -> int:
    """The whole life of a node's daemon; gives its exit code."""
    pipe = int(sys.argv[2])
    options = daemon.read_options(NodeOptions)
    daemon.detach(options.session_folder, f"node-{os.getpid()}")
    try:
        node = NodeDaemon(options)
        daemon.on_stop(node.stop)
        if pipe >= 0:  # who waits for it is to find it in the head's list at once
            _join(node, options.head_address)
    except BaseException as error:
        daemon.report_failure(pipe, error)
        return 1
    daemon.report(pipe, node.ready())
    node.run()
    if node.is_rejoining:
        daemon.start_again(msgspec.structs.replace(options, worker_logs=node.kept_logs()))
    return 0


def _join(node: NodeDaemon, head_address: str) -> None:
    """Wait until the head counts the node; it ends if that does not come.

    Raises
    ------
    ClusterConnectionError
        The head refuses it or does not answer, or it was stopped meanwhile.
    """
    if not node.reactor.wait(node.answered, _JOIN_S):
        node.refusal = f"it has not answered within {_JOIN_S:g} s"
        node.stop()
    if node.is_stopped:
        node.run()  # it lets go of all that it has
        reason = node.refusal or "this node was stopped before it answered"
        raise ClusterConnectionError(
            f"The head at {head_address} has not taken this node in: {reason}."
        )
