"""The house rules: imports go only downward, and who decides does no I/O.

What: parses every import under `poolray/`, also inside functions and under `TYPE_CHECKING`, and
compares it with the two tables below.
Who calls it: pytest. The tests at the end feed it small sources, to show what it catches.
May touch: the sources of the package, which it reads and never imports.
Invariants: a module without a place in `FLOORS` is a fault, so each room is placed knowingly.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "poolray"


@dataclass(frozen=True)
class Floor:
    """Rooms at one height. `open_plan` lets them import each other; Python refuses a circle."""

    rooms: tuple[str, ...]
    open_plan: bool = False


# From the ground up. A room is the first name below `poolray`; "poolray" is the package itself.
FLOORS = (
    Floor(("ids", "public_ids", "exceptions", "config", "_version"), open_plan=True),
    Floor(("protocol",)),
    Floor(("tasks", "actors", "objects", "scheduling")),
    Floor(("node", "head")),
    Floor(("direct",)),
    Floor(
        (
            *(
                "client",
                "client_functions",
                "client_link",
                "client_references",
                "client_futures",
                "client_values",
            ),
            *("client_rest", "client_waits"),
        ),
        open_plan=True,
    ),
    Floor(("runtime_env",)),
    Floor(("local", "cluster")),
    Floor(
        (
            "api",
            "remote_function",
            "remote_signature",
            "runtime_context",
            "actor",
            "actor_calls",
            "actor_options",
            "actor_methods",
            "binding",
            "cluster_state",
            "survey",
            "cluster_connection",
            "remote_groups",
            "generators",
            "remote_placement",
            "remote_strategies",
            "session",
            "init_checks",
            "plain_values",
            "wait_lists",
        ),
        open_plan=True,
    ),
    Floor(
        (
            "pool",
            "executor",
            "util",
            "dag",
            "multiprocessing",
            "backends",
            "experimental",
            *("cluster_utils", "cluster_calls", "cluster_insights"),
        ),
        open_plan=True,
    ),
    Floor(("dashboard", "launcher")),
    Floor((PACKAGE, "__main__", "state_command", "logs_command"), open_plan=True),
)
HEIGHT_BY_ROOM = {room: height for height, floor in enumerate(FLOORS) for room in floor.rooms}

# (importing room, imported room) -> the modules that may be imported in this step sideways.
SIDEWAYS_LINES = {
    ("cluster", "local"): {
        *("workers", "channel", "reactor", "node_shell", "fork_server", "machine", "process_state"),
        *("callbacks", "news", "direct_host", "log_files"),
    }
}

# Narrower than the floors. Records of tasks belong to the machine that runs them: room -> who may
# import it.
OPEN_ONLY_TO = {"tasks": {"node"}}
# An effect is told in words of the wire, so that a shell needs nothing of the machine: module ->
# the rooms of ours that it may import.
IMPORTS_ONLY_FROM = {"poolray.node.effects": {"ids", "protocol"}}

DECIDING_ROOMS = {"tasks", "actors", "objects", "scheduling", "node", "head"}
# These stand in deciding rooms and do nothing but I/O, for the shells to use.
IO_MODULES = (
    "poolray.objects.shared_memory",
    "poolray.objects.spill_files",
    "poolray.objects.spill_urls",
    "poolray.head.storage_*",
    "poolray.scheduling.accelerators",
)
# What packs a user's values, and what a user holds in the hand: they run in clients, on the threads
# of users. Machines never see a value.
VALUE_MODULES = (
    *("poolray.objects.serialization", "poolray.objects.reducers", "poolray.objects.object_ref"),
)

# What a decider must not import -> what it would be doing.
BANNED = {
    **dict.fromkeys(("time", "datetime", "sched"), "read a clock"),
    **dict.fromkeys(("random", "secrets", "uuid", "numpy.random"), "make randomness"),
    **dict.fromkeys(
        ("socket", "socketserver", "select", "selectors", "ssl", "http", "urllib", "zmq"),
        "use sockets",
    ),
    **dict.fromkeys(
        ("threading", "_thread", "queue", "asyncio", "concurrent", "contextvars", "weakref", "gc"),
        "depend on threads or finalizers",
    ),
    **dict.fromkeys(
        ("multiprocessing", "multiprocess", "subprocess", "signal", "psutil", "pynvml"),
        "touch processes",
    ),
    **dict.fromkeys(
        ("os", "posix", "pathlib", "io", "shutil", "tempfile", "glob", "mmap", "fcntl", "filelock"),
        "touch files or the environment",
    ),
    **dict.fromkeys(("sqlite3", "dbm", "shelve"), "touch files or the environment"),
    **dict.fromkeys(("logging", "warnings", "atexit"), "speak past its effects"),
    **dict.fromkeys(("pickle", "cloudpickle", "copyreg", "tblib"), "look into a user's values"),
    **dict.fromkeys(("importlib", "runpy"), "hide its imports"),
}
BANNED_BUILTINS = {
    "open": "touch files or the environment",
    "print": "speak past its effects",
    "input": "speak past its effects",
    "__import__": "hide its imports",
}
# Beyond what a decider may use. Some are only good to be named in a signature.
VALUE_MODULES_MAY_USE = {
    *("pickle", "cloudpickle", "copyreg", "tblib", "importlib", "io", "weakref", "warnings"),
}
VALUE_MODULES_MAY_NAME = {"asyncio", "concurrent"}
# What is being serialized is known per thread.
VALUE_MODULES_MAY_TAKE = {"threading.local"}


class Kind(Enum):
    """What the purity rule asks of a module."""

    DECIDER = "decider"
    VALUE = "value module"
    FREE = "free"


@dataclass(frozen=True)
class Import:
    """One imported name, in full: `from a.b import c` is `a.b.c`."""

    target: str
    line: int
    typing_only: bool


class ImportCollector(ast.NodeVisitor):
    """Finds every import of one source, and calls of builtins that do I/O."""

    def __init__(self, module: str, is_package: bool) -> None:
        self.package_parts = module.split(".") if is_package else module.split(".")[:-1]
        self.imports: list[Import] = []
        self.builtin_calls: list[tuple[str, int]] = []
        self._typing_depth = 0

    def visit_If(self, node: ast.If) -> None:
        typing_only = ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        self._typing_depth += typing_only
        for child in node.body:
            self.visit(child)
        self._typing_depth -= typing_only
        for child in (node.test, *node.orelse):
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self._absolute(node.module, node.level)
        for alias in node.names:
            self._add(base if alias.name == "*" else f"{base}.{alias.name}", node)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        if called in BANNED_BUILTINS:
            self.builtin_calls.append((called, node.lineno))
        if called in {"__import__", "importlib.import_module", "import_module"} and node.args:
            match node.args[0]:
                case ast.Constant(value=str(name)):
                    self._add(name, node)
        self.generic_visit(node)

    def _absolute(self, module: str | None, level: int) -> str:
        if not level:
            return module or ""
        kept = self.package_parts[: len(self.package_parts) - (level - 1)]
        return ".".join([*kept, *([module] if module else [])])

    def _add(self, target: str, node: ast.AST) -> None:
        self.imports.append(Import(target, getattr(node, "lineno", 0), self._typing_depth > 0))


def room_of(dotted: str) -> str | None:
    """The room that a name of ours lives in; None for a name of someone else's."""
    package, *inside = dotted.split(".")
    if package != PACKAGE:
        return None
    # `from poolray import get` takes a name of the package itself, which sits above all rooms.
    return inside[0] if inside and inside[0] in HEIGHT_BY_ROOM else PACKAGE


