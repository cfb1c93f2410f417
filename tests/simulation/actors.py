"""Programs with actors on a simulated cluster, and a run of them.

What: on each node a program creates named actors, looks others' up, calls them, kills some and lets
go; processes, nodes and the head crash, links are cut and mended; in the end all is answered,
every answer is right or a documented error, and nothing is left.
Who calls: the tests and `__main__`.
May touch: nothing outside.
Invariants: a call that may not be tried again begins at most once; a process begins the calls of
one caller in the order in which they were made.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from poolray.config import Config
from poolray.exceptions import ActorError, NodeDiedError, ObjectLostError
from poolray.ids import (
    ActorId,
    ClassId,
    FunctionId,
    GroupId,
    NodeId,
    ObjectId,
    handle_of,
    return_id,
)
from poolray.protocol.actors import ActorReply, CallActor, CreateActor, KillActor, LookUpActor
from poolray.protocol.client import (
    AllocateRange,
    DefineClass,
    DefineFunction,
    GetObjects,
    ObjectValues,
    PutObject,
    RangeGranted,
    ReleaseFunction,
    ReleaseReferences,
)
from poolray.protocol.node import CloseGroup, CreateGroup
from poolray.protocol.values import CallKind, FunctionDefinition, TaskClass, TaskSpec, Value
from tests.simulation.jobs import INLINE_MAX_BYTES, Ledger
from tests.simulation.machines import Ids, SimHead, SimNode
from tests.simulation.network import HEAD, Network
from tests.simulation.run import SimulationError
from tests.simulation.world import World

PLAIN = GroupId(0)
_PATIENCE_S = 2_000.0
_ROUNDS_MAX = 10
_ERRORS = (ActorError, ObjectLostError, NodeDiedError)


class Program:
    """One driver that uses actors."""

    def __init__(self, run: ActorRun, node: SimNode) -> None:
        self.run = run
        self.node = node
        self.world = node.world
        self._numbers = itertools.count(1)
        #: Actors that it has handles to -> number of its next call.
        self.actors: dict[ActorId, int] = {}
        #: request -> name that was asked for, or the actor that was to be made.
        self.asked: dict[int, bytes] = {}
        #: result -> payload of the call.
        self.results: dict[ObjectId, bytes] = {}
        self.gets: dict[int, ObjectId] = {}
        self._defined: dict[ClassId, None] = {}
        #: request for an actor -> its argument, held until the answer.
        self._arguments: dict[int, ObjectId] = {}
        #: request for a place -> what is done with it.
        self._allocations: dict[int, Callable[[RangeGranted], None]] = {}
        node.on_driver_reply = self._on_reply
        node.on_group_event = lambda effect: None
        node.tell(b"", CreateGroup(group_id=PLAIN))

    def tell(self, message: Any) -> None:
        """As a client."""
        self.node.tell(self.node.driver_id, message)

    # ---- what comes ------------------------------------------------------------------------------

    def _on_reply(self, message: Any) -> None:
        if isinstance(message, RangeGranted):
            self._allocations.pop(message.request_id)(message)
            return
        if isinstance(message, ActorReply):
            del self.asked[message.request_id]
            if message.request_id in self._arguments:
                argument = self._arguments.pop(message.request_id)
                self.tell(ReleaseReferences(object_ids=[argument]))
            if message.actor_id:
                self.actors.setdefault(message.actor_id, 0)
            return
        assert isinstance(message, ObjectValues)
        object_id = self.gets.pop(message.request_id)
        value = self.node.read(message.values[0])
        if message.errors:
            error = self.node.ledger.errors[int(value[2:])]
            assert isinstance(error, _ERRORS), error
            self.run.errors += 1
        else:
            assert value == self.node.ledger.actors.value(self.results[object_id])
            self.run.values += 1

    # ---- what it does ----------------------------------------------------------------------------

    def act(self) -> None:
        """One random thing."""
        if self.node.alive:
            actions = [self._create, self._look_up, self._call, self._get, self._drop, self._kill]
            self.world.random.choices(actions, weights=[3, 4, 20, 6, 2, 1])[0]()

    def _class(self, kind: CallKind, retries: int, cpus: int = 0) -> ClassId:
        class_id = ClassId(b"%d-%d-%d" % (kind, retries, cpus))
        if class_id not in self._defined:
            self._defined[class_id] = None
            function_id = FunctionId(b"K" if kind is CallKind.CREATE else b"")
            if function_id:
                code = FunctionDefinition(function_id=function_id, blob=b"code", name="K")
                self.tell(DefineFunction(definition=code))
            known = TaskClass(
                class_id=class_id,
                function_id=function_id,
                name="K",
                kind=kind,
                num_returns=0 if kind is CallKind.CREATE else 1,
                resources={"CPU": cpus * 10_000} if cpus else {},
                max_retries=retries,
                max_calls=1 if kind is CallKind.CREATE else 0,
                method="" if kind is CallKind.CREATE else "m",
            )
            self.tell(DefineClass(task_class=known))
        return class_id

    def _create(self) -> None:
        world = self.world
        restarts = world.random.choice([0, 1, 3, -1])
        number = next(self._numbers)
        actor_id = ActorId(b"%016d" % next(self.run.actor_ids))
        name = f"actor {world.random.randint(0, 9)}"
        task = TaskSpec(
            task_id=self.node.ids.next_task_id(),
            class_id=self._class(CallKind.CREATE, restarts, world.random.randint(0, 1)),
            calls=[b"constructor of " + actor_id],
        )
        self.asked[number] = actor_id
        message = CreateActor(
            actor_id=actor_id,
            task=task,
            class_name="K",
            request_id=number,
            name=name,
            max_restarts=restarts,
            detached=world.chance(0.3),
            get_if_exists=world.chance(0.5),
        )
        if world.chance(0.4):
            self._put_argument(message)
        else:
            self.tell(message)

    def _put_argument(self, message: CreateActor) -> None:
        """The actor is made with a value that only its constructor refers to."""
        size = self.world.random.choice([10, INLINE_MAX_BYTES, INLINE_MAX_BYTES + 1, 5000])
        data = (b"argument of " + message.actor_id).ljust(size, b".")
        object_id = return_id(self.node.ids.next_task_id(), 0)
        task = replace(message.task, dependencies=[object_id], slots=[0])

        def create(value: Value) -> None:
            self.node.ledger.actors.arguments[task.calls[0]] = data  # type: ignore[index]
            self.tell(PutObject(object_id=object_id, value=value))
            self.tell(replace(message, task=task))
            self._arguments[message.request_id] = object_id

        if len(data) <= INLINE_MAX_BYTES:
            create(data)
            return
        number = next(self._numbers)
        self._allocations[number] = lambda granted: create(
            self.node.write(object_id, granted, data)
        )
        self.tell(AllocateRange(request_id=number, object_id=object_id, size_bytes=len(data)))

    def look_up(self, name: str) -> None:
        """Ask for a handle."""
        number = next(self._numbers)
        self.asked[number] = name.encode()
        self.tell(LookUpActor(request_id=number, namespace="", name=name))

    def _look_up(self) -> None:
        self.look_up(f"actor {self.world.random.randint(0, 9)}")

    def _call(self) -> None:
        for _ in range(self.world.random.choice([1, 1, 3, 20])):
            if not self.actors:
                return
            actor_id = self.world.random.choice(list(self.actors))
            number = self.actors[actor_id]
            self.actors[actor_id] = number + 1
            payload = b"%s:%s:%d" % (actor_id, self.node.name, next(self.run.call_numbers))
            retries = self.world.random.choice([0, 0, 1, 5, -1])
            self.node.ledger.actors.retries[payload] = retries
            task_id = self.node.ids.next_task_id()
            self.results[return_id(task_id, 0)] = payload
            class_id = self._class(CallKind.METHOD, retries)
            task = TaskSpec(task_id=task_id, class_id=class_id, calls=[payload])
            self.tell(CallActor(actor_id=actor_id, task=task))

    def get(self, object_id: ObjectId) -> None:
        """Ask for a result."""
        number = next(self._numbers)
        self.gets[number] = object_id
        self.tell(GetObjects(request_id=number, object_ids=[object_id]))

    def _get(self) -> None:
        if self.results:
            self.get(self.world.random.choice(list(self.results)))

    def _drop(self) -> None:
        if self.actors and self.world.chance(0.3):
            self.let_go(self.world.random.choice(list(self.actors)))

    def let_go(self, actor_id: ActorId) -> None:
        """The handle is gone; the actor may be met again, by another one."""
        del self.actors[actor_id]
        self.tell(ReleaseReferences(object_ids=[handle_of(actor_id)]))

    def _kill(self) -> None:
        if self.actors:
            actor_id = self.world.random.choice(list(self.actors))
            self.tell(KillActor(actor_id=actor_id, no_restart=self.world.chance(0.7)))

    # ---- the end ---------------------------------------------------------------------------------

    def waits(self) -> bool:
        """Whether something was not answered."""
        return bool(self.gets or self.asked)

    def kill_all(self) -> None:
        """Whatever it has a handle to ends."""
        for actor_id in list(self.actors):
            self.tell(KillActor(actor_id=actor_id))

    def let_go_of_all(self) -> None:
        """Nothing is held any more."""
        self.tell(ReleaseReferences(object_ids=list(self.results)))
        for actor_id in list(self.actors):
            self.let_go(actor_id)
        self.tell(ReleaseFunction(function_id=FunctionId(b"K")))

    def close(self) -> None:
        """Its workers are not needed any more."""
        self.node.tell(b"", CloseGroup(group_id=PLAIN))


@dataclasses.dataclass(frozen=True)
class ActorReport:
    """What happened in a run."""

    seed: int
    events: int
    virtual_s: float
    values: int
    errors: int
    executed: int
    node_deaths: int
    head_restarts: int


class ActorRun:
    """One simulated life of a cluster with actors."""

    def __init__(self, seed: int, steps: int, nodes: int) -> None:
        self.seed, self.steps = seed, steps
        self.world = world = World(seed)
        self.ledger = ledger = Ledger(nodes)
        choice = world.random.choice
        calm = world.chance(0.2)
        ledger.actors.crashes = 0.0 if calm else choice([0.0, 0.005, 0.05])
        ledger.actors.refusals = 0.0 if calm else choice([0.0, 0.1])
        self.node_crashes = 0 if calm else choice([0, 1, nodes - 1])
        self.head_crashes = 0 if calm else choice([0, 1, 3])
        self.partitions = 0 if calm else choice([0, 0, 1, 2])
        self.config = Config(
            inline_max_bytes=INLINE_MAX_BYTES, packets_per_worker_max=choice([1, 2])
        )
        loss = 0.0 if calm else choice([0.0, 0.05, 0.3])
        delay_s = world.between(1e-4, 5e-2)
        self.network = Network(world, loss, delay_s, self.config.resend_after_s)
        self.head = SimHead(world, self.network, self.config, ledger)
        self.actor_ids, self.call_numbers = itertools.count(1), itertools.count(1)
        self.values = self.errors = self.head_restarts = 0
        ids = Ids()
        self.programs = []
        for number in range(nodes):
            name = NodeId(b"node %d" % number)
            cpus = world.random.randint(0 if number else 2, 3)
            node = SimNode(world, ledger, ids, self.network, name, self.config, cpus, 1 << 20)
            self.programs.append(Program(self, node))

    def go(self) -> ActorReport:
        """The whole run.

        Raises
        ------
        SimulationError
            Something is wrong with the machines.
        """
        try:
            self._act()
            self._settle()
        except Exception as error:
            raise SimulationError(
                f"actors: seed {self.seed} failed: python -m tests.simulation --actors "
                f"--seed {self.seed} --steps {self.steps} --nodes {len(self.programs)}\n"
                f"at {self.world.now:.6f} s, event {self.world.events}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return ActorReport(
            seed=self.seed,
            events=self.world.events,
            virtual_s=self.world.now,
            values=self.values,
            errors=self.errors,
            executed=self.ledger.actors.executed,
            node_deaths=self.ledger.node_deaths,
            head_restarts=self.head_restarts,
        )

    # ---- phases ----------------------------------------------------------------------------------

    def _act(self) -> None:
        world = self.world
        pace_s = world.between(1e-3, 3e-1)
        at = 0.5
        for _ in range(self.steps):
            at += world.random.expovariate(1 / pace_s)
            world.at(at, world.random.choice(self.programs).act)
        for count, fault in (
            (self.node_crashes, self._crash_node),
            (self.head_crashes, self._crash_head),
            (self.partitions, self._partition),
        ):
            for _ in range(count):
                world.at(world.random.random() * max(at, 1.0), fault)
        while world.now < at and world.step():
            pass

    def _living(self) -> list[Program]:
        return [program for program in self.programs if program.node.alive]

    def _crash_node(self) -> None:
        victims = [program.node for program in self._living()[1:]]
        if victims:
            self.world.random.choice(victims).crash()

    def _crash_head(self) -> None:
        if self.head.alive:
            self.head.crash()
            self.head_restarts += 1
            self.world.after(self.world.between(1e-3, 10.0), self.head.restart)

    def _partition(self) -> None:
        victims = [program.node for program in self._living()[1:]]
        if not victims:
            return
        victim = self.world.random.choice(victims)
        self.network.cut(victim.name, HEAD)
        if self.world.chance(0.5):
            for program in self.programs:
                if program.node is not victim:
                    self.network.cut(victim.name, program.node.name)
        self.world.after(self.world.between(0.1, 20.0), self.network.heal)

    def _settle(self) -> None:
        """All is answered; then everything is let go of, and nothing is left."""
        for program in self._living():
            for object_id in program.results:
                program.get(object_id)
        # (Actors that live keep their CPUs; others may wait for these.)
        for _ in range(_ROUNDS_MAX):
            self._kill_all()
            if self.head.alive and not self.head.head.statistics().actors:
                break
        self._wait_until(self._is_answered, "answers")
        for program in self._living():
            program.let_go_of_all()
        self._wait_until(lambda: all(map(self._is_empty, self._living())), "an end")
        for program in self._living():
            program.close()
        self._wait_until(lambda: all(map(self._is_closed, self._living())), "workers that end")
        self._wait_until(
            lambda: self.head.alive and not self.head.head.statistics().actors, "an empty directory"
        )

    def _kill_all(self) -> None:
        """Whoever has a name ends; detached actors may be on their way to another keeper."""
        for program in self._living():
            for number in range(10):
                program.look_up(f"actor {number}")
        self._wait_until(lambda: not any(p.asked for p in self._living()), "names")
        for program in self._living():
            program.kill_all()
        end = self.world.now + 10.0
        while self.world.now < end and self.world.step():
            pass

    def _is_answered(self) -> bool:
        return not any(program.waits() for program in self._living())

    def _is_empty(self, program: Program) -> bool:
        statistics = program.node.node.statistics()
        return (
            statistics.tasks == 0
            and statistics.actors == 0
            and statistics.objects == 0
            and statistics.open_requests == 0
        )

    def _is_closed(self, program: Program) -> bool:
        statistics = program.node.node.statistics()
        return (
            statistics.workers == 0 and statistics.resources_available == statistics.resources_total
        )

    def _wait_until(self, condition: Any, what: str) -> None:
        world = self.world
        limit = world.now + _PATIENCE_S
        while not condition():
            if world.now > limit or not world.step():
                detail = [
                    f"{p.node.name!r} {p.gets} {p.asked} {p.node.node.statistics()}"
                    for p in self._living()
                ]
                raise AssertionError(f"waited in vain for {what}: " + "\n".join(detail))


def run_actors(seed: int, steps: int = 60, nodes: int = 4) -> ActorReport:
    """One run of a seed."""
    return ActorRun(seed, steps, nodes).go()
