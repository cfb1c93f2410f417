"""Tasks and calls that the machine is told of together: that takes less time than one by one.

What: puts submissions that follow each other into as few messages as their order allows.
Who calls: `local/runtime.py` for its own process, `local/node_shell.py` for workers.
May touch: nothing.
Invariants: what one caller submitted stays in the order in which it did.
"""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

from poolray.protocol.actors import CallActor, CallActors
from poolray.protocol.client import SubmitTasks
from poolray.protocol.values import TaskSpec

Submission: TypeAlias = SubmitTasks | CallActor


def take_together(collected: deque[Submission]) -> SubmitTasks | CallActors:
    """The first submissions of one kind, out of a queue that is not empty.

    Others may append to the queue meanwhile.
    """
    if type(collected[0]) is CallActor:
        calls: list[CallActor] = []
        while collected and type(first := collected[0]) is CallActor:
            calls.append(first)
            collected.popleft()
        return CallActors(calls=calls)
    tasks: list[TaskSpec] = []
    while collected and type(message := collected[0]) is SubmitTasks:
        tasks.extend(message.tasks)
        collected.popleft()
    return SubmitTasks(tasks=tasks)
