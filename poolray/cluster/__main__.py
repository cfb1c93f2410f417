"""A daemon as a process: `python -m poolray.cluster head|node DESCRIPTOR`, for `cluster/launch.py`.

What: picks the daemon; its options come through standard input.
Who calls: `cluster/launch.py`; nobody else knows what to write there.
May touch: what the daemon may.
Invariants: modules of daemons go by their own names, not by `__main__`, in logs and messages.
"""

from __future__ import annotations

import sys


def main() -> int:
    """The whole life of a daemon; gives its exit code."""
    if len(sys.argv) != 3 or sys.argv[1] not in ("head", "node"):
        sys.stderr.write("usage: poolray start (daemons are not started by hand)\n")
        return 2
    if sys.argv[1] == "head":
        from poolray.cluster import head_daemon

        return head_daemon.main()
    from poolray.cluster import node_main

    return node_main.main()


if __name__ == "__main__":
    sys.exit(main())
