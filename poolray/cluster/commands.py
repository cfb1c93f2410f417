"""`poolray start`, `stop`, `status` and `get-auth-token`: clusters from the command line.

What: turns flags into daemons' options, says what was started and how to join, what there is, and
what was stopped.
Who calls: `poolray/__main__.py`.
May touch: daemons, the token's file, standard streams.
Invariants: flags have the names of the reference's; one that this version does not carry out is
refused, never ignored; a start that fails leaves nothing running.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from poolray.cluster import auth, launch, places
from poolray.cluster.asking import ask
from poolray.cluster.auth import AuthMode, Credentials
from poolray.cluster.options import HeadOptions, NodeOptions
from poolray.cluster.switch import split_address
from poolray.exceptions import AuthenticationError, PoolrayError
from poolray.protocol.cluster import AskNodes, AskWho, Nodes, Who
from poolray.protocol.directory import NodeRow, NodeStatus
from poolray.scheduling.resources import from_fixed

#: The port of the head, as in the reference.
DEFAULT_PORT = 6379
_GIB = 1 << 30


def add_commands(commands: Any) -> None:
    """Put the commands of clusters among the others."""
    _add_start(commands)
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
    status = commands.add_parser(
        "status",
        help="nodes, resources and what waits",
        description="Print the nodes of a cluster, what they have, what of it is used, and how "
        "many tasks wait.",
    )
    status.set_defaults(run=_status)
    status.add_argument(
        "--address", help="HOST:PORT (default: POOLRAY_ADDRESS, then the cluster of this machine)"
    )
    status.add_argument("--auth-token-file", metavar="FILE", help="the file with its token")
    token = commands.add_parser(
        "get-auth-token",
        help="print the token that lets others in",
        description="Print this user's token for clusters.",
    )
    token.set_defaults(run=_get_token)
    token.add_argument("--generate", action="store_true", help="make one if there is none")
    token.add_argument("--auth-token-file", metavar="FILE", help="another file than the usual one")


def _add_start(commands: Any) -> None:
    start = commands.add_parser(
        "start",
        help="start a head, or join a cluster with this machine",
        description="Start the daemons of a cluster on this machine: with --head a new cluster, "
        "with --address a node that joins one.",
    )
    start.set_defaults(run=_start)
    add = start.add_argument
    add("--head", action="store_true", help="start a cluster")
    add("--address", metavar="HOST:PORT", help="join the cluster whose head is there")
    add(
        "--port",
        type=int,
        help=f"the head's port (default: {DEFAULT_PORT}; 0: any that is free)",
    )
    add(
        "--node-ip-address",
        metavar="IP",
        help="the address by which others reach this machine (default: found; without a token "
        "127.0.0.1)",
    )
    add("--node-manager-port", type=int, default=0, help="the node's port (default: any)")
    add("--num-cpus", type=int, help="CPUs that tasks may use at once (default: all)")
    add("--num-gpus", type=int, help="GPUs (default: those that are found)")
    add("--memory", type=int, metavar="BYTES", help="memory that tasks with memory= share")
    add("--resources", type=_numbers, default={}, metavar="JSON", help="custom resources")
    add("--labels", type=_labels, default={}, metavar="KEY=VALUE,...", help="labels of the node")
    add("--labels-file", metavar="FILE", help="the same, JSON in a file")
    add("--object-store-memory", type=int, metavar="BYTES", help="shared memory for objects")
    add("--object-spilling-directory", metavar="DIR", help="where objects go that it cannot hold")
    add("--temp-dir", metavar="DIR", help="where state and logs go (default: POOLRAY_TMPDIR)")
    add("--storage", metavar="URL", help="the head's state: sqlite:///FILE or redis://HOST:PORT")
    add("--auth-token-file", metavar="FILE", help="the file with the cluster's token")
    add("--block", action="store_true", help="do not return until the daemons have ended")
    add("--include-dashboard", type=_boolean, help="true is refused: there is no dashboard yet")
    add("--disable-usage-stats", action="store_true", help="nothing to do: there are none")
    add("--system-config", type=_numbers, default={}, metavar="JSON", help=argparse.SUPPRESS)
    for name in ("min-worker-port", "max-worker-port", "ray-client-server-port"):
        add(f"--{name}", type=int, help=argparse.SUPPRESS)


def _numbers(text: str) -> dict[str, float]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(v, (int, float)) for v in found.values()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no JSON object of names and numbers, such as '{{\"disk\": 4}}'"
        )
    return found


def _labels(text: str) -> dict[str, str]:
    labels = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise argparse.ArgumentTypeError(f"{part!r} is no KEY=VALUE")
        labels[key.strip()] = value.strip()
    return labels


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")


# ---- start ---------------------------------------------------------------------------------------


def _start(options: argparse.Namespace) -> int:
    problem = _contradiction(options)
    if problem:
        return _fail(problem)
    try:
        return _start_head(options) if options.head else _start_node(options)
    except (PoolrayError, OSError, ValueError) as error:
        return _fail(str(error))


def _contradiction(options: argparse.Namespace) -> str:
    if options.head == bool(options.address):
        return "give either --head, to start a cluster, or --address=HOST:PORT, to join one"
    if options.include_dashboard:
        return "--include-dashboard=true: this version of poolray has no dashboard"
    if options.ray_client_server_port is not None:
        return "--ray-client-server-port: this version takes no drivers from outside the cluster"
    if options.min_worker_port is not None or options.max_worker_port is not None:
        return "workers listen on no ports: leave --min-worker-port and --max-worker-port out"
    if not options.head and options.port is not None:
        return "--port is the head's: a node's own is --node-manager-port"
    if not options.head and options.storage:
        return "--storage is the head's"
    return ""


def _start_head(options: argparse.Namespace) -> int:
    token = source = ""
    if auth.mode() is AuthMode.TOKEN:
        token, source = auth.ensure_token(options.auth_token_file)
    host = options.node_ip_address or (places.usual_host() if token else "127.0.0.1")
    temp = places.temp_dir(options.temp_dir)
    session = places.make_session_folder(temp)
    head = launch.start(
        HeadOptions(
            token=token,
            host=host,
            port=DEFAULT_PORT if options.port is None else options.port,
            temp_dir=temp,
            session_folder=session,
            storage=options.storage or f"sqlite:///{session}/head.db",
            config=options.system_config,
        )
    )
    address = head.ready.address
    try:
        node = launch.start(_node_options(options, token, address, host, temp, session))
    except BaseException:
        head.stop()
        raise
    _say(f"A cluster is running: its head is at {address}, this machine is its first node.")
    _say(f"  logs:   {session}/logs")
    _say(f"  token:  {source}" if token else "  token:  none: only this machine can join")
    _say("")
    _say("To add another machine, run there" + (", with the same token:" if token else ":"))
    _say(f"  poolray start --address={address}")
    if token:
        _say("  (`poolray get-auth-token` prints the token here; hand it over in a file with mode")
        _say("  0600 named by --auth-token-file, or in POOLRAY_AUTH_TOKEN.)")
    _say("To use it from a program on one of its machines:")
    _say(f"  poolray.init(address={address!r})     # or POOLRAY_ADDRESS={address}")
    _say("To look at it, and to end it:")
    _say(f"  poolray status --address={address}")
    _say("  poolray stop")
    return _finish(options, [node, head])


def _start_node(options: argparse.Namespace) -> int:
    address = options.address
    split_address(address)
    credentials, token = _credentials(address, options.auth_token_file)
    # In words and within seconds, before anything is started.
    ask(address, AskWho(), Who, credentials)
    host = options.node_ip_address or _host_towards(address, bool(token))
    temp = places.temp_dir(options.temp_dir)
    session = places.make_session_folder(temp)
    node = launch.start(_node_options(options, token, address, host, temp, session))
    _say(f"This machine is a node of the cluster at {address} now, at {node.ready.address}.")
    _say(f"  logs:   {session}/logs")
    _say("To leave the cluster:")
    _say("  poolray stop")
    return _finish(options, [node])


def _credentials(address: str, path: str | None) -> tuple[Credentials | None, str]:
    if auth.mode() is AuthMode.DISABLED:
        return None, ""
    found = auth.find_token(path)
    if found is None:
        launch.credentials_for(address)  # raises, with what to do
        raise AuthenticationError(f"there is no token for {address}")
    return Credentials.of(found[0]), found[0]


def _host_towards(address: str, has_token: bool) -> str:
    """Loopback for a head on loopback; else the address that the way to it has."""
    head_host, _ = split_address(address)
    if not has_token or auth.is_loopback(head_host):
        return "127.0.0.1"
    return places.usual_host()


def _node_options(
    options: argparse.Namespace, token: str, address: str, host: str, temp: str, session: str
) -> NodeOptions:
    labels = dict(options.labels)
    if options.labels_file:
        with open(options.labels_file, encoding="utf-8") as file:
            labels = {**json.load(file), **labels}
    config: dict[str, int | float] = dict(options.system_config)
    if options.num_cpus is not None:
        config["num_cpus"] = options.num_cpus
    if options.object_store_memory is not None:
        config["object_store_memory_bytes"] = options.object_store_memory
    spill = options.object_spilling_directory
    return NodeOptions(
        token=token,
        head_address=address,
        host=host,
        port=options.node_manager_port,
        temp_dir=temp,
        session_folder=session,
        is_head=bool(options.head),
        num_gpus=options.num_gpus,
        memory_bytes=options.memory,
        resources=options.resources,
        labels=labels,
        spill_directories=[os.path.abspath(spill)] if spill else [],
        config=config,
    )


def _finish(options: argparse.Namespace, daemons: list[launch.Daemon]) -> int:
    """Leave the daemons to themselves, or wait for their end."""
    if not options.block:
        for daemon in daemons:
            daemon.leave()
        return 0
    _say("\nCtrl-C ends them.")
    try:
        code = daemons[0].wait()
    except KeyboardInterrupt:
        code = 0
    for daemon in daemons:
        daemon.stop()
    return 1 if code else 0


# ---- stop, status --------------------------------------------------------------------------------


def _stop(options: argparse.Namespace) -> int:
    stopped, killed = launch.stop_all(options.temp_dir, options.force, options.grace_period)
    if not stopped:
        _say("No daemons of poolray run here.")
        return 0
    _say(f"Stopped {stopped} daemon(s)" + (f", {killed} of them by force." if killed else "."))
    return 0


def _status(options: argparse.Namespace) -> int:
    address = options.address or os.environ.get("POOLRAY_ADDRESS") or launch.find_head()
    if address is None:
        return _fail("no cluster runs on this machine: name one with --address=HOST:PORT")
    try:
        credentials = launch.credentials_for(address, options.auth_token_file)
        nodes = ask(address, AskNodes(), Nodes, credentials)
    except (PoolrayError, ValueError) as error:
        return _fail(str(error))
    _say(format_status(address, nodes))
    return 0


def format_status(address: str, nodes: Nodes) -> str:
    """A cluster in words."""
    alive = [row for row in nodes.nodes if row.status is not NodeStatus.DEAD]
    lines = [f"Cluster at {address}", "", f"Nodes: {len(alive)}, jobs: {nodes.jobs}"]
    lines += [_describe(row) for row in nodes.nodes]
    lines += ["", "Resources, used/total:"]
    total: dict[str, int] = {}
    free: dict[str, int] = {}
    for row in alive:
        for name, amount in row.total.items():
            total[name] = total.get(name, 0) + amount
            free[name] = free.get(name, 0) + row.available.get(name, 0)
    used = from_fixed({name: total[name] - free[name] for name in total})
    for name, whole in sorted(from_fixed(total).items()):
        if not name.startswith("node:"):
            lines.append(f"  {_amount(name, used.get(name, 0.0))}/{_amount(name, whole)} {name}")
    waiting = sum(row.queued_tasks for row in alive)
    lines += ["", f"Waiting tasks: {waiting}" if waiting else "Waiting tasks: none"]
    return "\n".join(lines)


def _describe(row: NodeRow) -> str:
    state = {
        NodeStatus.ALIVE: "alive",
        NodeStatus.DRAINING: "is being drained",
        NodeStatus.DEAD: "dead",
    }[row.status]
    host = row.info.get("hostname", "")
    head = ", the head's" if row.info.get("is_head") else ""
    reason = f": {row.reason}" if row.reason else ""
    return f"  {row.node_id.hex()[:12]}  {row.address}  {host}  {state}{head}{reason}"


def _amount(name: str, amount: float) -> str:
    if name in ("memory", "object_store_memory"):
        return f"{amount / _GIB:.2f}GiB"
    return f"{amount:g}"


# ---- tokens --------------------------------------------------------------------------------------


def _get_token(options: argparse.Namespace) -> int:
    try:
        if options.generate:
            token, source = auth.ensure_token(options.auth_token_file)
        else:
            found = auth.find_token(options.auth_token_file)
            if found is None:
                return _fail(
                    "there is no token yet: `poolray start --head` makes one, and so does "
                    "`poolray get-auth-token --generate`"
                )
            token, source = found
    except PoolrayError as error:
        return _fail(str(error))
    sys.stderr.write(f"(from {source})\n")
    _say(token)
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _fail(text: str) -> int:
    sys.stderr.write(f"poolray: {text}\n")
    return 1
