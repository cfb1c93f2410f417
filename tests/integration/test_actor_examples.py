"""The examples with actors run as a reader runs them: as programs, on small input."""

from __future__ import annotations

import re

import pytest

from tests.integration.test_examples import run


@pytest.mark.parametrize(
    "arguments", [(), ("--asynchronous",)], ids=["synchronous", "asynchronous"]
)
def test_parameter_server_recognizes_as_many_digits_as_one_process(
    arguments: tuple[str, ...],
) -> None:
    pytest.importorskip("sklearn")
    done = run("parameter_server.py", "--steps", 60, *arguments)
    assert done.returncode == 0, done.stderr
    assert "1,348 images to train on, 449 to test" in done.stdout
    shares = [float(text) for text in re.findall(r"([0-9.]+)%", done.stdout)]
    assert min(shares) > 85
    if not arguments:
        assert "The weights are those of one process." in done.stdout


def test_web_crawler_misses_no_page() -> None:
    done = run("web_crawler.py", "--pages", 60, "--threads", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("60 pages and 4 broken links in ")
    assert "No page was missed." in done.stdout


def test_rate_limited_fetcher_keeps_the_limit_and_takes_over_from_who_gives_up() -> None:
    done = run("rate_limited_fetcher.py", "--records", 80, "--per-second", 40)
    assert done.returncode == 0, done.stderr
    taken = re.search(r"(\d+) taken over from a client that gave up, 0 requests", done.stdout)
    assert taken is not None
    assert int(taken[1]) > 0
    assert "Every record is there." in done.stdout
