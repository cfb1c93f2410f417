"""Questions to a daemon from outside: is it there, does it know our token, what does it say?

What: opens a connection of its own, asks, and says in words why there is no answer.
Who calls: drivers before they sign on, node daemons before they join, the command line.
May touch: ZeroMQ sockets, the clock.
Invariants: it ends within its time, with an answer or an error that names the address.
"""

from __future__ import annotations

import struct
import time
from typing import TypeVar

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from poolray.cluster.auth import Credentials, secure_client
from poolray.cluster.switch import pack, split_address, unpack
from poolray.exceptions import AuthenticationError, ClusterConnectionError
from poolray.protocol.cluster import Answer, FrameKind, NotUnderstood, Question

T = TypeVar("T")

#: Connections without success before the address counts as wrong.
_ATTEMPTS = 3
_AGAIN_MS = 100
_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
)
_decode = msgspec.msgpack.Decoder(Answer).decode
_encode = msgspec.msgpack.Encoder().encode


def ask(
    address: str,
    question: Question,
    kind: type[T],
    credentials: Credentials | None,
    timeout_s: float = 5.0,
) -> T:
    """A daemon's answer.

    Parameters
    ----------
    address : str
        HOST:PORT.
    kind : type
        The answer that is wanted.

    Raises
    ------
    AuthenticationError
        Somebody is there, and does not know our token.
    ClusterConnectionError
        Nobody is there, or not in time, or it is not a daemon of this version.
    """
    host, port = split_address(address)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.handshake_ivl = 2_000
        dealer.reconnect_ivl = _AGAIN_MS
        secure_client(dealer, credentials)
        monitor = dealer.get_monitor_socket(_EVENTS)
        deadline = time.monotonic() + timeout_s
        try:
            dealer.connect(f"tcp://{'[' + host + ']' if ':' in host else host}:{port}")
        except zmq.ZMQError as error:
            raise ClusterConnectionError(f"{address} is no address: {error.strerror}") from error
        _wait_connected(monitor, address, credentials is not None, deadline)
        answer = _exchange(dealer, address, question, deadline)
    finally:
        context.destroy(linger=0)
    if not isinstance(answer, kind):
        reason = answer.reason if isinstance(answer, NotUnderstood) else "it is of another kind"
        raise ClusterConnectionError(f"The daemon at {address} does not answer: {reason}.")
    return answer


def _wait_connected(
    monitor: zmq.Socket[bytes], address: str, has_token: bool, deadline: float
) -> None:
    """Until a handshake has succeeded."""
    refusals = failures = 0
    connected = False
    while refusals < _ATTEMPTS and failures < _ATTEMPTS:
        left_ms = int((deadline - time.monotonic()) * 1000)
        if left_ms <= 0 or not monitor.poll(left_ms):
            break
        event = recv_monitor_message(monitor)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return
        if event == zmq.EVENT_CONNECTED:
            connected = True
        elif event in (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
            raise _wrong_token(address, has_token)  # sent away, or one side only has a token
        elif event == zmq.EVENT_DISCONNECTED and connected:
            refusals += 1  # whoever does not know our key just hangs up
        elif event == zmq.EVENT_CLOSED and not connected:
            failures += 1
    if connected:
        raise _wrong_token(address, has_token)
    raise ClusterConnectionError(
        f"No cluster answers at {address}: nothing listens there, or it cannot be reached. Is the "
        "head running (`poolray start --head` prints its address), and is the port open?"
    )


def _wrong_token(address: str, has_token: bool) -> AuthenticationError:
    mine = "the token of this process" if has_token else "a process without a token"
    return AuthenticationError(
        f"{address} does not let {mine} in: the cluster there has another one, or none, or it is "
        "no cluster of poolray. `poolray get-auth-token` on the head's machine prints its token; "
        "hand it over in POOLRAY_AUTH_TOKEN, or in a file with --auth-token-file or "
        "POOLRAY_AUTH_TOKEN_PATH."
    )


def _exchange(
    dealer: zmq.Socket[bytes], address: str, question: Question, deadline: float
) -> Answer:
    number = time.monotonic_ns().to_bytes(8, "big")
    body = number + _encode(question)
    while (left_ms := int((deadline - time.monotonic()) * 1000)) > 0:
        dealer.send(pack(FrameKind.QUESTION, b"asking", body))
        if not dealer.poll(min(left_ms, 1_000)):
            continue  # lost, or the daemon is busy: questions may be asked twice
        try:
            kind, _, _, reply = unpack(dealer.recv_multipart()[0])
        except (ValueError, struct.error):
            continue  # whoever it is does not speak with us
        if kind is FrameKind.REFUSAL:
            raise ClusterConnectionError(
                f"The daemon at {address} refuses us: {reply.decode('utf-8', 'replace')}"
            )
        if reply[:8] == number:
            answer: Answer = _decode(reply[8:])
            return answer
    raise ClusterConnectionError(
        f"The daemon at {address} does not answer in time: it is busy, or stopped."
    )
