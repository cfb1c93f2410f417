"""The programs of the chaos run: a shuffle and actors, whose right answers are known.

What: tasks with large partitions (fixed returns, generators, nested ones) that are sorted and
counted again; actors that keep their state in files, are called in order, and are found by name.
Who calls: `benchmarks/chaos.py`.
May touch: the folder of the run, the runtime.
Invariants: a wrong answer raises `WrongAnswer`; whatever runs writes a line when it begins and when
it ends, so that what ran twice can be counted afterwards.
"""

from __future__ import annotations

import collections
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import poolray

#: Of the tables that are shuffled: tasks of a round, partitions of each, numbers in a table.
MAPS, PARTS, NUMBERS = 6, 3, 120_000
#: What a task takes beside its work, so that kills find it at it.
_BUSY_S = 0.05
#: Rounds whose results are kept, to be read once more when nodes that had them are long gone.
KEPT_ROUNDS = 4
#: A wait that takes longer is a hang.
HANGS_S = 120.0

NAMESPACE = "chaos"
_LARGE = bytes(200_000)


class WrongAnswer(AssertionError):
    """The runtime gave a value that is not so."""


# ---- what is counted -----------------------------------------------------------------------------


def note(folder: str, what: str) -> None:
    """Append a line to the run's journal; lines of several processes do not mix."""
    file = os.open(os.path.join(folder, "journal"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, f"{what}\n".encode())
    finally:
        os.close(file)


class Journal:
    """What of all that ran was run again."""

    def __init__(self, folder: str) -> None:
        self.runs = self.retries = self.reconstructions = self.restarts = 0
        begun: collections.Counter[str] = collections.Counter()
        over: dict[str, None] = {}
        with open(os.path.join(folder, "journal"), encoding="utf-8") as lines:
            for line in lines:
                kind, _, name = line.rstrip("\n").partition(" ")
                if kind == "made":
                    begun[name] += 1
                    self.restarts += begun[name] > 1
                elif kind == "over":
                    over[name] = None
                elif kind == "run":
                    self.runs += 1
                    begun[name] += 1
                    if name in over:
                        self.reconstructions += 1
                    elif begun[name] > 1:
                        self.retries += 1


class Pulse:
    """How long nothing of a kind was answered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self.answers: collections.Counter[str] = collections.Counter()
        self.longest_s: dict[str, float] = {}
        self._last_s: dict[str, float] = {}

    def beat(self, what: str, answers: int = 1) -> None:
        """Something was answered."""
        with self._lock:
            now = time.monotonic()
            silence_s = now - self._last_s.get(what, now)
            self.longest_s[what] = max(self.longest_s.get(what, 0.0), silence_s)
            self._last_s[what] = now
            self.answers[what] += answers


# ---- the shuffle ---------------------------------------------------------------------------------


def table(number: int, index: int) -> np.ndarray[Any, Any]:
    """One of the tables of a round: the same numbers at each call."""
    return np.random.default_rng((number, index)).integers(0, 1 << 40, NUMBERS)


def parts_of(numbers: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """A table's partitions, each more than 100 KiB."""
    return [np.ascontiguousarray(numbers[numbers % PARTS == part]) for part in range(PARTS)]


@poolray.remote(max_retries=-1, num_returns=PARTS)
def split(folder: str, number: int, index: int) -> list[np.ndarray[Any, Any]]:
    """Partitions as several returns."""
    note(folder, f"run split {number} {index}")
    time.sleep(_BUSY_S)
    parts = parts_of(table(number, index))
    note(folder, f"over split {number} {index}")
    return parts


@poolray.remote(max_retries=-1, num_returns="streaming")
def stream(folder: str, number: int, index: int) -> Iterator[np.ndarray[Any, Any]]:
    """Partitions as items of a generator."""
    note(folder, f"run stream {number} {index}")
    for part in parts_of(table(number, index)):
        time.sleep(_BUSY_S / PARTS)
        yield part
    note(folder, f"over stream {number} {index}")


@poolray.remote(max_retries=-1)
def merge(
    folder: str, number: int, part: int, *pieces: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """All of a partition, sorted."""
    note(folder, f"run merge {number} {part}")
    time.sleep(_BUSY_S)
    merged = np.sort(np.concatenate(pieces))
    note(folder, f"over merge {number} {part}")
    return merged


@poolray.remote(max_retries=-1)
def digest(folder: str, number: int, part: int, merged: np.ndarray[Any, Any]) -> tuple[int, int]:
    """How many numbers, and their sum modulo 2**64, read at the end of a chain of large values."""
    note(folder, f"run digest {number} {part}")
    is_sorted = bool((merged[:-1] <= merged[1:]).all())
    found = digest_of(merged) if is_sorted else (-1, -1)
    note(folder, f"over digest {number} {part}")
    return found


def digest_of(numbers: np.ndarray[Any, Any]) -> tuple[int, int]:
    """The same, here."""
    return len(numbers), int(numbers.astype(np.uint64).sum())


@poolray.remote(max_retries=-1)
def nest(folder: str, number: int) -> list[tuple[int, int]]:
    """A round in a task: whatever it makes is owned by the node that it runs on."""
    note(folder, f"run nest {number}")
    found: list[tuple[int, int]] = poolray.get(_round(folder, number, is_stream=False)[1])
    note(folder, f"over nest {number}")
    return found


def _round(folder: str, number: int, is_stream: bool) -> tuple[list[Any], list[Any]]:
    """The refs of a round: merged partitions, and their digests."""
    tables: list[list[Any]] = []
    for index in range(MAPS):
        maker = stream if is_stream else split
        made = maker.remote(folder, number, index)
        tables.append(list(made) if is_stream else made)  # type: ignore[arg-type]
    merged = [
        merge.remote(folder, number, part, *[parts[part] for parts in tables])
        for part in range(PARTS)
    ]
    return merged, [digest.remote(folder, number, part, ref) for part, ref in enumerate(merged)]


def expected(number: int) -> list[tuple[int, int]]:
    """The digests of a round."""
    tables = [parts_of(table(number, index)) for index in range(MAPS)]
    return [digest_of(np.concatenate([parts[part] for parts in tables])) for part in range(PARTS)]


def shuffle(folder: str, seed: int, is_over: Callable[[], bool], pulse: Pulse) -> int:
    """Rounds until it is over; gives their number.

    Raises
    ------
    WrongAnswer
        A round's digests are not those of its numbers.
    """
    draw = random.Random(seed)
    kept: collections.deque[tuple[int, list[Any]]] = collections.deque()
    number = 0
    while not is_over():
        number += 1
        if number % 5 == 4:
            inner = nest.remote(folder, number)
            _compare(f"nested round {number}", poolray.get(inner, timeout=HANGS_S), number)
        else:
            merged, digests = _round(folder, number, is_stream=number % 2 == 0)
            _compare(f"round {number}", poolray.get(digests, timeout=HANGS_S), number)
            kept.append((number, merged))
        pulse.beat("shuffle")
        if len(kept) > KEPT_ROUNDS:
            old, merged = kept.popleft()
            # Read here or there: both find what is left of it.
            if draw.random() < 0.5:
                again = [digest_of(part) for part in poolray.get(merged, timeout=HANGS_S)]
            else:
                again = poolray.get(
                    [digest.remote(folder, -old, p, ref) for p, ref in enumerate(merged)],
                    timeout=HANGS_S,
                )
            _compare(f"round {old}, read again", again, old)
            pulse.beat("shuffle")
    return number


def _compare(what: str, found: list[tuple[int, int]], number: int) -> None:
    wanted = expected(number)
    if found != wanted:
        raise WrongAnswer(f"{what} gave {found}, and is {wanted}")


# ---- actors --------------------------------------------------------------------------------------


class Account:
    """A sum that outlasts its process: it is in a file, and so is what was added last."""

    large = _LARGE  # the class is one whose code a head would rather not keep

    def __init__(self, folder: str, name: str, ballast: Any) -> None:
        note(folder, f"made account {name}")
        if int(np.sum(ballast)) != len(ballast):
            raise WrongAnswer(f"account {name} got another argument than it was given")
        self.path = os.path.join(folder, f"account-{name}")
        self.number = self.total = 0
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as lines:
                # (An instance that its cluster took for dead may have written last.)
                whole = [line.split() for line in lines if line.endswith("\n")]
            self.number, self.total = max((int(n), int(t)) for n, t in whole)

    def add(self, number: int) -> int:
        """Add a number, the one after the last; a second time it is not added, and answered."""
        if number > self.number:
            if number != self.number + 1:
                raise WrongAnswer(f"{number} came after {self.number}")
            total = self.total + number
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(file, b"%d %d\n" % (number, total))
            os.close(file)
            self.number, self.total = number, total
        return number * (number + 1) // 2

    def balance(self) -> int:
        """All that was added."""
        return self.total


_OPTIONS: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}


@poolray.remote(max_retries=-1)
def found_account(folder: str, name: str) -> None:
    """Make a detached account, from wherever this runs; a second attempt finds the first one's."""
    options = {**_OPTIONS, "lifetime": "detached", "get_if_exists": True}
    maker = poolray.remote(Account).options(name=name, namespace=NAMESPACE, **options)
    poolray.get(maker.remote(folder, name, np.ones(50_000)).balance.remote())


@poolray.remote(max_retries=-1)
def add_by_name(folder: str, name: str, first: int, count: int) -> list[int]:
    """Calls from wherever this runs."""
    note(folder, f"run add {name} {first}")
    account = poolray.get_actor(name, namespace=NAMESPACE)
    sums: list[int] = poolray.get([account.add.remote(n) for n in range(first, first + count)])
    note(folder, f"over add {name} {first}")
    return sums


def keep_accounts(folder: str, seed: int, is_over: Callable[[], bool], pulse: Pulse) -> int:
    """Add to accounts until it is over; gives the number of calls.

    Raises
    ------
    WrongAnswer
        A sum is not that of the numbers that were added in this order.
    """
    draw = random.Random(seed)
    maker = poolray.remote(**_OPTIONS)(Account)
    plain = maker.remote(folder, "plain", np.ones(50_000))
    named = maker.options(name="named", namespace=NAMESPACE).remote(folder, "named", np.ones(9))
    names = ["plain", "named", "detached-1", "detached-2"]
    for name in names[2:]:
        poolray.get(found_account.remote(folder, name), timeout=HANGS_S)
        pulse.beat("accounts")
    added = dict.fromkeys(names, 0)
    while not is_over():
        name = draw.choice(names)
        first, count = added[name] + 1, draw.randint(1, 20)
        if name == "plain":
            account = plain
        elif name == "named" and draw.random() < 0.5:
            account = named
        else:
            account = None
        if account is None and draw.random() < 0.3:
            sums = poolray.get(add_by_name.remote(folder, name, first, count), timeout=HANGS_S)
        else:
            if account is None:
                account = poolray.get_actor(name, namespace=NAMESPACE)
            refs = [account.add.remote(n) for n in range(first, first + count)]
            sums = poolray.get(refs, timeout=HANGS_S)
        if sums != [n * (n + 1) // 2 for n in range(first, first + count)]:
            raise WrongAnswer(f"account {name} answered {sums} to {first} … +{count}")
        added[name] += count
        pulse.beat("accounts", count)
    for name in names:
        account = plain if name == "plain" else poolray.get_actor(name, namespace=NAMESPACE)
        balance, wanted = poolray.get(account.balance.remote(), timeout=HANGS_S), added[name]
        if balance != wanted * (wanted + 1) // 2:
            raise WrongAnswer(f"account {name} has {balance} after {wanted} calls")
        if name.startswith("detached"):
            poolray.kill(account)
    return sum(added.values())
