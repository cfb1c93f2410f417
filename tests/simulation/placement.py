"""Placement groups and strategies in simulated programs.

What: a driver's groups: makes, awaits and removes some, and says where a job is to run.
Who calls: drivers.
May touch: the driver's node, as its client.
Invariants: a group that is not removed by its driver lives until the driver's node dies; whoever
awaits one is answered.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from poolray.ids import ObjectId, PlacementGroupId, return_id
from poolray.protocol.placement import (
    AwaitPlacementGroup,
    CreatePlacementGroup,
    DescribePlacementGroups,
    GroupSpec,
    PlacementGroupReply,
    RemovePlacementGroup,
)
from poolray.scheduling.bundles import Strategy
from tests.simulation.jobs import Options

if TYPE_CHECKING:
    from tests.simulation.driver import Driver

#: Groups of one driver at once.
_GROUPS_MAX = 3


class PlacementPlayer:
    """What a driver does with placement groups."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._numbers = itertools.count(1)
        #: Groups that were made and not removed -> demand of each bundle, in CPUs.
        self._groups: dict[PlacementGroupId, list[int]] = {}
        #: request -> whether it is answered with rows.
        self._requests: dict[int, bool] = {}

    def make(self) -> None:
        """A group of random bundles, with an object that is ready once it is placed."""
        driver, world = self._driver, self._driver.world
        if len(self._groups) >= _GROUPS_MAX:
            return
        unique = b"%s-%d" % (driver.node.name, next(self._numbers))
        group_id = PlacementGroupId(unique.rjust(18, b"."))
        cpus = [world.random.randint(1, 2) for _ in range(world.random.randint(1, 3))]
        spec = GroupSpec(
            group_id=group_id,
            bundles=[{"CPU": each * 10_000} for each in cpus],
            strategy=world.random.choice(list(Strategy)),
            job_id=driver.node.name,
        )
        self._groups[group_id] = cpus
        request_id = driver.next_request()
        self._requests[request_id] = False
        driver.tell(CreatePlacementGroup(request_id=request_id, spec=spec))
        object_id: ObjectId = return_id(driver.node.ids.next_task_id(), 0)
        driver.ledger.group_of_object[object_id] = group_id
        driver.held[object_id] = None
        message = AwaitPlacementGroup(
            object_id=object_id, group_id=group_id, value=b"=group " + group_id
        )
        driver.tell(message)

    def remove(self) -> None:
        """One of them goes, with what runs there."""
        if self._groups:
            self._remove(self._driver.world.random.choice(list(self._groups)))

    def remove_all(self) -> None:
        """The program ends."""
        for group_id in list(self._groups):
            self._remove(group_id)

    def _remove(self, group_id: PlacementGroupId) -> None:
        driver = self._driver
        del self._groups[group_id]
        driver.ledger.removed_groups[group_id] = None
        request_id = driver.next_request()
        self._requests[request_id] = False
        driver.tell(RemovePlacementGroup(request_id=request_id, group_id=group_id))

    def look(self) -> None:
        """What of them?"""
        request_id = self._driver.next_request()
        self._requests[request_id] = True
        self._driver.tell(DescribePlacementGroups(request_id=request_id))

    def on_reply(self, message: PlacementGroupReply) -> None:
        """The answer to a request."""
        wants_rows = self._requests.pop(message.request_id)
        assert not message.refusal
        assert wants_rows or not message.rows

    def waits(self) -> bool:
        """Whether something is not answered yet."""
        return bool(self._requests)

    def place(self, options: Options) -> Options:
        """Where a job is to run: mostly anywhere."""
        world = self._driver.world
        if world.chance(0.6):
            return options
        if self._groups and world.chance(0.6):
            group_id = world.random.choice(list(self._groups))
            cpus = self._groups[group_id]
            index = world.random.choice([-1, world.random.randrange(len(cpus))])
            limit = max(cpus) if index < 0 else cpus[index]
            return dataclasses.replace(
                options, cpus=min(options.cpus, limit), group=group_id, bundle=index
            )
        if world.chance(0.5):
            return dataclasses.replace(options, spread=True)
        node_id = world.random.choice(self._driver.node_names)
        return dataclasses.replace(options, node_id=node_id, is_soft=world.chance(0.7))
