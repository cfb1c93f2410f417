"""`python -m tests.simulation`: run one seed, or many until one fails."""

from __future__ import annotations

import argparse
import random
import sys
import time

from tests.simulation.actors import ActorReport, run_actors
from tests.simulation.run import SimulationError, run


def _run_actors(seed: int, arguments: argparse.Namespace) -> int:
    began, failures = time.monotonic(), 0
    reports: list[ActorReport] = []
    count = arguments.seeds or 1
    for number in range(seed, seed + count):
        try:
            reports.append(run_actors(number, arguments.steps, arguments.nodes or 4))
        except SimulationError as error:
            failures += 1
            if not arguments.keep_going:
                raise
            print(str(error)[:1500], file=sys.stderr, flush=True)
    totals = {
        name: sum(getattr(report, name) for report in reports)
        for name in ("executed", "values", "errors", "node_deaths", "head_restarts", "events")
    }
    spent = time.monotonic() - began
    print(f"{count} runs with actors, {failures} failed; {totals} in {spent:.1f} s")
    return 1 if failures else 0


def main() -> int:
    """Run what the command line asks for; 1 when a run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="the first seed (default: a random one, printed)")
    parser.add_argument("--steps", type=int, default=60, help="actions of the drivers in a run")
    parser.add_argument("--nodes", type=int, help="nodes (default: 1 and 3 by turns)")
    parser.add_argument("--seeds", type=int, help="how many seeds (default: 1, or 200 unseeded)")
    parser.add_argument("--actors", action="store_true", help="programs with actors, 4 nodes")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    arguments = parser.parse_args()
    seed = arguments.seed
    if seed is None:
        seed = random.SystemRandom().randrange(10**9)
    if arguments.actors:
        return _run_actors(seed, arguments)
    count = arguments.seeds or (1 if arguments.seed is not None else 200)
    print(f"seeds {seed} to {seed + count - 1}, {arguments.steps} steps each", flush=True)
    began = time.monotonic()
    events = jobs = failures = 0
    for number in range(seed, seed + count):
        nodes = arguments.nodes or (1, 3)[number % 2]
        try:
            report = run(number, arguments.steps, nodes)
        except SimulationError as error:
            failures += 1
            if not arguments.keep_going:
                raise
            print(str(error)[:1500], file=sys.stderr, flush=True)
            continue
        events += report.events
        jobs += report.jobs
    spent = time.monotonic() - began
    print(f"{count} runs, {failures} failed; {jobs} jobs, {events} events in {spent:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
