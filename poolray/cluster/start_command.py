"""`poolray start`: a head, or a node that joins a cluster.

What: turns flags into daemons' options, says what was started and how to join.
Who calls: `cluster/commands.py`.
May touch: daemons, the token's file, standard streams.
Invariants: flags have the names of the reference's; one that this version does not carry out is
refused with the reason, never ignored; a start that fails leaves nothing running.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
from typing import Any, final

from poolray.cluster import auth, launch, places
from poolray.cluster.asking import ask
from poolray.cluster.auth import AuthMode, Credentials
from poolray.cluster.options import HeadOptions, NodeOptions
from poolray.cluster.speaking import fail, say
from poolray.cluster.switch import split_address
from poolray.exceptions import AuthenticationError, PoolrayError
from poolray.local.machine import check_amounts
from poolray.objects.spill_urls import is_url
from poolray.protocol.cluster import AskWho, Who
from poolray.scheduling.labels import check_labels

#: The port of the head, as in the reference.
DEFAULT_PORT = 6379


def add_start(commands: Any) -> None:
    start = commands.add_parser(
        "start",
        help="start a head, or join a cluster with this machine",
        description="Start the daemons of a cluster on this machine: with --head a new cluster, "
        "with --address a node that joins one.",
    )
    start.set_defaults(run=_start)
    add = start.add_argument
    add("--head", action="store_true", help="start a cluster")
    add(
        "--address",
        metavar="HOST:PORT",
        help="join the cluster whose head is there; auto: the one of this machine",
    )
    add(
        "--port",
        type=_port,
        help=f"the head's port (default: {DEFAULT_PORT}; 0: any that is free)",
    )
    add(
        "--node-ip-address",
        metavar="IP",
        help="the address by which others reach this machine (default: found; without a token "
        "127.0.0.1)",
    )
    add("--node-manager-port", type=_port, default=0, help="the node's port (default: any)")
    add("--object-manager-port", type=_port, default=0, help="its port for values (default: any)")
    add("--min-worker-port", type=_port, help="the lowest port at which actors take direct calls")
    add("--max-worker-port", type=_port, help="the highest (default of both: any)")
    add("--worker-port-list", type=_ports, help="these ports instead, with commas between them")
    add("--num-cpus", type=int, help="CPUs that tasks may use at once (default: all)")
    add("--num-gpus", type=int, help="GPUs (default: those that are found)")
    add("--memory", type=int, metavar="BYTES", help="memory that tasks with memory= share")
    add("--resources", type=_numbers, default={}, metavar="JSON", help="custom resources")
    add("--labels", type=_labels, default={}, metavar="KEY=VALUE,...", help="labels of the node")
    add("--labels-file", metavar="FILE", help="the same in a file: JSON, or lines of KEY: VALUE")
    add("--object-store-memory", type=int, metavar="BYTES", help="shared memory for objects")
    add("--object-spilling-directory", metavar="DIR", help="where objects go that it cannot hold")
    add("--temp-dir", metavar="DIR", help="where state and logs go (default: POOLRAY_TMPDIR)")
    add("--storage", metavar="URL", help="the head's state: sqlite:///FILE or redis://HOST:PORT")
    add("--auth-token-file", metavar="FILE", help="the file with the cluster's token")
    add("--block", action="store_true", help="do not return until the daemons have ended")
    add("--include-dashboard", type=_boolean, help="true is refused: there is no dashboard yet")
    add("--include-log-monitor", type=_boolean, help="false is refused: output is always sent")
    add("--disable-usage-stats", action="store_true", help="nothing to do: there are none")
    add("--log-style", choices=["auto", "record"], help="nothing to do: output has no style")
    add("--log-color", choices=["auto", "false"], help="nothing to do: output has no colors")
    add("--system-config", type=_numbers, default={}, metavar="JSON", help=argparse.SUPPRESS)
    for name, reason in _REFUSED.items():
        add(f"--{name}", nargs="?", const="", help=argparse.SUPPRESS, action=_Refused, why=reason)


#: Flags of the reference's `ray start` that this version does not carry out, and why.
_NO_DASHBOARD = "this version of poolray has no dashboard"
_NO_ISOLATION = "this version of poolray sets no control groups up"
_REFUSED = {
    "ray-client-server-port": "this version takes no drivers from outside the cluster",
    "dashboard-host": _NO_DASHBOARD,
    "dashboard-port": _NO_DASHBOARD,
    "dashboard-agent-listen-port": _NO_DASHBOARD,
    "dashboard-agent-grpc-port": _NO_DASHBOARD,
    "proxy-server-url": _NO_DASHBOARD,
    "runtime-env-agent-port": "there is no agent of runtime environments to listen",
    "metrics-export-port": "drivers serve metrics: poolray.util.metrics.start_metrics_server",
    "plasma-directory": "the object store is memory without a file; objects that it cannot hold "
    "go to --object-spilling-directory",
    "autoscaling-config": "this version starts no machines by itself",
    "no-redirect-output": "daemons write to files: see where `poolray start` says that logs are",
    "ray-debugger-external": "there is no debugger to reach",
    "enable-resource-isolation": _NO_ISOLATION,
    "system-reserved-cpu": _NO_ISOLATION,
    "system-reserved-memory": _NO_ISOLATION,
    "cgroup-path": _NO_ISOLATION,
}


@final
class _Refused(argparse.Action):
    """A flag that is known and not carried out."""

    def __init__(self, *, why: str, **more: Any) -> None:
        super().__init__(**more)
        self._why = why

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string}: {self._why}")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: say a number from 0 to 65535")
    return int(text)


def _ports(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if not all(0 < port < 65536 for port in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ports, such as 10002,10003")
    return found


def _worker_ports(options: argparse.Namespace) -> list[int]:
    """Where actors take direct calls; empty: anywhere."""
    if options.worker_port_list:
        return list(options.worker_port_list)
    low, high = options.min_worker_port, options.max_worker_port
    if low is None and high is None:
        return []
    low, high = low or 1024, high or 65535
    if not 0 < low <= high < 65536:
        raise ValueError(f"there are no ports from --min-worker-port={low} to {high}")
    return list(range(low, high + 1))


def _numbers(text: str) -> dict[str, float]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(type(v) in (int, float) for v in found.values()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no JSON object of names and numbers, such as '{{\"disk\": 4}}'"
        )
    return found


def _labels(text: str) -> dict[str, str]:
    labels = _labels_in_json(text)
    if labels is None:
        labels = {}
        for part in filter(None, text.split(",")):
            key, equals, value = part.partition("=")
            if not equals or not key:
                raise argparse.ArgumentTypeError(f"{part!r} is no KEY=VALUE")
            labels[key.strip()] = value.strip()
    try:
        return check_labels(labels, may_be_reserved=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _labels_in_json(text: str) -> dict[str, str] | None:
    """None: it is something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    is_right = isinstance(found, dict) and all(isinstance(v, str) for v in found.values())
    return found if is_right else None


