"""What tests of direct calls share: ways to actors, here and over TCP to a node of a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import poolray
from poolray.cluster_utils import Cluster
from poolray.direct.calls import DirectCalls
from poolray.direct.connection import Connection
from poolray.local import process_state
from tests.integration.support import wait_until

#: Where an actor may be: on this machine, and over TCP on a node of a cluster.
PLACES = ["one process", "cluster, sealed"]


def direct_calls() -> DirectCalls:
    """Those of this process."""
    client = process_state.client()
    assert client is not None
    assert client.direct is not None
    return client.direct


def way_to(actor: Any) -> Connection | None:
    """The direct way to an actor, if there is one that the next call would take."""
    route = direct_calls().routes.get(actor._actor_id)
    return None if route is None else route.usable()


def open_way(actor: Any) -> Connection:
    """Call an actor, which has a method `pid`, until calls go straight."""

    def has_way() -> bool:
        poolray.get(actor.pid.remote())
        return way_to(actor) is not None

    wait_until(has_way, "a direct way to the actor")
    way = way_to(actor)
    assert way is not None
    return way


@contextlib.contextmanager
def runtime_at(place: str) -> Iterator[dict[str, Any]]:
    """A runtime; gives the options of actors that are to be there."""
    if place == "one process":
        poolray.init(num_cpus=2)
        yield {}
        return
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1, resources={"far": 1})
        poolray.init(address=cluster.address)
        direct_calls()._host.machine = "another machine"  # type: ignore[misc]
        yield {"resources": {"far": 0.1}}
    finally:
        poolray.shutdown()
        cluster.shutdown()
