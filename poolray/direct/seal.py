"""Who is at the other end of a connection of our own, and how what it carries is closed to others.

    connects ──▶ magic, id, nonce ─────────────────▶ listens: the id is one that it was told of
             ◀── kind, nonce, proof ◀──────────────  (over the control links, with a secret key)
             ──▶ proof ────────────────────────────▶ then, and not before, what is to be carried

What: the handshake's messages and proofs; records sealed with AES-256-GCM.
Who calls: the connections of `cluster/bulk_loop.py` and those for direct calls.
May touch: the system's randomness.
Invariants: a key serves one connection, each direction and use has a key derived for it alone, and
a nonce is a counter that never goes back; what was not proved or does not open is never written.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from typing import final

MAGIC = b"poolray\x02"
ID_BYTES = KEY_BYTES = NONCE_BYTES = PROOF_BYTES = 32
#: The first message: who made this, which connection it is, a nonce.
HELLO_BYTES = len(MAGIC) + ID_BYTES + NONCE_BYTES
#: Its answer: open or sealed, a nonce, the proof.
ANSWER_BYTES = 1 + NONCE_BYTES + PROOF_BYTES
OPEN, SEALED = b"O", b"S"
TAG_BYTES = 16
#: Bytes that are sealed at a time: some tens of microseconds, during which the interpreter's lock
#: is held (the library does not let go of it); smaller ones cost more per byte.
RECORD_BYTES = 256 << 10
_COUNTER = struct.Struct(">4xQ")


class HandshakeError(Exception):
    """The other end is not who it should be."""


@final
class Handshake:
    """What one end of a new connection has to say, and to hear.

    Parameters
    ----------
    connection_id, key : bytes
        As they were agreed on the control link.
    is_local : bool
        Both ends are on this machine and speak through its loopback interface: nobody who is not
        the system's administrator can listen, so what follows need not be sealed.
    """

    def __init__(self, connection_id: bytes, key: bytes, *, is_local: bool) -> None:
        self._id = connection_id
        self._key = key
        self._is_local = is_local
        self._nonce = os.urandom(NONCE_BYTES)
        self._transcript = b""

    def hello(self) -> bytes:
        """What the end that connects says first."""
        return MAGIC + self._id + self._nonce

    def answer(self, hello: bytes) -> bytes:
        """What the end that listens says to that."""
        kind = OPEN if self._is_local else SEALED
        self._transcript = hello + kind + self._nonce
        return kind + self._nonce + self._proof(b"listens")

    def prove(self, answer: bytes) -> bytes:
        """What the end that connects says last, once the other one has proved itself.

        Raises
        ------
        HandshakeError
            It has not, or wants to send in the open what others could hear.
        """
        kind, nonce, proof = answer[:1], answer[1:-PROOF_BYTES], answer[-PROOF_BYTES:]
        self._transcript = self.hello() + kind + nonce
        if not hmac.compare_digest(proof, self._proof(b"listens")):
            raise HandshakeError("the other end does not know the key")
        if kind != SEALED and not self._is_local:
            raise HandshakeError("the other end would send in the open what others could hear")
        return self._proof(b"connects")

    def check(self, proof: bytes) -> None:
        """Whether the end that has connected is who it says.

        Raises
        ------
        HandshakeError
            It is not.
        """
        if not hmac.compare_digest(proof, self._proof(b"connects")):
            raise HandshakeError("the other end does not know the key")

    def seal(self) -> Seal | None:
        """What closes the bytes that the listening end sends; None: they go in the open."""
        return self._seal(b"sealed by who listens")

    def seal_back(self) -> Seal | None:
        """The same for those that the connecting end sends."""
        return self._seal(b"sealed by who connects")

    def _seal(self, purpose: bytes) -> Seal | None:
        kind = self._transcript[HELLO_BYTES : HELLO_BYTES + 1]
        return None if kind == OPEN else Seal(self._derive(purpose))

    def _proof(self, role: bytes) -> bytes:
        return hmac.digest(self._derive(role), self._transcript, "sha256")

    def _derive(self, purpose: bytes) -> bytes:
        """A key for one purpose: HKDF-SHA256's expansion (RFC 5869, one block); the nonces of both
        ends make it another one for each connection.
        """
        info = b"poolray bulk " + purpose + hashlib.sha256(self._transcript).digest()
        return hmac.digest(self._key, info + b"\1", "sha256")


@final
class Seal:
    """Closes records, or opens them, in order; one end's object only does the one or the other."""

    def __init__(self, key: bytes) -> None:
        # Loaded only where links leave the machine: it takes longer than all of a daemon's start.
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher = AESGCM(key)
        self._count = 0

    def _nonce(self) -> bytes:
        self._count += 1
        return _COUNTER.pack(self._count)

    def close(self, data: bytes | memoryview) -> bytes:
        """A record that only the other end can read, longer by `TAG_BYTES`."""
        return self._cipher.encrypt(self._nonce(), data, None)

    def open(self, record: bytes | memoryview) -> bytes:
        """What is in the next record.

        Raises
        ------
        HandshakeError
            It was changed, or is not the next one.
        """
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(self._nonce(), record, None)
        except InvalidTag:
            raise HandshakeError("a record was changed on its way") from None
