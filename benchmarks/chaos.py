"""Does a cluster give right answers while everything but the driver is killed again and again?

What: a cluster of real daemons, a shuffle and actors on it, and every few seconds a `kill -9` of a
worker, a fork server, a node's daemon, a whole node or the head; then what was killed, run again
and waited for, and whether anything is left behind.
Who calls: `make chaos`, the tests.
May touch: processes that it has started, a temporary folder, the clock.
Invariants: one seed draws one list of kills (when they hit what is up to the machine); it fails
when an answer is wrong, when an answer does not come, and when something is left.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

import poolray
from benchmarks import _chaos_work as work
from poolray.cluster_utils import Cluster, ClusterNode

#: All that this run starts has it in its environment.
_MARK = "POOLRAY_CHAOS_RUN"
#: Kinds of kills, and how often each is drawn.
_WEIGHTS = {
    "worker": 8,
    "fork server": 2,
    "node daemon": 3,
    "node with all its workers": 3,
    "head": 3,
    "head, then a node": 1,
}
_CONFIG = {"heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 2.0}
#: What was killed must be gone, with all that it had started, after this long.
_ENDS_S = 5.0


class Chaos:
    """A cluster, and what happens to it."""

    def __init__(
        self, seed: int, nodes: int, every_s: float, verbose: bool, driver_cpus: int
    ) -> None:
        self._draw = random.Random(seed)
        #: Each kind has its turn before they are drawn: so that a short run has seen them all.
        self._turns = list(_WEIGHTS)
        self._draw.shuffle(self._turns)
        self._every_s = every_s
        self._verbose = verbose
        self.kills: collections.Counter[str] = collections.Counter()
        self.outlived: list[str] = []
        self._began_s = time.monotonic()
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": driver_cpus, "_system_config": _CONFIG},
        )
        for _ in range(nodes - 1):
            self._add_node()

    def _say(self, text: str) -> None:
        if self._verbose:
            print(f"{time.monotonic() - self._began_s:7.1f} s  {text}", flush=True)

    def _add_node(self) -> None:
        self.cluster.add_node(num_cpus=2)

    # ---- kills -----------------------------------------------------------------------------------

    def run(self, until_s: float, has_failed: Callable[[], bool]) -> None:
        """Kill, until that time."""
        while not has_failed():
            pause_s = self._draw.uniform(0.5, 1.5) * self._every_s
            if time.monotonic() + pause_s > until_s:
                return
            _wait(pause_s, has_failed)
            self._kill(self._turns.pop() if self._turns else self._drawn())

    def _drawn(self) -> str:
        return self._draw.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]

    def _kill(self, kind: str) -> None:
        nodes = self.cluster.list_all_nodes()
        # The driver's node owns what the driver makes: what becomes of that node is the driver's
        # fate too, as in the reference. So the first one is spared; without CPUs it has no work.
        victim = self._draw.choice(nodes[1:])
        if kind == "head":
            self.kills[kind] += 1
            self._say("kill the head")
            self.cluster.kill_head()
            time.sleep(self._draw.uniform(0.0, 3.0))
            self.cluster.restart_head()
            self._say("the head is back")
        elif kind == "head, then a node":
            self.kills[kind] += 1
            self._say(f"kill the head, then {victim}")
            self.cluster.kill_head()
            self._kill_node(victim, whole=True)
            time.sleep(self._draw.uniform(0.0, 2.0))
            self.cluster.restart_head()
            self._add_node()
        elif kind.startswith("node"):
            self.kills[kind] += 1
            self._say(f"kill {victim}: {kind}")
            self._kill_node(victim, whole="workers" in kind)
            time.sleep(self._draw.uniform(0.0, 1.0))
            self._add_node()
        else:
            self._kill_process(kind, self._draw.sample(nodes, len(nodes)))

    def _kill_process(self, kind: str, nodes: list[ClusterNode]) -> None:
        """A worker, or the process that workers are forked from, of the first node that has one."""
        for node in nodes:
            servers = _children(node.pid)
            workers = [worker for server in servers for worker in _children(server.pid)]
            found = workers if kind == "worker" else servers
            if found:
                victim = self._draw.choice(sorted(found, key=lambda process: process.pid))
                self._say(f"kill {kind} {victim.pid} of {node}")
                self.kills[kind] += _signal(victim.pid)
                return

    def _kill_node(self, node: ClusterNode, whole: bool) -> None:
        daemon = psutil.Process(node.pid)
        family = daemon.children(recursive=True)
        if whole:
            for process in family:
                _signal(process.pid)
        self.cluster.remove_node(node, allow_graceful=False)
        _, alive = psutil.wait_procs(family, timeout=_ENDS_S)
        self.outlived += [f"{_describe(process)} of {node}" for process in alive]

    def stop(self) -> None:
        """End the cluster."""
        poolray.shutdown()
        self.cluster.shutdown()

    def dump(self) -> None:
        """Where everybody is, for who looks into a hang."""
        for node in self.cluster.list_all_nodes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(node.pid, signal.SIGUSR1)
        faulthandler.dump_traceback(all_threads=True)


def _wait(pause_s: float, has_failed: Callable[[], bool]) -> None:
    until_s = time.monotonic() + pause_s
    while time.monotonic() < until_s and not has_failed():
        time.sleep(0.05)


def _children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [p for p in psutil.Process(pid).children() if p.status() != psutil.STATUS_ZOMBIE]
    return []


def _signal(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return f"process {process.pid} ({' '.join(process.cmdline())[:80]})"
    return f"process {process.pid}"


# ---- what is left --------------------------------------------------------------------------------


def _marked(mark: str) -> Iterator[str]:
    """Processes of this run, this one apart."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_ours = process.pid != os.getpid() and process.environ().get(_MARK) == mark
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                yield _describe(process)


