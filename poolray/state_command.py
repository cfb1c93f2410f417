"""`poolray list`, `get`, `summary` and `timeline`: what goes on in a cluster, asked from a shell.

What: attaches to the cluster as a program does, asks as `poolray.util.state` does, prints a table
or JSON.
Who calls: the command line.
May touch: the cluster's daemons; `timeline` writes a file.
Invariants: asking changes nothing but the list of jobs, where it is one; a node that does not
answer is an error of the command, after what the others know.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

from poolray.exceptions import PoolrayError

_KINDS = (
    "actors",
    "jobs",
    "placement-groups",
    "nodes",
    "workers",
    "tasks",
    "objects",
    "runtime-envs",
    "cluster-events",
)
_GETS = ("actors", "placement-groups", "nodes", "workers", "tasks", "objects", "jobs")
_SUMMARIES = ("tasks", "actors", "objects")
_CELL_CHARS_MAX = 80


def add_commands(commands: Any) -> None:
    """Put these among the commands."""
    listing = commands.add_parser(
        "list",
        help="tasks, actors, nodes and so on of a cluster",
        description="List what there is in a cluster and was not long ago, of all its nodes.",
    )
    listing.set_defaults(run=_list)
    listing.add_argument("resource", choices=_KINDS)
    add = listing.add_argument
    add("-f", "--filter", action="append", default=[], metavar="KEY=VALUE", help="or KEY!=VALUE")
    add("--limit", type=int, default=100, help="rows at the most (default: 100)")
    add("--detail", action="store_true", help="all columns")
    add("--format", choices=["table", "json"], default="table")
    getting = commands.add_parser(
        "get",
        help="one task, actor, node and so on of a cluster, by its id",
        description="Show all that is known of one thing.",
    )
    getting.set_defaults(run=_get)
    getting.add_argument("resource", choices=_GETS)
    getting.add_argument("id", help="hexadecimal digits, as lists show them")
    summary = commands.add_parser(
        "summary",
        help="numbers of tasks, actors or objects of a cluster",
        description="Count tasks by function and state, actors by class and state, or objects.",
    )
    summary.set_defaults(run=_summary)
    summary.add_argument("resource", choices=_SUMMARIES)
    for parser in (listing, getting, summary):
        parser.add_argument(
            "--timeout", type=int, default=30, metavar="S", help="seconds that nodes have to answer"
        )
    timeline = commands.add_parser(
        "timeline",
        help="what ran where and when in a cluster, for chrome://tracing",
        description="Write what ran where and when to a file, for chrome://tracing or Perfetto.",
    )
    timeline.set_defaults(run=_timeline)
    timeline.add_argument("-o", "--output", metavar="FILE", help="default: one with the date here")
    for parser in (listing, getting, summary, timeline):
        parser.add_argument(
            "--address",
            help="HOST:PORT, or poolray://HOST:PORT from outside (default: POOLRAY_ADDRESS, then "
            "the cluster of this machine)",
        )


def asking(options: argparse.Namespace, ask: Callable[[], str]) -> int:
    """Attach to the cluster, ask, print; gives the exit code."""
    from poolray import session
    from poolray.cluster import launch
    from poolray.cluster.speaking import fail, say

    address = options.address or os.environ.get("POOLRAY_ADDRESS") or launch.find_head()
    if address is None:
        return fail("no cluster runs on this machine: name one with --address=HOST:PORT")
    try:
        session.init(address=address, log_to_driver=False)
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always", UserWarning)
                text = ask()
        finally:
            session.shutdown()
    except (PoolrayError, ValueError, OSError) as error:
        return fail(str(error))
    say(text)
    incomplete = [str(each.message) for each in warned if each.category is UserWarning]
    return fail(incomplete[0]) if incomplete else 0


def _list(options: argparse.Namespace) -> int:
    filters = []
    for given in options.filter:
        name, sign, value = given.partition("!=" if "!=" in given else "=")
        if not sign:
            from poolray.cluster.speaking import fail

            return fail(f"--filter {given}: say KEY=VALUE or KEY!=VALUE")
        filters.append((name.strip(), sign, _value(value.strip())))

    def ask() -> str:
        from poolray.util import state

        rows = getattr(state, f"list_{options.resource.replace('-', '_')}")(
            filters=filters,
            limit=options.limit,
            timeout=options.timeout,
            detail=options.detail,
            raise_on_missing_output=False,
        )
        found = [dataclasses.asdict(row) for row in rows]
        return _json(found) if options.format == "json" else _table(options.resource, found)

    return asking(options, ask)


def _value(text: str) -> Any:
    """A value to compare with, as the column has it."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.isdecimal() else text


def _get(options: argparse.Namespace) -> int:
    def ask() -> str:
        from poolray.util import state

        kind = options.resource.replace("-", "_")
        name = kind if kind == "objects" else kind.removesuffix("s")
        found = getattr(state, f"get_{name}")(options.id, timeout=options.timeout)
        if not found:
            raise ValueError(f"nothing is known of {options.resource} {options.id}")
        rows = found if isinstance(found, list) else [found]
        return _json([dataclasses.asdict(row) for row in rows])

    return asking(options, ask)


def _summary(options: argparse.Namespace) -> int:
    def ask() -> str:
        from poolray.util import state

        count = getattr(state, f"summarize_{options.resource}")
        return _json(count(timeout=options.timeout, raise_on_missing_output=False)["cluster"])

    return asking(options, ask)


def _timeline(options: argparse.Namespace) -> int:
    path = options.output or time.strftime("poolray-timeline-%Y-%m-%d_%H-%M-%S.json")

    def ask() -> str:
        from poolray.cluster_state import timeline

        timeline(path)
        return f"Written to {path}: open it in chrome://tracing or at https://ui.perfetto.dev"

    return asking(options, ask)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str)


def _table(what: str, rows: list[dict[str, Any]]) -> str:
    """Columns that say something, under their names."""
    lines = [f"{what}: {len(rows)}"]
    names = [
        name for name in (rows[0] if rows else {}) if any(row[name] is not None for row in rows)
    ]
    cells = [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    for line in [names, *cells] if rows else []:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= _CELL_CHARS_MAX else text[: _CELL_CHARS_MAX - 3] + "..."
