"""The wire: messages, one file per conversation.

What: frozen, tagged msgspec structs; user payloads are opaque bytes inside them.
Who calls: clients and shells make and send them, the machines take and return them.
May touch: nothing.
Invariants: fields are only ever added, with defaults; a change of meaning raises
`PROTOCOL_VERSION`, which every handshake checks.
"""

from __future__ import annotations

PROTOCOL_VERSION = 1
