"""The commands of clusters: `poolray start`, `stop`, `status`, `drain-node`, `get-auth-token`.

What: puts them among the others; ends daemons; prints the token.
Who calls: `poolray/__main__.py`.
May touch: daemons, the token's file, standard streams.
Invariants: names and flags are those of the reference's.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from poolray.cluster import auth, launch
from poolray.cluster.speaking import fail, say
from poolray.cluster.start_command import add_start
from poolray.cluster.status_command import add_drain, add_status
from poolray.exceptions import PoolrayError


def add_commands(commands: Any) -> None:
    """Put the commands of clusters among the others."""
    add_start(commands)
    stop = commands.add_parser(
        "stop",
        help="end the daemons on this machine",
        description="End all daemons of this user on this machine, or those with a --temp-dir.",
    )
    stop.set_defaults(run=_stop)
    stop.add_argument("-f", "--force", action="store_true", help="kill them (SIGKILL)")
    stop.add_argument(
        "-g",
        "--grace-period",
        type=int,
        default=16,
        metavar="S",
        help="seconds until those that do not end are killed (default: 16)",
    )
    stop.add_argument("--temp-dir", help="only daemons that were started with it")
    add_status(commands)
    add_drain(commands)
    token = commands.add_parser(
        "get-auth-token",
        help="print the token that lets others in",
        description="Print this user's token for clusters.",
    )
    token.set_defaults(run=_get_token)
    token.add_argument("--generate", action="store_true", help="make one if there is none")
    token.add_argument("--auth-token-file", metavar="FILE", help="another file than the usual one")


# ---- stop ----------------------------------------------------------------------------------------


def _stop(options: argparse.Namespace) -> int:
    stopped, killed = launch.stop_all(options.temp_dir, options.force, options.grace_period)
    if not stopped:
        say("No daemons of poolray run here.")
        return 0
    say(f"Stopped {stopped} daemon(s)" + (f", {killed} of them by force." if killed else "."))
    return 0


# ---- tokens --------------------------------------------------------------------------------------


def _get_token(options: argparse.Namespace) -> int:
    try:
        if options.generate:
            token, source = auth.ensure_token(options.auth_token_file)
        else:
            found = auth.find_token(options.auth_token_file)
            if found is None:
                return fail(
                    "there is no token yet: `poolray start --head` makes one, and so does "
                    "`poolray get-auth-token --generate`"
                )
            token, source = found
    except PoolrayError as error:
        return fail(str(error))
    sys.stderr.write(f"(from {source})\n")
    say(token)
    return 0
