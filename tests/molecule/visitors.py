"""Visitors of the site's one address: what each of them asked for, how long it took, and what it got."""

from __future__ import annotations

import contextlib
import itertools
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests

from helpers import SITE, Rig, picture, sha256, wait_until

PATIENCE = 1.0  # seconds until somebody who waits for a cached picture asks again
LONGEST = 6.0  # until somebody who waits for anything else does: a lost node may keep a request for good


@dataclass(frozen=True)
class Seen:
    """One request and its end; *fault* is empty when all was as it should be."""

    what: str
    began: float
    ended: float
    fault: str

    @property
    def took(self) -> float:
        return self.ended - self.began


@dataclass
class Seens:
    """What happened within a part of the time."""

    every: list[Seen]

    def of(self, *whats: str) -> Seens:
        return Seens([one for one in self.every if one.what in whats])

    def begun(self, since: float = 0.0, until: float = float("inf")) -> Seens:
        return Seens([one for one in self.every if since <= one.began < until])

    @property
    def faults(self) -> list[str]:
        return [f"{one.what} after {one.took:.2f} s: {one.fault}" for one in self.every if one.fault]

    @property
    def longest(self) -> float:
        return max((one.took for one in self.every), default=0.0)

    @property
    def gap(self) -> float:
        """The longest time between two good answers."""
        good = sorted(one.ended for one in self.every if not one.fault)
        return max((after - before for before, after in itertools.pairwise(good)), default=float("inf"))


def form_token(page: requests.Response) -> str:
    """Return the token against forged requests of a page's form."""
    found = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text)
    assert found, f"{page.url} {page.status_code} has no form: {page.text[:300]}"
    return found[1]


class Browser:
    """Somebody with a browser: signed in, looks at the gallery and its pictures, sends forms."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.session = rig, requests.Session()

    def ask(
        self, method: str, path: str, wanted: int = 200, timeout: float = LONGEST, **more: Any
    ) -> requests.Response:
        url = f"{self.rig.url(SITE)}{urlsplit(path).path}"
        headers = {"Referer": url} if method == "POST" else {}
        answer = self.session.request(method, url, timeout=timeout, headers=headers, allow_redirects=False, **more)
        assert answer.status_code == wanted, f"{method} {path}: {answer.status_code} {answer.text[:200]!r}"
        return answer

    def sign_in(self) -> None:
        token = form_token(self.ask("GET", "/login/"))
        who = {"username": "tester", "password": self.rig.password, "csrfmiddlewaretoken": token}
        self.ask("POST", "/login/", 302, data=who)
        assert "sessionid" in self.session.cookies

    def look_around(self) -> int:
        """Open the gallery with its pictures; return how many there were."""
        shown = re.findall(r'<img [^>]*src="([^"]+)"', self.ask("GET", "/").text)[:6]
        for one in shown:
            assert self.ask("GET", one, timeout=LONGEST).content
        return len(shown)

    def upload(self, content: bytes) -> str:
        """Send the form; return the address of the picture's page."""
        form = self.ask("GET", "/upload/")
        key = re.search(r'name="key" value="([^"]+)"', form.text)
        assert key
        data = {"csrfmiddlewaretoken": form_token(form), "key": key[1]}
        answer = self.ask("POST", "/upload/", 302, data=data, files={"file": ("form.png", content)})
        return answer.headers["Location"]

    def check(self, page: str, content: bytes) -> None:
        """Open a picture's page and the picture itself."""
        found = re.search(r'<a href="([^"]+)"><code>', self.ask("GET", page).text)
        assert found
        assert self.ask("GET", found[1], timeout=LONGEST).content == content

    def delete(self, page: str) -> None:
        token = form_token(self.ask("GET", page))
        self.ask("POST", f"{page}delete/", 302, data={"csrfmiddlewaretoken": token})
        self.ask("GET", page, 404)

    def forged(self, content: bytes) -> int:
        """Send the form without its token; return the status."""
        url = f"{self.rig.url(SITE)}/upload/"
        answer = self.session.post(url, files={"file": ("forged.png", content)}, timeout=LONGEST, allow_redirects=False)
        return answer.status_code


