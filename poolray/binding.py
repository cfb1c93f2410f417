"""Where `bind` finds what makes nodes of lazy graphs.

What: the name of a binder for functions, classes and methods, which lie below the room of graphs.
Who calls: `remote_function.py` and `actor.py` from `bind`; the package says who the binder is.
May touch: nothing.
Invariants: the room of graphs is imported at the first `bind`, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from poolray.actor import ActorClass, ActorMethod
    from poolray.remote_function import RemoteFunction


class Binder(Protocol):
    """Makes nodes of lazy graphs; `options` are those that `.options(...)` was given."""

    def bind_function(
        self,
        function: RemoteFunction[Any, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Mapping[str, Any],
    ) -> Any:
        """A call of a function, to come."""

    def bind_class(
        self,
        actor_class: ActorClass[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Mapping[str, Any],
    ) -> Any:
        """An actor, to come."""

    def bind_method(
        self, method: ActorMethod, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call of a method of an actor that is there, to come."""


#: Set by the package when it is imported.
find_binder: Callable[[], Binder]
