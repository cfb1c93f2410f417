"""For all tests: what they need of the process that runs them."""

from __future__ import annotations

import signal

import pytest

#: Tests of the standard library's or Ray's own classes, by the id of what they run on.
_REFERENCES = ("[multiprocessing", "[concurrent.futures", "-multiprocessing]")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts background jobs deaf to Ctrl-C, and every script under test inherits it.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    if any(reference in item.nodeid for reference in _REFERENCES):
        # The standard pools have races of their own (an executor that is dropped may print
        # "Bad file descriptor" as the interpreter ends): those are not for us to mend.
        item.add_marker(pytest.mark.flaky(reruns=2))