@dataclass
class Visitors:
    """People at the address, each with one request after the other."""

    rig: Rig
    fresh: int = 90  # files that nobody has asked for yet
    seen: list[Seen] = field(default_factory=list)
    sent: dict[str, str] = field(default_factory=dict)  # SHA-256 of every upload -> name, if it was acknowledged
    answered_by: list[tuple[float, str]] = field(default_factory=list)  # when a node acknowledged an upload
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        """Store the pictures that are looked at, and have every node cache those that are to be cached."""
        self.cached = [self.rig.upload(SITE) for _ in range(4)]
        warm(self.rig, self.cached)
        self.uncached = [self.rig.upload(SITE) for _ in range(self.fresh)]
        self.browser = Browser(self.rig)
        self.browser.sign_in()

    def timed(self, what: str, ask: Callable[[], object]) -> bool:
        """Do one thing and note how it went."""
        began, fault = time.monotonic(), ""
        try:
            ask()
        except (requests.RequestException, AssertionError) as error:
            fault = f"{type(error).__name__} {error}"[:300]
        self.seen.append(Seen(what, began, time.monotonic(), fault))
        return not fault

    def fetch(self, row: dict[str, Any], patience: float) -> None:
        answer = self.rig.fetch(SITE, row, timeout=patience)
        assert answer.status_code == 200, f"{answer.status_code} {answer.text[:100]!r}"
        assert sha256(answer.content) == row["sha256"], "other bytes"

    # --- the visitors

    def look(self) -> None:
        """Ask for cached pictures, each on a connection of its own."""
        while not self.stop.wait(0.1):
            row = secrets.choice(self.cached)
            self.timed("cached", lambda row=row: self.fetch(row, PATIENCE))

    def discover(self) -> None:
        """Ask for each file that is in no cache, once."""
        for row in self.uncached:
            if self.stop.wait(0.3):
                return
            self.timed("uncached", lambda row=row: self.fetch(row, LONGEST))

    def read(self) -> None:
        """Ask for a page."""
        while not self.stop.wait(0.2):
            def page() -> None:
                answer = self.rig.request("GET", SITE, "/", timeout=LONGEST)
                assert answer.status_code == 200, f"{answer.status_code} {answer.text[:100]!r}"

            self.timed("page", page)

    def write(self) -> None:
        """Upload by the API, each content once and without a key that would hide a second sending."""
        while not self.stop.wait(0.2):
            content = picture(30_000)
            self.sent[sha256(content)] = ""

            def upload(content: bytes = content) -> None:
                answer = self.rig.try_upload(SITE, content, timeout=LONGEST)
                assert answer.status_code == 201, f"{answer.status_code} {answer.text[:100]!r}"
                row = answer.json()
                self.sent[row["sha256"]] = row["name"]
                self.answered_by.append((time.monotonic(), row["node"]))

            self.timed("upload", upload)

    def browse(self) -> None:
        """Do with the browser what people do; after an error begin anew."""
        while not self.stop.wait(0.2):
            content = picture(20_000)
            self.sent[sha256(content)] = ""
            page: list[str] = []
            steps = {
                "gallery": self.browser.look_around,
                "form": lambda content=content, page=page: page.append(self.browser.upload(content)),
                "own page": lambda content=content, page=page: self.browser.check(page[0], content),
                "delete": lambda page=page: self.browser.delete(page[0]),
            }
            all(self.timed(what, step) for what, step in steps.items())

    @contextlib.contextmanager
    def at_work(self, deadline: float = 60) -> Iterator[Visitors]:
        """Let them all come, and go again at the end."""
        kinds = [self.look, self.look, self.look, self.discover, self.read, self.write, self.browse]
        threads = [threading.Thread(target=kind, daemon=True) for kind in kinds]
        for thread in threads:
            thread.start()
        try:
            wait_until("every kind of visitor to be served", self.all_served, deadline)
            yield self
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(timeout=60)
            assert not any(thread.is_alive() for thread in threads), "somebody still waits for an answer"

    def all_served(self) -> bool:
        good = {one.what for one in self.seen if not one.fault}
        return good >= {"cached", "uncached", "page", "upload", "gallery", "form", "own page", "delete"}

    @property
    def seens(self) -> Seens:
        return Seens(list(self.seen))


def warm(rig: Rig, rows: Sequence[dict[str, Any]]) -> None:
    """Have every node cache these files."""
    for node in rig.lab.members:
        for row in rows:
            wait_until(
                f"{node} to cache {row['name']}",
                lambda node=node, row=row: rig.fetch(node, row).headers.get("X-Cache") == "HIT", 20,
            )  # fmt: skip
