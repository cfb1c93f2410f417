"""What a node's daemon says of itself: to the head, and to who only asks.

What: facts for whoever lists nodes; who it is and which nodes it knows.
Who calls: the node's daemon.
May touch: nothing but this machine's name and ids.
Invariants: an answer is a snapshot.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterable

from poolray._version import __version__
from poolray.cluster import places
from poolray.cluster.options import NodeOptions
from poolray.ids import NodeId
from poolray.protocol import PROTOCOL_VERSION
from poolray.protocol.cluster import (
    Answer,
    AskDrain,
    AskWho,
    Nodes,
    NotUnderstood,
    Question,
    Who,
)
from poolray.protocol.directory import NodeRow
from poolray.protocol.node import NodeView


def facts(options: NodeOptions, address: str, socket_name: str) -> dict[str, str]:
    """What the head is told of a node beside its resources, for those who list nodes or look for
    the one on their machine.
    """
    return {
        "host": address.rpartition(":")[0],
        "hostname": socket.gethostname(),
        "machine": places.machine_id(),
        "pid": str(os.getpid()),
        "socket": socket_name,
        "is_head": "1" if options.is_head else "",
        "session_folder": options.session_folder,
    }


def answer(
    question: Question, node_id: NodeId, session_folder: str, views: Iterable[NodeView]
) -> Answer:
    """The answer of a node to a question.

    Parameters
    ----------
    views : iterable of NodeView
        The nodes that it knows.
    """
    if isinstance(question, AskWho):
        return Who(
            role="node",
            pid=os.getpid(),
            version=__version__,
            python=platform.python_version(),
            protocol_version=PROTOCOL_VERSION,
            session_folder=session_folder,
            node_id=node_id,
        )
    if isinstance(question, AskDrain):
        return NotUnderstood(reason="the head is to be asked")
    rows = [
        NodeRow(
            node_id=view.node_id,
            status=view.status,
            total=view.total,
            available=view.available,
            labels=view.labels,
            address=view.address,
            info=view.info,
        )
        for view in views
    ]
    return Nodes(nodes=rows, jobs=0, session_folder=session_folder)
