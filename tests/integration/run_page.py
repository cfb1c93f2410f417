"""Runs the sessions of one page, or of one module's docstrings, as an interpreter's own `__main__`.

Called by `test_documentation.py` as a program of its own: a page's pools and runtime end with it,
and what it defines is in `__main__`, as in a reader's terminal.
"""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from pathlib import Path

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FENCE = re.compile(r"^ *```(\w*)")


def sessions_of(page: str) -> str:
    """The page with all but its Python sessions blanked out, so that line numbers stay."""
    kept, language = [], None
    block: list[str] = []
    for line in page.splitlines():
        fence = FENCE.match(line)
        if fence and language is None:
            language = fence[1]
            kept.append("")
        elif fence:
            is_session = language == "python" and any(text.startswith(">>> ") for text in block)
            kept += block if is_session else [""] * len(block)
            kept.append("")
            language, block = None, []
        elif language is not None:
            block.append(line)
        else:
            kept.append("")
    return "\n".join(kept) + "\n"


def run_page(path: Path) -> int:
    """Run a page's sessions, one after the other, in `__main__`; gives the number of failures."""
    names = vars(sys.modules["__main__"])
    text = sessions_of(path.read_text(encoding="utf-8"))
    test = doctest.DocTestParser().get_doctest(text, {}, path.name, str(path), 0)
    test.globs = names  # doctest would take a copy, which is nobody's `__main__`
    return doctest.DocTestRunner(optionflags=FLAGS).run(test, clear_globs=False).failed


def run_module(name: str) -> int:
    """Run the examples in a module's docstrings; gives the number of failures."""
    found = doctest.DocTestFinder().find(
        importlib.import_module(name), extraglobs={"__name__": "__main__"}
    )
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    return sum(runner.run(test).failed for test in found)


if __name__ == "__main__":
    what = sys.argv[1]
    sys.exit(bool(run_page(Path(what)) if what.endswith(".md") else run_module(what)))
