"""How fast bytes go through the loopback interface by plain TCP: what transfers are put beside.

What: a process of its own that receives into warm memory, and a socket that sends to it from warm
memory, as `iperf3` does.
Who calls: `benchmarks/cluster.py`.
May touch: processes, sockets, the clock.
Invariants: what is timed ends when the receiver has said that it has all bytes.
"""

from __future__ import annotations

import mmap
import socket
import subprocess
import sys
import time
from pathlib import Path

_PIECE_BYTES = 1 << 20


class RawTcp:
    """A receiver in a process of its own, and a connection to it."""

    def __init__(self, bytes_max: int) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        command = [sys.executable, str(Path(__file__).resolve()), str(port), str(bytes_max)]
        self._process = subprocess.Popen(command)
        self._connection, _ = listener.accept()
        listener.close()
        self._data = memoryview(mmap.mmap(-1, bytes_max))
        self._data[::4096] = b"\1" * len(self._data[::4096])
        self.rate(bytes_max)  # (touches the receiver's memory)

    def rate(self, size_bytes: int) -> float:
        """Bytes a second, of so many."""
        started = time.perf_counter()
        self._connection.sendall(size_bytes.to_bytes(8, "big"))
        for start in range(0, size_bytes, _PIECE_BYTES):
            self._connection.sendall(self._data[start : min(start + _PIECE_BYTES, size_bytes)])
        assert self._connection.recv(1) == b"!"
        return size_bytes / (time.perf_counter() - started)

    def __enter__(self) -> RawTcp:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.wait(30)


def main() -> None:
    """Receive until the connection ends."""
    port, bytes_max = int(sys.argv[1]), int(sys.argv[2])
    target = memoryview(mmap.mmap(-1, bytes_max))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while head := connection.recv(8, socket.MSG_WAITALL):
            size_bytes, taken = int.from_bytes(head, "big"), 0
            while taken < size_bytes:
                end = min(taken + _PIECE_BYTES, size_bytes)
                taken += connection.recv_into(target[taken:end])
            connection.sendall(b"!")


if __name__ == "__main__":
    main()
