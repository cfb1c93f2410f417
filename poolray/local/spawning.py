"""What a spawned interpreter has to know of the program before it is of use.

What: asks the standard library, and refuses where that would start without end.
Who calls: `local/node_shell.py`, for groups that are not forked.
May touch: nothing.
Invariants: none; it keeps nothing.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def preparation_data(name: str) -> dict[str, Any]:
    """As `multiprocessing.spawn.get_preparation_data`.

    Raises
    ------
    RuntimeError
        A spawned process is importing `__main__` just now.
    """
    from multiprocessing import spawn

    if getattr(sys.modules.get("multiprocessing.process"), "current_process", None) is not None:
        from multiprocessing import process

        if getattr(process.current_process(), "_inheriting", False):
            raise RuntimeError(
                "An attempt has been made to start workers while `__main__` is being imported by "
                "a spawned process: put the code that starts them under "
                "`if __name__ == '__main__':`."
            )
    data = spawn.get_preparation_data(name or "poolray")
    if not os.path.exists(data.get("init_main_from_path", __file__)):
        # A program on standard input: there is no `__main__` to import, its functions go by value.
        del data["init_main_from_path"]
    return data
