"""One run: a seed becomes machines, programs, faults, and a verdict.

What: builds the world, lets drivers act and faults strike, waits until all is answered, lets go of
everything and looks whether anything is left.
Who calls: `__main__` and the tests.
May touch: nothing outside.
Invariants: a fault in the machines raises `SimulationError` with the seed and the options.
"""

from __future__ import annotations

import dataclasses

from poolray.config import Config
from poolray.ids import NodeId
from tests.simulation.driver import Driver, Faults
from tests.simulation.jobs import INLINE_MAX_BYTES, Ledger
from tests.simulation.machines import Ids, SimHead, SimNode
from tests.simulation.network import HEAD, Network
from tests.simulation.world import World

#: CPUs of the largest nodes.
_CPUS_MAX = 4
#: Virtual seconds that a run may go on after its last action.
_PATIENCE_S = 2_000.0


class SimulationError(AssertionError):
    """What a run found, with the way to see it again."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What happened in a run."""

    seed: int
    nodes: int
    events: int
    virtual_s: float
    jobs: int
    values_checked: int
    errors_checked: int
    node_deaths: int
    spilled: int  #: objects that went to disk …
    restored: int  #: … and came back


class Run:
    """One simulated life of one node or of a cluster."""

    def __init__(self, seed: int, steps: int, nodes: int, faults: Faults | None = None) -> None:
        self.seed, self.steps, self.nodes_count = seed, steps, nodes
        self.world = world = World(seed)
        self.ledger = Ledger(nodes)
        self.faults = self._draw_faults() if faults is None else faults
        self.config = Config(
            inline_max_bytes=INLINE_MAX_BYTES,
            packets_per_worker_max=world.random.choice([1, 2, 2, 2, 3]),
            packet_calls_max=world.random.choice([1, 8, 256]),
            object_spilling_threshold=world.random.choice([0.0, 0.5, 0.8, 0.8, 1.0]),
            min_spilling_size_bytes=world.random.choice([1, 3 * 4096, 1 << 20]),
            max_io_workers=world.random.choice([1, 4]),
            memory_monitor_refresh_ms=world.random.choice([0, 0, 5, 50]),
            task_oom_retry_delay_base_ms=world.random.choice([1, 100]),
            task_oom_retry_delay_max_ms=500,
            task_oom_retries=world.random.choice([-1, -1, 0, 2]),
            spill_retry_s=world.random.choice([1e-3, 1.0]),
            transfer_chunk_bytes=world.random.choice([37, 1 << 20]),
            transfer_window_chunks=world.random.choice([1, 4]),
            transfer_fanout=world.random.choice([1, 2]),
            transfer_sources=world.random.choice([1, 3]),
        )
        self.network: Network | None = None
        self.head: SimHead | None = None
        if nodes > 1:
            delay_s = world.between(1e-4, 5e-2)
            self.network = Network(world, self.faults.loss, delay_s, self.config.resend_after_s)
            self.head = SimHead(world, self.network, self.config, self.ledger)
        ids = Ids()
        self.nodes: list[SimNode] = []
        self.drivers: list[Driver] = []
        self._ids = ids
        cpus = [world.random.randint(1, _CPUS_MAX) for _ in range(nodes)]
        self._cpus_min = min(cpus)
        for count in cpus:
            self._add_node(count)

    def _add_node(self, cpus: int) -> None:
        """A machine joins, with a program of its own."""
        node = SimNode(
            self.world,
            self.ledger,
            self._ids,
            self.network,
            NodeId(b"node %d" % len(self.nodes)),
            self.config,
            cpus,
            4096 * self.world.random.choice([4, 64, 1024]),
        )
        node.disk_failures = self.faults.disk_failures
        node.damages = self.faults.damages
        node.shortages = self.faults.shortages
        self.nodes.append(node)
        driver = Driver(node, self.faults, self._cpus_min)
        if self.nodes_count > 1:
            driver.burst_cpus = _CPUS_MAX
        self.drivers.append(driver)
        names = [each.name for each in self.nodes]
        for driver in self.drivers:
            driver.node_names = names

    def _draw_faults(self) -> Faults:
        world = self.world
        if world.chance(0.3):
            return Faults()
        cluster = self.nodes_count > 1
        return Faults(
            crashes=world.random.choice([0.0, 0.05, 0.2]),
            kills_per_s=world.random.choice([0.0, 0.5, 10.0]),
            start_failures=world.random.choice([0.0, 0.0, 0.05, 0.4]),
            disk_failures=world.random.choice([0.0, 0.05, 0.5]),
            damages=world.random.choice([0.0, 0.0, 0.02]),
            shortages=world.random.choice([0.0, 0.1, 0.5]),
            loss=world.random.choice([0.0, 0.05, 0.3]) if cluster else 0.0,
            node_crashes=world.random.choice([0, 1, self.nodes_count - 1]) if cluster else 0,
            partitions=world.random.choice([0, 0, 1]) if cluster else 0,
            joins=world.chance(0.5) if cluster else False,
            head_crashes=world.random.choice([0, 0, 1, 3]) if cluster else 0,
        )

    def go(self) -> Report:
        """The whole run.

        Raises
        ------
        SimulationError
            Something is wrong with the machines.
        """
        try:
            self._act()
            self._settle()
            self._end()
        except Exception as error:
            raise SimulationError(
                f"seed {self.seed} failed: python -m tests.simulation --seed {self.seed} "
                f"--steps {self.steps} --nodes {self.nodes_count}\n"
                f"at {self.world.now:.6f} s, event {self.world.events}, {self.faults}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return Report(
            seed=self.seed,
            nodes=self.nodes_count,
            events=self.world.events,
            virtual_s=self.world.now,
            jobs=len(self.ledger.jobs),
            values_checked=self.ledger.values_checked,
            errors_checked=self.ledger.errors_checked,
            node_deaths=self.ledger.node_deaths,
            spilled=sum(node.node.statistics().store.spilled_objects for node in self.nodes),
            restored=sum(node.node.statistics().store.restored_objects for node in self.nodes),
        )

    # ---- phases ----------------------------------------------------------------------------------

    def _act(self) -> None:
        """Drivers act and faults strike at random times."""
        world = self.world
        pace_s = self.faults.pace_s or world.between(1e-5, 1e-1)
        at = 0.0
        for _ in range(self.steps):
            at += world.random.expovariate(1 / pace_s)
            world.at(at, lambda: world.random.choice(self.drivers).act())
        if self.faults.kills_per_s:
            self._plan_kill()
        for _ in range(self.faults.node_crashes):
            world.at(world.random.random() * max(at, 1.0), self._crash_node)
            if self.faults.joins:
                cpus = world.random.randint(self._cpus_min, _CPUS_MAX)
                join_s = world.random.random() * at
                world.at(join_s, lambda cpus=cpus: self._add_node(cpus))
        for _ in range(self.faults.partitions):
            world.at(world.random.random() * max(at, 1.0), self._partition)
        for _ in range(self.faults.head_crashes):
            world.at(world.random.random() * max(at, 1.0), self._crash_head)
        self._last_action_s = at
        while world.now < at and world.step():
            pass

    def _plan_kill(self) -> None:
        pause = self.world.random.expovariate(self.faults.kills_per_s)

        def kill() -> None:
            victims = [w for node in self.nodes if node.alive for w in node.workers.values()]
            if victims:
                self.world.random.choice(victims).die(signal=9)
            if self.world.now < self._last_action_s + 5.0:
                self._plan_kill()

        self.world.after(pause, kill)

    def _crash_node(self) -> None:
        victims = [node for node in self.nodes[1:] if node.alive]
        if victims:
            self.world.random.choice(victims).crash()

    def _crash_head(self) -> None:
        head = self.head
        assert head is not None
        if head.alive:
            head.crash()
            self.world.after(self.world.between(1e-3, 10.0), head.restart)

    def _partition(self) -> None:
        assert self.network is not None
        victims = [node for node in self.nodes[1:] if node.alive]
        if not victims:
            return
        victim = self.world.random.choice(victims)
        self.ledger.node_deaths += 1  # as the others see it, if it lasts
        self.network.cut(victim.name, HEAD)
        if self.world.chance(0.5):
            for node in self.nodes:
                if node is not victim:
                    self.network.cut(victim.name, node.name)
        self.world.after(self.world.between(0.1, 20.0), self.network.heal)

    def _living(self) -> list[Driver]:
        return [driver for driver in self.drivers if driver.node.alive]

    def _settle(self) -> None:
        """Everything that was asked for is answered."""
        for node in self.nodes:
            node.shortages = 0.0
        for driver in self._living():
            driver.ask_for_all()
        if self.nodes_count > 1:  # tasks wait for a large node, and there may be none (any more)
            self.world.after(5.0, lambda: self._add_node(_CPUS_MAX))
        # Groups that have room get it by then; the rest, and what waits for them, is given up.
        until = self.world.now + 20.0
        while self.world.now < until and self.world.step():
            pass
        for driver in self._living():
            driver.placement.remove_all()
        self._wait_until(lambda: not any(driver.waits() for driver in self._living()), "answers")

    def _end(self) -> None:
        """Everything is let go of, and nothing is left."""
        self.ledger.ending = True
        for driver in self._living():
            driver.drop_all()
        self._wait_until(
            lambda: all(
                not driver.node.workers and not driver.node.node.state.groups
                for driver in self._living()
            ),
            "groups that drain",
        )
        # Releases between nodes may still be on their way.
        self._wait_until(lambda: all(self._is_empty(driver) for driver in self._living()), "an end")

    def _wait_until(self, condition: object, what: str) -> None:
        world = self.world
        limit = world.now + _PATIENCE_S
        while not condition():  # type: ignore[operator]
            if world.now > limit or not world.step():
                detail = "\n".join(
                    f"{driver.node.name!r}: {driver.node.node.statistics()}\n"
                    + driver.describe_wait()
                    for driver in self._living()
                )
                raise AssertionError(f"waited in vain for {what}\n{detail}")

    def _is_empty(self, driver: Driver) -> bool:
        state = driver.node.node.state
        statistics = driver.node.node.statistics()
        # Other nodes may still send tasks; the driver has ended the groups of its own.
        held = {
            function_id
            for client_id, client in state.clients.items()
            if client_id != state.local_client
            for function_id in client.functions
        }
        return (
            statistics.tasks == 0
            and statistics.queued_calls == 0
            and statistics.objects == 0
            and statistics.open_requests == 0
            and statistics.workers == 0
            and statistics.arena.used_bytes == 0
            and statistics.resources_available == statistics.resources_total
            and driver.node.files_left() == 0
            and all(queue.task_class.function_id in held for queue in state.classes.values())
        )


def run_churn(seed: int, steps: int = 300, nodes: int = 200, pace_s: float = 0.05) -> Report:
    """A large cluster of which one node in twenty dies, while as many join."""
    faults = Faults(
        node_crashes=nodes // 20,
        joins=True,
        loss=0.02,
        head_crashes=1,
        partitions=1,
        crashes=0.02,
        pace_s=pace_s,
    )
    return Run(seed, steps, nodes, faults).go()


def run(seed: int, steps: int = 60, nodes: int = 1) -> Report:
    """One run of a seed."""
    return Run(seed, steps, nodes).go()
