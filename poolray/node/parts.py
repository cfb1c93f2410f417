"""The parts of a node's machine, made and told of each other.

What: one object of each part; who of them knows whom.
Who calls: `node/node.py`, once.
May touch: nothing.
Invariants: all parts of a node share one `NodeState`; none is replaced while the node lives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from poolray.ids import WorkerId
from poolray.node.actors import Actors
from poolray.node.actors_elsewhere import ActorsElsewhere
from poolray.node.bundles import Bundles
from poolray.node.cancellation import Cancellation
from poolray.node.dispatch import Dispatcher
from poolray.node.draining import Draining
from poolray.node.functions import Functions
from poolray.node.groups import Groups
from poolray.node.hosting import Hosting
from poolray.node.memory_protection import MemoryProtection
from poolray.node.objects import Objects
from poolray.node.observer import Observer
from poolray.node.peers import Peers
from poolray.node.retries import Retries
from poolray.node.state import NodeState
from poolray.node.store import Store
from poolray.node.streams import Streams
from poolray.node.tasks import Tasks
from poolray.node.timeouts import CallTimeouts


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """One machine, in files of readable size."""

    actors: Actors
    bundles: Bundles
    cancellation: Cancellation
    dispatcher: Dispatcher
    draining: Draining
    functions: Functions
    groups: Groups
    objects: Objects
    observer: Observer
    peers: Peers
    protection: MemoryProtection
    retries: Retries
    store: Store
    streams: Streams
    tasks: Tasks
    timeouts: CallTimeouts


def make_parts(
    state: NodeState,
    *,
    next_worker_id: Callable[[], WorkerId],
    slots: int,
    has_head: bool,
    watches_memory: bool,
) -> Parts:
    """Make the parts of a node.

    Parameters
    ----------
    next_worker_id : callable
        A new worker id at each call.
    slots : int
        Progress words, hence workers, at the most.
    has_head : bool
        Whether a head listens to heartbeats.
    watches_memory : bool
        Whether the shell can measure memory.
    """
    functions = Functions(state)
    observer = Observer(state)
    store = Store(state)
    tasks = Tasks(state, store, functions, observer)
    functions.objects = objects = Objects(state, store, tasks.inputs.on_dependency_ready)
    dispatcher = Dispatcher(state, tasks)
    groups = Groups(state, tasks, dispatcher, next_worker_id, slots, observer)
    peers = Peers(state, store, objects, tasks, functions)
    observer.peers = peers
    actors = Actors(state, objects, tasks, dispatcher, groups, observer)
    tasks.objects, tasks.dispatcher, tasks.groups, tasks.peers = (
        objects,
        dispatcher,
        groups,
        peers,
    )
    tasks.actors = dispatcher.actors = groups.actors = actors
    elsewhere = ActorsElsewhere(state, objects, tasks)
    hosting = Hosting(state, objects, tasks, functions, actors, elsewhere, is_cluster=has_head)
    actors.elsewhere, actors.hosting, peers.actors = elsewhere, hosting, actors
    elsewhere.local, elsewhere.peers, hosting.borrowing = actors, peers, peers.borrowing
    objects.on_handle = elsewhere.on_handle
    objects.on_actor_freed = actors.on_freed
    objects.on_local = peers.on_local
    dispatcher.groups, dispatcher.try_forward = groups, peers.try_forward
    dispatcher.place_elsewhere = peers.place_elsewhere
    dispatcher.is_hopeless = peers.placing.never
    dispatcher.may_run_elsewhere = peers.placing.may_run
    dispatcher.peers = peers.views
    peers.ahead.dispatcher = dispatcher
    peers.placing.watch_time = dispatcher.watch_time
    observer.actors = actors
    tasks.cancellation = cancellation = Cancellation(state, tasks)
    tasks.retries = retries = Retries(state, tasks)
    cancellation.dispatcher = retries.dispatcher = dispatcher
    peers.cancellation = cancellation
    observer.cancellation, observer.call_sites = cancellation, objects.call_sites
    bundles = Bundles(state, objects, tasks)
    bundles.actors, bundles.dispatcher, bundles.peers = actors, dispatcher, peers
    functions.bundles = dispatcher.bundles = bundles
    dispatcher.orders = bundles.orders
    tasks.streams = peers.streams = streams = Streams(state, objects, tasks)
    streams.peers = peers
    tasks.protection = protection = MemoryProtection(state, tasks, watches_memory)
    protection.actors, protection.retries = actors, retries
    protection.groups = groups
    dispatcher.timeouts = timeouts = CallTimeouts(state)
    timeouts.dispatcher, timeouts.groups = dispatcher, groups
    draining = Draining(state, tasks)
    draining.actors, draining.dispatcher, draining.peers = actors, dispatcher, peers
    peers.draining = draining
    return Parts(
        actors=actors,
        bundles=bundles,
        cancellation=cancellation,
        dispatcher=dispatcher,
        draining=draining,
        functions=functions,
        groups=groups,
        objects=objects,
        observer=observer,
        peers=peers,
        protection=protection,
        retries=retries,
        store=store,
        streams=streams,
        tasks=tasks,
        timeouts=timeouts,
    )