def matches(dotted: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name is one of the modules, or something inside one of them."""
    module = ".".join(dotted.split(".")[:3])
    return any(fnmatch(module, pattern) for pattern in patterns)


def kind_of(module: str) -> Kind:
    """What the purity rule asks of the module with this name."""
    if room_of(module) not in DECIDING_ROOMS or matches(module, IO_MODULES):
        return Kind.FREE
    return Kind.VALUE if matches(module, VALUE_MODULES) else Kind.DECIDER


def layer_fault(module: str, imported: Import) -> str | None:
    """What is wrong with the direction of an import, in words."""
    here, there = room_of(module), room_of(imported.target)
    if here is None or there is None:
        return None
    if module in IMPORTS_ONLY_FROM and there not in IMPORTS_ONLY_FROM[module]:
        return f"{imported.target} is more than {module} may know"
    if here == there:
        return None
    floor = FLOORS[HEIGHT_BY_ROOM[here]]
    if HEIGHT_BY_ROOM[there] > HEIGHT_BY_ROOM[here]:
        return f"{imported.target} is above {here}"
    if here not in OPEN_ONLY_TO.get(there, {here}):
        return f"{imported.target} is not for {here}"
    if HEIGHT_BY_ROOM[there] < HEIGHT_BY_ROOM[here]:
        return None
    if floor.open_plan:
        return None
    inside = imported.target.split(".")[2:3]
    if inside and inside[0] in SIDEWAYS_LINES.get((here, there), ()):
        return None
    return f"{imported.target} is beside {here}"


def purity_fault(module: str, imported: Import) -> str | None:
    """What a decider would be doing with this import, in words."""
    kind = kind_of(module)
    if kind is Kind.FREE:
        return None
    if matches(imported.target, IO_MODULES):
        return f"{imported.target} does I/O: a {kind.value} leaves that to the shells"
    for banned, deed in BANNED.items():
        if imported.target != banned and not imported.target.startswith(f"{banned}."):
            continue
        named = imported.typing_only and banned in VALUE_MODULES_MAY_NAME
        used = banned in VALUE_MODULES_MAY_USE or imported.target in VALUE_MODULES_MAY_TAKE
        if kind is Kind.VALUE and (named or used):
            return None
        return f"{imported.target}: a {kind.value} must not {deed}"
    return None


def faults_of(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Every breach of the house rules in one source, as `module:line: what`."""
    collector = ImportCollector(module, is_package)
    collector.visit(ast.parse(source))
    faults = []
    for imported in collector.imports:
        found = (layer_fault(module, imported), purity_fault(module, imported))
        faults += [f"{module}:{imported.line}: {fault}" for fault in found if fault]
    if kind_of(module) is not Kind.FREE:
        faults += [
            f"{module}:{line}: {name}(): a {kind_of(module).value} must not {BANNED_BUILTINS[name]}"
            for name, line in collector.builtin_calls
        ]
    return faults


def modules_of(package: Path) -> Iterator[tuple[str, Path]]:
    """The dotted name and the path of each source below a package folder, in order."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def is_placed(module: str) -> bool:
    """Whether the module's room has a floor."""
    return module == PACKAGE or module.split(".")[1] in HEIGHT_BY_ROOM


# The house as it stands


def test_every_room_has_a_floor() -> None:
    names = [name for name, _ in modules_of(REPOSITORY / PACKAGE)]
    assert names, "no sources found: this test would prove nothing"
    assert [name for name in names if not is_placed(name)] == []


def test_imports_go_only_downward_and_deciders_do_no_io() -> None:
    faults = [
        fault
        for name, path in modules_of(REPOSITORY / PACKAGE)
        if is_placed(name)
        for fault in faults_of(
            path.read_text(encoding="utf-8"), name, is_package=path.name == "__init__.py"
        )
    ]
    assert not faults, "\n" + "\n".join(faults)


def test_the_linter_bans_nothing_that_this_test_allows() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    banned = settings["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(banned) <= set(BANNED)


# The test itself, on small sources


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("poolray.objects.directory", "from poolray.node import Node"),
        ("poolray.objects.directory", "import poolray.node.node"),
        ("poolray.objects.directory", "from poolray import node"),
        ("poolray.objects.directory", "from poolray import get"),
        ("poolray.objects.directory", "import poolray"),
        ("poolray.objects.directory", "from ..node.node import Node"),
        ("poolray.objects.directory", "from .. import api"),
        ("poolray.protocol.worker", "from poolray.tasks.spec import TaskSpec"),
        ("poolray.ids", "from poolray.protocol import worker"),
        ("poolray.local.workers", "def late():\n    from poolray.api import get"),
        ("poolray.client", "from poolray.local import process_state"),
        ("poolray.node.node", "from poolray.client import Client"),
        ("poolray.api", "import importlib\nimportlib.import_module('poolray.pool')"),
    ],
)
def test_an_upward_import_is_caught(module: str, source: str) -> None:
    (fault,) = faults_of(source, module)
    assert " is above " in fault


