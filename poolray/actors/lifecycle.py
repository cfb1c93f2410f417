"""The life of an actor: its states and the moves between them.

    created ──▶ PENDING ──constructed──▶ ALIVE ──process died──▶ RESTARTING
                   │                     │  ▲                     │   │
                   │                     │  └─────constructed─────┘   │
                   └─────────────────────┴──────────▶ DEAD ◀──────────┘

What: the table of moves and `ActorLife`, the only place where an actor's state is kept.
Who calls: the node machine, through `move`.
May touch: nothing.
Invariants: `MOVES` lists every move there is; a state is written by `move` alone; DEAD is final.
"""

from __future__ import annotations

import enum
from typing import final

from poolray.exceptions import IllegalTransition
from poolray.ids import ActorId


class ActorState(enum.IntEnum):
    """Where an actor is in its life."""

    PENDING = 0  #: its constructor has not returned for the first time
    ALIVE = 1  #: a worker is its own, calls are sent there
    RESTARTING = 2  #: its process died, its constructor runs again
    DEAD = 3  #: no call of it will run any more; its process may still be ending


PENDING = ActorState.PENDING
ALIVE = ActorState.ALIVE
RESTARTING = ActorState.RESTARTING
DEAD = ActorState.DEAD

#: state -> states that may follow it.
MOVES: dict[ActorState, frozenset[ActorState]] = {
    # Constructed; the constructor raised, its workers died too often, or the actor was killed.
    PENDING: frozenset({ALIVE, DEAD}),
    # Its process died and it may be restarted; it ended itself, was killed, or nobody needs it.
    ALIVE: frozenset({RESTARTING, DEAD}),
    # Constructed once more; as PENDING.
    RESTARTING: frozenset({ALIVE, DEAD}),
    DEAD: frozenset(),
}


@final
class ActorLife:
    """The state of one actor."""

    __slots__ = ("_actor_id", "_class_name", "state")

    def __init__(self, actor_id: ActorId, class_name: str) -> None:
        self._actor_id = actor_id
        self._class_name = class_name
        self.state = PENDING

    def move(self, state: ActorState) -> None:
        """Go to another state.

        Raises
        ------
        IllegalTransition
            `MOVES` does not allow it: a bug in the machine.
        """
        if state not in MOVES[self.state]:
            raise IllegalTransition(
                what=f"actor {self._class_name} ({self._actor_id.hex()})",
                state=self.state.name,
                event=f"move to {state.name}",
            )
        self.state = state