def _sockets(mark: str) -> Iterator[str]:
    """Sockets with names, of daemons of this run: their addresses are this cluster's alone."""
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines():
        if mark in line:
            yield line.split()[-1]


def _shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def leftovers(mark: str, address: str, temp: str, shared_before: set[str]) -> list[str]:
    """What this run has not cleared away, after a moment for what is about to end."""
    deadline_s = time.monotonic() + _ENDS_S
    while True:
        found = [f"{p} runs" for p in _marked(mark)]
        found += [f"socket {name}" for name in _sockets(address)]
        # (Others on this machine have shared memory too, under names that are not ours.)
        found += [f"/dev/shm/{n}" for n in _shared_memory() - shared_before if "poolray" in n]
        found += [f"file {path}" for path in Path(temp).rglob("*")]
        if not found or time.monotonic() > deadline_s:
            return found
        time.sleep(0.05)


# ---- the run -------------------------------------------------------------------------------------


def run(
    seconds: float,
    seed: int,
    nodes: int = 4,
    every_s: float = 3.0,
    verbose: bool = False,
    driver_cpus: int = 0,
) -> dict[str, Any]:
    """The whole run; gives its figures. `errors` and `leftovers` are empty when all went well."""
    mark, usual_temp = f"{os.getpid()}-{seed}", tempfile.gettempdir()
    temp = tempfile.mkdtemp(prefix="poolray-chaos-")
    journal = tempfile.mkdtemp(prefix="poolray-journal-")
    environment = {_MARK: mark, "TMPDIR": temp}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    tempfile.tempdir = temp
    shared_before = _shared_memory()
    errors: list[str] = []
    counts = {"shuffle rounds": 0, "actor calls": 0}
    pulse = work.Pulse()
    chaos = Chaos(seed, nodes, every_s, verbose, driver_cpus)
    address = chaos.cluster.address
    until_s = time.monotonic() + seconds

    def guard(name: str, program: Callable[..., int]) -> None:
        try:
            counts[name] = program(
                journal, seed, lambda: time.monotonic() > until_s or bool(errors), pulse
            )
        except BaseException:
            if not errors:
                chaos.dump()
            errors.append(f"{name}: {traceback.format_exc()}")

    try:
        poolray.init(address=address, namespace=work.NAMESPACE, log_to_driver=verbose)
        programs = {"shuffle rounds": work.shuffle, "actor calls": work.keep_accounts}
        threads = [threading.Thread(target=guard, args=item) for item in programs.items()]
        for thread in threads:
            thread.start()
        try:
            chaos.run(until_s, lambda: bool(errors))
        except Exception:  # its reason may be that of what a program has met first: both are told
            errors.append(f"kills: {traceback.format_exc()}")
        for thread in threads:
            thread.join()
        if errors:
            _keep_logs(chaos.cluster.session_folder, usual_temp)
    finally:
        chaos.stop()
    left = leftovers(mark, address, temp, shared_before)
    journal_read = work.Journal(journal)
    tempfile.tempdir = None
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    for folder in (temp, journal):
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "seconds": seconds,
        "seed": seed,
        "nodes": nodes,
        "kills": dict(chaos.kills),
        **counts,
        "tasks run": journal_read.runs,
        "retries": journal_read.retries,
        "reconstructions": journal_read.reconstructions,
        "actor restarts": journal_read.restarts,
        "longest stall s": {k: round(v, 2) for k, v in pulse.longest_s.items()},
        "outlived their node": chaos.outlived,
        "leftovers": left,
        "errors": errors,
    }


def _keep_logs(folder: str, temp: str) -> None:
    """What daemons wrote, for who looks into a failure."""
    kept = tempfile.mkdtemp(prefix="poolray-chaos-logs-", dir=temp)
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    print(f"logs of the daemons: {kept}", file=sys.stderr)


def main() -> int:
    """Run, print figures; 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="(default: a random one, printed)")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument(
        "--every", type=float, default=3.0, help="seconds between kills, on average"
    )
    parser.add_argument(
        "--driver-cpus",
        type=int,
        default=0,
        help="of the driver's node, which is spared; 0: all nodes that work are killed",
    )
    parser.add_argument("--verbose", action="store_true", help="print each kill")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    seed = arguments.seed
    if seed is None:
        seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}, {arguments.minutes:g} minutes, {arguments.nodes} nodes", flush=True)
    figures = run(
        arguments.minutes * 60.0,
        seed,
        arguments.nodes,
        arguments.every,
        arguments.verbose,
        arguments.driver_cpus,
    )
    for name, value in figures.items():
        if name == "errors":
            value = f"{len(value)}"
        print(f"{name:20} {value}")
    for error in figures["errors"]:
        print(error, file=sys.stderr)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")
    is_well = not (figures["errors"] or figures["leftovers"] or figures["outlived their node"])
    print("everything is right and nothing is left" if is_well else "SOMETHING IS WRONG")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