def _labels_of_file(path: str) -> dict[str, str]:
    """Labels in JSON, or in as much of YAML as names and values need.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        It holds something else.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read()
    labels = _labels_in_json(text)
    if labels is None:
        labels = {}
        for line in text.splitlines():
            bare = line.partition("#")[0].strip()
            key, colon, value = bare.partition(":")
            if not bare or bare == "---":
                continue
            if not colon or not key:
                raise ValueError(
                    f"--labels-file={path}: {line!r} is no label: say KEY: VALUE in each line, "
                    "such as 'gpu_type: A100', or write the labels as a JSON object"
                )
            labels[key.strip().strip("'\"")] = value.strip().strip("'\"")
    return check_labels(labels, may_be_reserved=True)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")


# ---- start ---------------------------------------------------------------------------------------


def _start(options: argparse.Namespace) -> int:
    problem = _contradiction(options)
    if problem:
        return fail(problem)
    try:
        check_amounts(
            options.num_cpus,
            options.num_gpus,
            options.resources,
            options.object_store_memory,
            options.memory,
        )
        return _start_head(options) if options.head else _start_node(options)
    except (PoolrayError, OSError, ValueError, TypeError) as error:
        return fail(str(error))


def _contradiction(options: argparse.Namespace) -> str:
    if options.head == bool(options.address):
        return "give either --head, to start a cluster, or --address=HOST:PORT, to join one"
    if options.include_dashboard:
        return "--include-dashboard=true: this version of poolray has no dashboard"
    if options.include_log_monitor is False:
        return "--include-log-monitor=false: use init(log_to_driver=False) in the driver"
    if not options.head and options.port is not None:
        return "--port is the head's: a node's own is --node-manager-port"
    if not options.head and options.storage:
        return "--storage is the head's"
    return ""


def _start_head(options: argparse.Namespace) -> int:
    token = source = ""
    if auth.mode() is AuthMode.TOKEN:
        token, source = auth.ensure_token(options.auth_token_file)
    host = _own_host(options) or (places.usual_host() if token else "127.0.0.1")
    port = DEFAULT_PORT if options.port is None else options.port
    if any(each.head_address == f"{host}:{port}" for each in places.listeners()):
        raise PoolrayError(
            f"a cluster is running at {host}:{port} already: end it with `poolray stop`, or start "
            "another one with --port=PORT (0: any that is free)"
        )
    temp = places.temp_dir(options.temp_dir)
    session = places.make_session_folder(temp)
    head = launch.start(
        HeadOptions(
            token=token,
            host=host,
            port=port,
            temp_dir=temp,
            session_folder=session,
            owner_pid=_owner_pid(options),
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
    say(f"A cluster is running: its head is at {address}, this machine is its first node.")
    say(f"  logs:   {session}/logs")
    say(f"  token:  {source}" if token else "  token:  none: only this machine can join")
    say("")
    say("To add another machine, run there" + (", with the same token:" if token else ":"))
    say(f"  poolray start --address={address}")
    if token:
        say("  (`poolray get-auth-token` prints the token here; hand it over in a file with mode")
        say("  0600 named by --auth-token-file, or in POOLRAY_AUTH_TOKEN.)")
    say("To use it from a program on one of its machines:")
    say(f"  poolray.init(address={address!r})     # or POOLRAY_ADDRESS={address}")
    say("To look at it, and to end it:")
    say(f"  poolray status --address={address}")
    say("  poolray stop")
    return _finish(options, [node, head])


def _start_node(options: argparse.Namespace) -> int:
    address = launch.resolve_auto(options.address)
    split_address(address)
    credentials, token = _credentials(address, options.auth_token_file)
    # In words and within seconds, before anything is started.
    ask(address, AskWho(), Who, credentials)
    host = _own_host(options) or _host_towards(address, bool(token))
    temp = places.temp_dir(options.temp_dir)
    session = places.make_session_folder(temp)
    node = launch.start(_node_options(options, token, address, host, temp, session))
    say(f"This machine is a node of the cluster at {address} now, at {node.ready.address}.")
    say(f"  logs:   {session}/logs")
    say("To leave the cluster:")
    say("  poolray stop")
    return _finish(options, [node])


def _credentials(address: str, path: str | None) -> tuple[Credentials | None, str]:
    if auth.mode() is AuthMode.DISABLED:
        return None, ""
    found = auth.find_token(path)
    if found is None:
        launch.credentials_for(address)  # raises, with what to do
        raise AuthenticationError(f"there is no token for {address}")
    return Credentials.of(found[0]), found[0]


def _own_host(options: argparse.Namespace) -> str:
    """The address that this machine is said to have; empty: none is said."""
    given: str = options.node_ip_address or ""
    try:
        return socket.gethostbyname(given) if given and ":" not in given else given
    except OSError as error:
        raise ValueError(f"--node-ip-address={given}: {error.strerror}") from error


def _host_towards(address: str, has_token: bool) -> str:
    """Loopback for a head on loopback; else the address that the way to it has."""
    head_host, _ = split_address(address)
    if not has_token or auth.is_loopback(head_host):
        return "127.0.0.1"
    return places.usual_host()


def _node_options(
    options: argparse.Namespace, token: str, address: str, host: str, temp: str, session: str
) -> NodeOptions:
    labels = options.labels
    if options.labels_file:
        labels = {**_labels_of_file(options.labels_file), **labels}
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
        bulk_port=options.object_manager_port,
        worker_ports=_worker_ports(options),
        temp_dir=temp,
        session_folder=session,
        is_head=bool(options.head),
        owner_pid=_owner_pid(options),
        num_gpus=options.num_gpus,
        memory_bytes=options.memory,
        resources=options.resources,
        labels=labels,
        spill_directories=[spill if is_url(spill) else os.path.abspath(spill)] if spill else [],
        config=config,
    )


def _owner_pid(options: argparse.Namespace) -> int:
    """Whose end is the daemons': with --block this process's, however it ends."""
    return os.getpid() if options.block else 0


class _Terminated(BaseException):
    """This process was asked to end."""


def _terminate(*_: object) -> None:
    raise _Terminated


def _finish(options: argparse.Namespace, daemons: list[launch.Daemon]) -> int:
    """Leave the daemons to themselves, or wait until one of them ends, and end them all."""
    if not options.block:
        for each in daemons:
            each.leave()
        return 0
    signal.signal(signal.SIGTERM, _terminate)
    code: int | None = 0
    try:
        say("\nCtrl-C ends them.")
        code = launch.wait_for_any(daemons)
    except (KeyboardInterrupt, _Terminated):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for each in daemons:
        each.stop()
    return 1 if code else 0
