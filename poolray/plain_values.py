"""Values of options as plain types, which messages can carry.

What: strings of classes of their own (numpy's, say) become plain ones, also within dictionaries and
lists.
Who calls: what keeps options of functions, actors, methods, groups and `init`.
May touch: nothing.
Invariants: what is plain already is the same object, and equal values stay equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, with plain values."""
    return {name: plain(value) for name, value in options.items()}


def plain(value: Any) -> Any:
    """A value without subclasses of `str` in it."""
    if isinstance(value, str):
        return plain_string(value)
    if type(value) is dict:
        return {plain(key): plain(each) for key, each in value.items()}
    if type(value) is list:
        return [plain(each) for each in value]
    return value


def plain_string(value: str) -> str:
    """The text of a string of any class."""
    return value if type(value) is str else str.__str__(value)
