"""The token that makes a cluster, and the keys that follow from it.

    token ──▶ server's key pair, client's key pair       (both known to who knows the token)
    link  ──▶ CURVE: encrypted; the server lets in only clients that prove the client's key

What: finds, makes and reads tokens; derives keys; answers ZeroMQ's question who may come in.
Who calls: daemons, drivers and the command line, before they open a socket.
May touch: the environment, the token's file, a ZeroMQ socket.
Invariants: a token's file can be read by its owner only, from its first moment on; without a token
nothing listens beyond this machine.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, final

import msgspec

from poolray.exceptions import AuthenticationError

if TYPE_CHECKING:
    import zmq

#: The variables, as in the reference with another prefix.
MODE_VARIABLE = "POOLRAY_AUTH_MODE"
TOKEN_VARIABLE = "POOLRAY_AUTH_TOKEN"
PATH_VARIABLE = "POOLRAY_AUTH_TOKEN_PATH"

_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_TOKEN_BYTES_MAX = 4096
_SERVER = b"poolray server"
_CLIENT = b"poolray client"


class AuthMode(enum.Enum):
    """Whether links need a token."""

    TOKEN = "token"
    DISABLED = "disabled"


class KeyPair(msgspec.Struct, frozen=True):
    """A CURVE key pair, as ZeroMQ writes it (Z85)."""

    public: bytes
    secret: bytes


class Credentials(msgspec.Struct, frozen=True):
    """What the token makes."""

    server: KeyPair
    client: KeyPair

    @classmethod
    def of(cls, token: str) -> Credentials:
        """The keys of a token."""
        return cls(_key_pair(token, _SERVER), _key_pair(token, _CLIENT))


def _key_pair(token: str, person: bytes) -> KeyPair:
    import zmq
    from zmq.utils import z85

    # A token is as good as 256 random bits, so a fast hash does; a pass phrase would need a slow
    # one, which is why `check_token` refuses short ones.
    secret = z85.encode(hashlib.blake2b(token.encode(), digest_size=32, person=person).digest())
    return KeyPair(zmq.curve_public(secret), secret)


# ---- tokens --------------------------------------------------------------------------------------


def mode(environment: Mapping[str, str] | None = None) -> AuthMode:
    """What `POOLRAY_AUTH_MODE` asks for; a token, if it is not set.

    Raises
    ------
    ValueError
        It is set to something else.
    """
    variables = os.environ if environment is None else environment
    text = variables.get(MODE_VARIABLE, AuthMode.TOKEN.value).lower()
    try:
        return AuthMode(text)
    except ValueError:
        raise ValueError(
            f"environment variable {MODE_VARIABLE} is {text!r}: it must be 'token' or 'disabled'"
        ) from None


def default_path() -> str:
    """Where a token is looked for, and kept, when nothing else is said."""
    return os.path.join(os.path.expanduser("~"), ".poolray", "auth_token")


def check_token(token: str, source: str) -> str:
    """A token without the blanks around it.

    Raises
    ------
    AuthenticationError
        It is empty, or too short to be a secret.
    """
    token = token.strip()
    if len(token) < 16:
        raise AuthenticationError(
            f"The token in {source} has {len(token)} characters: a secret needs at least 16. "
            "`poolray get-auth-token --generate` makes one."
        )
    return token


def find_token(
    path: str | None = None, environment: Mapping[str, str] | None = None
) -> tuple[str, str] | None:
    """The token and where it is from: a named file, the variables, the default file; None: none.

    Raises
    ------
    AuthenticationError
        The file that is named is not there, cannot be read, or holds no token.
    """
    if path is not None:
        return read_token(path), path
    named = find_named_token(environment)
    usual = default_path()
    if named is None and os.path.exists(usual):
        return read_token(usual), usual
    return named


def find_named_token(environment: Mapping[str, str] | None = None) -> tuple[str, str] | None:
    """The token that the variables name, and where it is from; None: they name none.

    Raises
    ------
    AuthenticationError
        The file that is named is not there, cannot be read, or holds no token.
    """
    variables = os.environ if environment is None else environment
    if TOKEN_VARIABLE in variables:
        return check_token(variables[TOKEN_VARIABLE], TOKEN_VARIABLE), TOKEN_VARIABLE
    path = variables.get(PATH_VARIABLE)
    return (read_token(path), path) if path else None


def read_token(path: str) -> str:
    """The token in a file.

    Raises
    ------
    AuthenticationError
        It is not there, cannot be read, or holds no token.
    """
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            return check_token(file.read(_TOKEN_BYTES_MAX), path)
    except (OSError, UnicodeDecodeError) as error:
        raise AuthenticationError(
            f"The token's file {path} cannot be read: {error}. Copy the head's there "
            f"(`poolray get-auth-token` prints it), or set {TOKEN_VARIABLE}."
        ) from error


def make_token() -> str:
    """A new token."""
    return secrets.token_hex(32)


def write_token(path: str, token: str) -> None:
    """Keep a token in a file that only its owner may read.

    Raises
    ------
    FileExistsError
        There is one already: it may be another cluster's.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, mode=0o700, exist_ok=True)
    # With its rights from the start, and never over what is there.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(token + "\n")