@pytest.mark.parametrize(
    "source",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from poolray.pool import Pool",
        "import typing\nif typing.TYPE_CHECKING:\n    from poolray.pool import Pool",
    ],
)
def test_an_upward_import_for_type_checkers_is_caught(source: str) -> None:
    assert faults_of(source, "poolray.node.node") == [
        "poolray.node.node:3: poolray.pool.Pool is above node"
    ]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("poolray.node.node", "from poolray.head.head import Head"),
        ("poolray.head.head", "from ..node import node"),
        ("poolray.local.workers", "from poolray.cluster import transfer"),
        ("poolray.cluster.node_daemon", "from poolray.local.spilling import SpillThreads"),
        ("poolray.cluster.node_daemon", "from poolray.local import LocalRuntime"),
        ("poolray.tasks.lifecycle", "from poolray.scheduling import policy"),
    ],
)
def test_a_sideways_import_is_caught(module: str, source: str) -> None:
    (fault,) = faults_of(source, module)
    assert " is beside " in fault


@pytest.mark.parametrize("importer", ["local.runtime", "client", "objects.directory", "head.head"])
def test_records_of_tasks_are_open_to_their_machine_only(importer: str) -> None:
    (fault,) = faults_of("from poolray.tasks.lifecycle import TaskRecord", f"poolray.{importer}")
    assert " is not for " in fault


