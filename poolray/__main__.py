"""The command line: `poolray start`, `poolray memory` and so on, or `python -m poolray …`.

What: parses options, asks drivers, prints.
Who calls: users, in a terminal.
May touch: the drivers of the same user, through `poolray/local/inspection.py`.
Invariants: asking changes nothing; exit code 0 says that every driver that was found has answered.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from poolray import logs_command, state_command
from poolray._version import __version__
from poolray.exceptions import PoolrayError
from poolray.local import inspection
from poolray.util.memory import GROUPS, ORDERS, UNITS, format_table, memory_summary

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(logs_command.with_subject(given))
    code: int = options.run(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="poolray",
        description="Clusters: start, join, look, stop. Running programs: look into their memory.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    from poolray.cluster.commands import add_commands

    add_commands(commands)
    state_command.add_commands(commands)
    logs_command.add_logs(commands)
    memory = commands.add_parser(
        "memory",
        help="objects of running drivers, or of a cluster: sizes, places, and who holds them",
        description="Print the objects of this user's running drivers without a cluster, or of all "
        "nodes of one: sizes, places, and which process, task or object holds them.",
    )
    memory.set_defaults(run=_memory)
    memory.add_argument("--address", help="of a cluster: HOST:PORT, auto or poolray://HOST:PORT")
    memory.add_argument("--pid", type=int, help="only this driver (default: all of this user)")
    memory.add_argument("--list", action="store_true", help="print the pids of drivers, no more")
    memory.add_argument("--group-by", type=str.upper, choices=sorted(GROUPS), default="PID")
    memory.add_argument("--sort-by", type=str.upper, choices=sorted(ORDERS), default="OBJECT_SIZE")
    memory.add_argument("--units", type=str.upper, choices=list(UNITS), default="B")
    memory.add_argument("--stats-only", action="store_true", help="only sums, no objects")
    memory.add_argument(
        "-n", "--num-entries", type=_count, metavar="N", help="lines per group (default: all)"
    )
    memory.add_argument(
        "--timeout", type=float, default=10.0, metavar="S", help="seconds to wait (default: 10)"
    )
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def _memory(options: argparse.Namespace) -> int:
    if options.address is not None:
        return _memory_of_cluster(options)
    found = inspection.drivers()
    if options.pid is not None:
        found = {pid: names for pid, names in found.items() if pid == options.pid}
    if not found:
        whose = "of this user" if options.pid is None else f"with pid {options.pid}"
        sys.stderr.write(f"poolray: no running driver {whose} was found.\n")
        return 1
    if options.list:
        sys.stdout.write("".join(f"{pid}\n" for pid in found))
        return 0
    code = 0
    for names in found.values():
        for name in names:
            try:
                table = inspection.ask(name, options.timeout)
            except PoolrayError as error:
                sys.stderr.write(f"poolray: {error}\n")
                code = 1
                continue
            sys.stdout.write(
                format_table(
                    table,
                    group_by=options.group_by,
                    sort_by=options.sort_by,
                    units=options.units,
                    stats_only=options.stats_only,
                    num_entries=options.num_entries,
                )
            )
    return code


def _memory_of_cluster(options: argparse.Namespace) -> int:
    if options.pid is not None or options.list:
        sys.stderr.write("poolray: --pid and --list are for drivers without a cluster.\n")
        return 1

    def ask() -> str:
        return memory_summary(
            group_by=options.group_by,
            sort_by=options.sort_by,
            units=options.units,
            stats_only=options.stats_only,
            num_entries=options.num_entries,
        )

    return state_command.asking(options, ask)


if __name__ == "__main__":
    sys.exit(main())
