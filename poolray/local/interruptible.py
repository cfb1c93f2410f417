"""Where an exception may be raised in a task: in user code, and where that waits in ours.

What: looks at a stack.
Who calls: `local/worker.py`, in its signal handler; what user code waits in adds itself.
May touch: nothing.
Invariants: our own tables are never left torn; a finalizer is never interrupted.
"""

from __future__ import annotations

import os
from types import CodeType, FrameType

#: Code of ours that may be interrupted.
OPEN_CODE: set[CodeType] = set()
_OUR_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def is_interruptible(frame: FrameType | None) -> bool:
    """Whether an exception may be raised in a frame below what runs a call.

    Not in our own code, whose tables it would leave torn, nor in what that calls; not in a
    finalizer, which would swallow it.
    """
    while frame is not None:
        code = frame.f_code
        if code in OPEN_CODE:
            return True
        if code.co_name == "__del__" or code.co_filename.startswith(_OUR_FOLDER):
            return False
        frame = frame.f_back
    return False
