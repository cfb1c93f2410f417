"""The cluster's key-value store: small values that every process of the cluster can read.

What: `ray.experimental.internal_kv` under its own names: put, get, exists, delete, list.
Who calls: users, libraries for Ray Core.
May touch: the runtime.
Invariants: keys and values are bytes, text is encoded as UTF-8; a key is found under the namespace
that it was put under, and under no other.
"""

from __future__ import annotations

from typing import Any

from poolray.exceptions import PoolrayError
from poolray.local import process_state
from poolray.protocol.inquiry import (
    AskHead,
    AskHeadPart,
    HeadQuestion,
    encode_question,
    read_answer,
)
from poolray.protocol.node import (
    HeadReply,
    KeyValueDelete,
    KeyValueExists,
    KeyValueGet,
    KeyValueList,
    KeyValuePut,
)
from poolray.session import find_client, is_initialized

__all__ = [
    "_internal_kv_del",
    "_internal_kv_exists",
    "_internal_kv_get",
    "_internal_kv_initialized",
    "_internal_kv_list",
    "_internal_kv_put",
    "_internal_kv_reset",
]


#: Of a question that a worker asks, in one packet.
_PART_BYTES = 64 * 1024


def _bytes(what: str, value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    raise TypeError(f"{what} must be bytes or str, not {type(value).__name__}")


def _space(namespace: Any) -> str:
    # (Any bytes may be a namespace, also such that are no text.)
    return "" if namespace is None else _bytes("namespace", namespace).hex()


def _ask(question: HeadQuestion) -> HeadReply:
    link = find_client().link
    data = encode_question(question) if process_state.is_worker() else b""
    if len(data) <= _PART_BYTES:
        found = link.ask(lambda n: AskHead(request_id=n, question=question))
    else:  # more than one packet of a worker's channel may hold

        def send_parts(number: int) -> AskHeadPart:
            """Send all but the last, and give that."""
            last = (len(data) - 1) // _PART_BYTES * _PART_BYTES
            for start in range(0, last, _PART_BYTES):
                part = data[start : start + _PART_BYTES]
                link.send(AskHeadPart(request_id=number, data=part, more=True))
            return AskHeadPart(request_id=number, data=data[last:], more=False)

        found = link.ask(send_parts)
    answer = read_answer(found if isinstance(found, list) else [found])
    assert isinstance(answer, HeadReply)
    return answer


def _internal_kv_initialized() -> bool:
    """Whether there is a store to ask: whether the runtime has been started.

    Examples
    --------
    >>> import poolray
    >>> _ = poolray.init(ignore_reinit_error=True)
    >>> from poolray.experimental.internal_kv import _internal_kv_initialized
    >>> _internal_kv_initialized()
    True
    """
    return is_initialized()


def _internal_kv_put(
    key: str | bytes,
    value: str | bytes,
    overwrite: bool = True,
    *,
    namespace: str | bytes | None = None,
) -> bool:
    """Store a value under a key, for the whole cluster.

    Parameters
    ----------
    key, value : str or bytes
        What to store, and under which key; text is encoded as UTF-8.
    overwrite : bool, default True
        Replace a value that the key has already; False: leave that as it is.
    namespace : str or bytes, default None
        Keys of different namespaces do not meet.

    Returns
    -------
    bool
        Whether the key had a value already.

    Raises
    ------
    TypeError
        Key, value or namespace is something else.
    PoolrayError
        The store is full: it is meant for small things, 256 MiB in all.

    Examples
    --------
    >>> from poolray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
    >>> _internal_kv_put("color", "green", namespace="doc")
    False
    >>> _internal_kv_put("color", "blue", overwrite=False, namespace="doc")
    True
    >>> _internal_kv_get("color", namespace="doc")
    b'green'
    """
    if not isinstance(overwrite, bool):
        raise TypeError(f"overwrite must be True or False, not {overwrite!r}")
    name, data = _bytes("key", key), _bytes("value", value)
    question = KeyValuePut(
        request_id=0, namespace=_space(namespace), key=name, value=data, overwrite=overwrite
    )
    reply = _ask(question)
    if not reply.done and not (reply.count and not overwrite):
        raise PoolrayError(
            "The key-value store is full: delete keys, and put large values with put()."
        )
    return bool(reply.count)


def _internal_kv_get(key: str | bytes, *, namespace: str | bytes | None = None) -> bytes | None:
    """The value of a key, or None when it has none.

    Examples
    --------
    >>> from poolray.experimental.internal_kv import _internal_kv_get
    >>> _internal_kv_get("nobody put this") is None
    True
    """
    question = KeyValueGet(request_id=0, namespace=_space(namespace), key=_bytes("key", key))
    found = _ask(question).found
    return found if isinstance(found, bytes) else None


def _internal_kv_exists(key: str | bytes, *, namespace: str | bytes | None = None) -> bool:
    """Whether a key has a value.

    Examples
    --------
    >>> from poolray.experimental.internal_kv import _internal_kv_exists
    >>> _internal_kv_exists("nobody put this")
    False
    """
    question = KeyValueExists(request_id=0, namespace=_space(namespace), key=_bytes("key", key))
    return _ask(question).done


def _internal_kv_del(
    key: str | bytes, *, del_by_prefix: bool = False, namespace: str | bytes | None = None
) -> int:
    """Remove a key, or all keys that begin with it.

    Returns
    -------
    int
        How many keys were removed.

    Examples
    --------
    >>> from poolray.experimental.internal_kv import _internal_kv_del, _internal_kv_put
    >>> for key in ("x/1", "x/2"):
    ...     _ = _internal_kv_put(key, "value", namespace="doc")
    >>> _internal_kv_del("x/", del_by_prefix=True, namespace="doc")
    2
    """
    return _ask(
        KeyValueDelete(
            request_id=0,
            namespace=_space(namespace),
            key=_bytes("key", key),
            by_prefix=bool(del_by_prefix),
        )
    ).count


def _internal_kv_list(prefix: str | bytes, *, namespace: str | bytes | None = None) -> list[bytes]:
    """The keys that begin so, sorted.

    Examples
    --------
    >>> from poolray.experimental.internal_kv import _internal_kv_list, _internal_kv_put
    >>> _ = _internal_kv_put("y/1", "value", namespace="doc")
    >>> _internal_kv_list("y/", namespace="doc")
    [b'y/1']
    """
    question = KeyValueList(
        request_id=0, namespace=_space(namespace), prefix=_bytes("prefix", prefix)
    )
    found = _ask(question).found
    return found if isinstance(found, list) else []


def _internal_kv_reset() -> None:
    """Do nothing: there is no connection of its own to forget."""