@pytest.mark.parametrize(
    "source",
    [
        "from poolray.node.state import NodeState",
        "from poolray.objects.directory import ObjectRecord",
        "from poolray.exceptions import InternalError",
    ],
)
def test_effects_know_the_wire_only(source: str) -> None:
    (fault,) = faults_of(source, "poolray.node.effects")
    assert " is more than poolray.node.effects may know" in fault
    wire = "from poolray.ids import NodeId\nfrom poolray.protocol.values import InArena"
    assert faults_of(wire, "poolray.node.effects") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("poolray.cluster.node_daemon", "from poolray.local.workers import WorkerPool"),
        ("poolray.cluster.node_daemon", "from poolray.local import channel, reactor"),
        ("poolray.node.node", "from poolray.tasks.lifecycle import TaskRecord"),
        ("poolray.local.runtime", "from poolray.client import Client"),
        ("poolray.client", "from poolray.objects.serialization import Serializer"),
        ("poolray.node.node", "from . import events\nfrom .events import Submit"),
        ("poolray.objects.directory", "from ..ids import ObjectID"),
        ("poolray.config", "from poolray.exceptions import ConfigError"),
        ("poolray.multiprocessing.pool", "from poolray.pool import Pool"),
        ("poolray.api", "from poolray.remote_function import RemoteFunction"),
        ("poolray.__main__", "import poolray"),
        ("poolray.local.reactor", "import os, select, threading, time"),
        ("poolray.node.node", "import heapq\nfrom collections import deque"),
    ],
)
def test_what_the_house_allows_passes(module: str, source: str) -> None:
    assert faults_of(source, module) == []


def test_relative_imports_of_a_package_start_inside_it() -> None:
    upward = "from ..pool import Pool"
    sideways = "from .head import Head"
    assert faults_of(upward, "poolray.node", is_package=True)
    assert faults_of(upward.replace("..", "."), "poolray", is_package=True) == []
    assert faults_of(sideways, "poolray.node", is_package=True) == []
    assert faults_of(sideways.replace(".", ".."), "poolray.node", is_package=True)


@pytest.mark.parametrize("room", sorted(DECIDING_ROOMS))
@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from time import monotonic",
        "import socket as s",
        "def late():\n    import threading",
        "from os import environ",
        "import concurrent.futures",
        "from numpy import random",
        "import numpy.random",
        "import logging",
        "import pickle",
        "state = open('state.json')",
        "print('here')",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import asyncio",
        "from poolray.objects import shared_memory",
        "from poolray.head.storage_sqlite import SqliteStorage",
    ],
)
def test_io_in_a_decider_is_caught(room: str, source: str) -> None:
    faults = faults_of(source, f"{PACKAGE}.{room}.machine")
    assert any("decider" in fault for fault in faults)


def test_modules_named_after_a_banned_one_are_not_it() -> None:
    assert faults_of("import timeit_like\nfrom iolib import x", "poolray.node.node") == []


@pytest.mark.parametrize(
    "module",
    [
        "poolray.objects.shared_memory",
        "poolray.objects.spill_files",
        "poolray.objects.spill_urls",
        "poolray.head.storage_sqlite",
        "poolray.scheduling.accelerators",
    ],
)
def test_named_io_modules_do_io_but_still_import_only_downward(module: str) -> None:
    assert faults_of("import mmap, os, sqlite3\nopen('x')", module) == []
    assert faults_of("from poolray.api import get", module)


@pytest.mark.parametrize("module", VALUE_MODULES)
def test_value_modules_pack_values_without_clocks_or_threads(module: str) -> None:
    named = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import concurrent.futures"
    assert faults_of("import pickle, cloudpickle, io", module) == []
    assert faults_of("from threading import local", module) == []
    assert faults_of(named, module) == []
    assert faults_of("import concurrent.futures", module)
    assert faults_of("import threading", module)
    assert faults_of("from threading import Thread", module)
    assert faults_of("import time", module)


def test_a_module_without_a_floor_is_noticed() -> None:
    assert is_placed("poolray")
    assert is_placed("poolray.node.node")
    assert not is_placed("poolray.helpers")