def ensure_token(path: str | None = None) -> tuple[str, str]:
    """The token for a new cluster and where it is from; made where there is none.

    Raises
    ------
    AuthenticationError
        What there is cannot be read.
    """
    target = path or os.environ.get(PATH_VARIABLE) or default_path()
    if TOKEN_VARIABLE not in os.environ or path is not None:
        try:
            write_token(target, make_token())
        except FileExistsError:
            pass  # made before, or a moment ago by somebody who starts a head too
        except OSError as error:
            raise AuthenticationError(
                f"The token's file {target} cannot be made: {error}. Name another one with "
                f"--auth-token-file, or set {TOKEN_VARIABLE}."
            ) from error
        return read_token(target), target
    return check_token(os.environ[TOKEN_VARIABLE], TOKEN_VARIABLE), TOKEN_VARIABLE


# ---- sockets -------------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    """Whether nobody outside of this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(entry[4][0])).is_loopback for entry in found)


def is_local(own_machine: str, other_machine: str, own_host: str, other_host: str) -> bool:
    """Whether two ends of a connection are on one machine, and it is one of its loopback interface.

    The addresses alone would not do: what forwards a port has a loopback address too.
    """
    return own_machine == other_machine != "" and is_loopback(own_host) and is_loopback(other_host)


def check_host(host: str, credentials: Credentials | None) -> None:
    """Refuse to listen to the world without a token.

    Raises
    ------
    AuthenticationError
        There is none, and the address is not a loopback one.
    """
    if credentials is None and not is_loopback(host):
        raise AuthenticationError(
            f"{MODE_VARIABLE} is 'disabled', so {host} is refused: whoever reached it could run "
            "code here. Use a token, or listen on 127.0.0.1 only."
        )


def secure_server(socket_: zmq.Socket[bytes], credentials: Credentials | None) -> None:
    """Let in only who proves the token; before the socket is bound."""
    if credentials is not None:
        socket_.curve_server = True
        socket_.curve_secretkey = credentials.server.secret
        socket_.curve_publickey = credentials.server.public
        socket_.zap_domain = b"poolray"


def secure_client(socket_: zmq.Socket[bytes], credentials: Credentials | None) -> None:
    """Prove the token, and ask for the same; before the socket is connected."""
    if credentials is not None:
        socket_.curve_serverkey = credentials.server.public
        socket_.curve_publickey = credentials.client.public
        socket_.curve_secretkey = credentials.client.secret


@final
class Doorman:
    """Answers ZeroMQ's question whether a client may come in.

    The question comes on a socket of the same context. Without an answer nobody gets in, so
    whoever listens calls `answer` whenever that socket is readable.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], credentials: Credentials) -> None:
        import zmq
        from zmq.utils import z85

        self._wanted = z85.decode(credentials.client.public)
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ZAP_ADDRESS)
        #: Who was sent away, since the start.
        self.refused = 0

    def answer(self) -> bool:
        """Answer one question; False when there is none."""
        import zmq

        try:
            frames = self.socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return False
        version, request_id = (*frames, b"", b"")[:2]
        mechanism, key = (*frames, *[b""] * 7)[5:7]
        is_known = mechanism == b"CURVE" and hmac.compare_digest(key, self._wanted)
        self.refused += not is_known
        status = (b"200", b"OK") if is_known else (b"400", b"this is not the cluster's token")
        self.socket.send_multipart([version, request_id, *status, b"", b""])
        return True

    def close(self) -> None:
        """Nobody comes in any more."""
        self.socket.close()
