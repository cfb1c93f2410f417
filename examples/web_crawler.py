"""Crawl a web site with a frontier actor and crawler actors, and check that no page is missed.

    python examples/web_crawler.py                    # a site of 300 pages that the example serves
    python examples/web_crawler.py --pages 2000 --crawlers 8

The site is real HTTP over a local socket: a server in this process serves pages that link to each
other, some of them broken, some redirected, one of them slow.

The *frontier* is a coroutine actor: it knows which pages were seen and hands out the next one;
whoever asks when there is none waits in its event loop, at no cost, until somebody finds new links
or the crawl is over. *Crawlers* are actors that fetch several pages at once on threads. They call
the frontier by the handle that they were given; the driver only waits for them.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import poolray

LINKS_PER_PAGE = 4
BROKEN_EVERY = 17
MOVED_EVERY = 23
SLOW_S = 0.2
TIMEOUT_S = 10.0


# The site


def links_of(page: int, pages: int) -> list[int]:
    """Pages that a page links to: the next one, so that all can be reached, and some others."""
    others = random.Random(page).choices(range(pages), k=LINKS_PER_PAGE - 1)
    return [(page + 1) % pages, *others]


class Site(BaseHTTPRequestHandler):
    """Serves `/page/<number>`, `/moved/<number>` (a redirect) and nothing else."""

    protocol_version = "HTTP/1.1"
    pages = 0

    def do_GET(self) -> None:
        kind, _, number = self.path.strip("/").partition("/")
        if kind == "moved":
            self.send_response(301)
            self.send_header("Location", f"/page/{number}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if kind != "page" or not number.isdigit() or int(number) >= self.pages:
            self.send_error(404)
            return
        page = int(number)
        if page == self.pages // 2:
            time.sleep(SLOW_S)
        body = page_text(page, self.pages).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing of each request."""


def page_text(page: int, pages: int) -> str:
    """A page with its links; now and then one leads nowhere, or to where the page used to be."""
    paths = [
        f"/moved/{link}" if link % MOVED_EVERY == 0 else f"/page/{link}"
        for link in links_of(page, pages)
    ]
    if page % BROKEN_EVERY == 0:
        paths.append(f"/gone/{page}")
    anchors = "\n".join(f'<a href="{path}">{path}</a>' for path in paths)
    return f"<html><title>Page {page}</title><body>{anchors}</body></html>"


# The crawl


class LinkParser(HTMLParser):
    """Collects what a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


@poolray.remote
class Frontier:
    """Knows what was seen, and what is to be fetched."""

    def __init__(self, start: str) -> None:
        self.seen = {start}
        self.waiting: deque[str] = deque([start])
        self.fetching = 0
        self.changed = asyncio.Condition()

    async def next_url(self) -> str | None:
        """The next page to fetch; waits for one; None when the crawl is over."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.waiting or not self.fetching)
            if not self.waiting:
                return None
            self.fetching += 1
            return self.waiting.popleft()

    async def done(self, links: list[str]) -> None:
        """A page was fetched; these are its links."""
        async with self.changed:
            new = [link for link in dict.fromkeys(links) if link not in self.seen]
            self.seen.update(new)
            self.waiting.extend(new)
            self.fetching -= 1
            self.changed.notify_all()


@poolray.remote
class Crawler:
    """Fetches pages, several at once."""

    def __init__(self, frontier: Any) -> None:
        self.frontier = frontier
        self.parser_lock = threading.Lock()

    def crawl(self) -> dict[str, str]:
        """Fetch until there is nothing left; gives the address (after redirects) or the error of
        each page.
        """
        found: dict[str, str] = {}
        while (url := poolray.get(self.frontier.next_url.remote())) is not None:
            links: list[str] = []
            try:
                found[url], links = fetch(url)
            except (OSError, urllib.error.URLError) as error:
                found[url] = f"error: {error}"
            finally:
                poolray.get(self.frontier.done.remote(links))
        return found


def fetch(url: str) -> tuple[str, list[str]]:
    """A page's own address, and what it links to on the same site."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        parser = LinkParser()
        parser.feed(response.read().decode())
        links = [urllib.parse.urljoin(response.url, link) for link in parser.found]
        return response.url, links


def crawl(start: str, crawlers: int, threads: int) -> dict[str, str]:
    """Crawl from a page on; gives what `Crawler.crawl` gives, of all crawlers."""
    frontier = Frontier.remote(start)
    actors = [Crawler.options(max_concurrency=threads).remote(frontier) for _ in range(crawlers)]
    found: dict[str, str] = {}
    for part in poolray.get([actor.crawl.remote() for actor in actors for _ in range(threads)]):
        found.update(part)
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Crawl a site that this program serves.")
    parser.add_argument("--pages", type=int, default=300)
    parser.add_argument("--crawlers", type=int, default=2, help="actors")
    parser.add_argument("--threads", type=int, default=4, help="pages that each fetches at once")
    options = parser.parse_args(arguments)
    if min(options.pages, options.crawlers, options.threads) < 1:
        parser.error("all numbers must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    poolray.init()  # before there are threads, for it forks
    Site.pages = options.pages
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        started = time.perf_counter()
        found = crawl(f"{root}/page/0", options.crawlers, options.threads)
        seconds = time.perf_counter() - started
    finally:
        server.shutdown()
        server.server_close()
        poolray.shutdown()
    pages = {place for place in found.values() if not place.startswith("error:")}
    errors = sorted(url for url, place in found.items() if place.startswith("error:"))
    print(f"{len(pages):,} pages and {len(errors):,} broken links in {seconds:.2f} s")
    expected = {f"{root}/page/{page}" for page in range(options.pages)}
    broken = [f"{root}/gone/{page}" for page in range(0, options.pages, BROKEN_EVERY)]
    if pages != expected or errors != sorted(broken):
        print(f"Expected {len(expected):,} and {len(broken):,}.", file=sys.stderr)
        return 1
    print("No page was missed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
