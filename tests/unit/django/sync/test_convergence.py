"""Three real directories, states and histories: any order of changes, runs, lost answers and deaths.

Only the network is replaced: a door is a call. A run is made in a process of its own that dies at
any call that changes something, and it may die again in the next run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tribrick.sync.move import PeerAway, Pulled
from tribrick.sync.plan import Fetch
from tribrick.sync.run import Sync
from tribrick.sync.side import Side
from tribrick.sync.state import Peer, Stamp, State
from tribrick.sync.versions import Version, parse

DAY = 24 * 3600 * 10**9
NODES = ("n1", "n2", "n3")
EXAMPLES = 400 if os.environ.get("TRIBRICK_SET") == "long" else 40


class SkewedSide(Side):
    """A side whose clock is wrong."""

    skew = 0

    def time_of(self, stamp: Stamp) -> int:
        return super().time_of(stamp) + self.skew


class Near:
    """A door without SSH. *loses* says how often an answer does not come; answers are whole or not at all."""

    def __init__(self, name: str, place: Any, rng: random.Random, loses: float) -> None:
        self.name, self.place, self.rng, self.loses = name, place, rng, loses

    def pull(self, known: Peer, *, scan: bool) -> Pulled:
        if self.rng.random() < self.loses:
            raise PeerAway(110, "no answer")
        with State.open(self.place.path) as state:
            side = SkewedSide(state)
            side.skew = self.place.skew
            if scan:
                with state.locked():
                    side.scan(accept=1000)
            again = known.state != state.sequence() or self.rng.random() < self.loses
            rows = list(state.changes(0 if again else known.seq))
            found = [parse(json.loads(text)) for _number, text in rows]
            self.rng.shuffle(found)
            return Pulled(found, Peer(self.name, state.sequence(), state.last(), 0.0), {})

    def fetch(self, fetch: Fetch, side: Side) -> tuple[set[str], str]:
        came = set()
        for sha256, _basis in fetch.contents:
            kept = self.place.root / ".tribrick-history" / "objects" / sha256[:2] / sha256
            if kept.exists() and self.rng.random() >= self.loses:
                new = side.history / "fetch" / sha256
                shutil.copyfile(kept, new)
                side.keep([(new, sha256)])
                came.add(sha256)
        return came, ""


def run(places: list[Any], who: int, seed: int, loses: float, strategy: str) -> None:
    """Make one run of one node."""
    rng = random.Random(seed)
    place = places[who]
    others = [Near(other.node, other, rng, loses) for other in places if other is not place]
    with State.open(place.path) as state:
        side = SkewedSide(state)
        side.skew = place.skew
        Sync(state, side, others, strategy=strategy).run(accept=1000)  # type: ignore[arg-type]  # doors by their looks


@contextmanager
def deadly(calls: int) -> Iterator[None]:
    """The process dies before its *calls*-th call that changes anything. Nothing is cleaned up."""
    left = [calls]

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                os._exit(0)
            return real(*arguments, **more)

        return call

    for name in ("rename", "link", "unlink", "mkdir", "rmdir", "write", "fchmod", "utime", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    from tribrick.sync import side as module

    class Counted:
        renameat2 = staticmethod(counted(module._libc.renameat2))

    module._libc = Counted

    class Dying(sqlite3.Connection):
        def execute(self, query: str, *more: Any) -> Any:
            if query in {"BEGIN IMMEDIATE", "COMMIT"}:
                left[0] -= 1
                if left[0] <= 0:
                    os._exit(0)
            return super().execute(query, *more)

    real = sqlite3.connect
    sqlite3.connect = lambda *arguments, **more: real(*arguments, factory=Dying, **more)  # type: ignore[assignment]
    yield


def run_and_die(calls: int, *arguments: Any) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            with deadly(calls):
                run(*arguments)
            os._exit(0)
        except BaseException:  # noqa: BLE001  it must not go on as the parent
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def all_contents(places: list[Any]) -> set[bytes]:
    return set().union(*(place.contents() for place in places))


def versions_of(place: Any) -> set[Version]:
    with State.open(place.path) as state:
        return {parse(json.loads(text)) for _number, text in state.changes()}


FILES = ["a.jpg", "d/b.jpg", "d", "d/b.jpg/c"]
events = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 2), st.sampled_from(FILES)),
        st.tuples(st.just("delete"), st.integers(0, 2), st.integers(0, 9)),
        st.tuples(st.just("run"), st.integers(0, 2), st.integers(0, 2**16)),
        st.tuples(st.just("die"), st.integers(0, 2), st.integers(0, 2**16)),
    ),
    max_size=16,
)


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    events, st.lists(st.sampled_from([0, -30 * DAY, 30 * DAY]), min_size=3, max_size=3),
    st.sampled_from(["newest", "newest", "keep-both"]),
)  # fmt: skip
def test_three_directories_converge(make: Any, history: Any, skews: list[int], strategy: str) -> None:
    directory = Path(tempfile.mkdtemp(prefix="tribrick-sync-"))
    try:
        places = [make(directory, node) for node in NODES]
        for place, skew in zip(places, skews, strict=True):
            place.skew = skew
        check_history(places, history, strategy)
    finally:
        shutil.rmtree(directory)


def check_history(places: list[Any], history: Any, strategy: str) -> None:
    written: dict[str, int] = {}
    deleted: dict[str, int] = {}
    for now, (what, who, more) in enumerate(history, 1):
        place = places[who]
        before = set(place.tree().values())
        if what == "write":
            somebody_writes(place, more, b"%d" % now + b"x" * now)
            written[more] = now
        elif what == "delete":
            names = [name for name in place.tree() if ".conflict-" not in name]
            if names:
                name = names[more % len(names)]
                (place.root / name).unlink()
                deleted[name] = now
        else:
            rng = random.Random(more)
            run_arguments = (places, who, more, rng.choice([0.0, 0.0, 0.3]), strategy)
            if what == "die":
                run_and_die(rng.randint(1, 80), *run_arguments)
            else:
                run(*run_arguments)
            assert before <= set(place.tree().values()) | all_contents(places), "a content was lost"
    recorded = set().union(*(versions_of(place) for place in places))
    for _ in range(3):
        for who in range(3):
            run(places, who, 0, 0.0, strategy)
    trees = [place.tree() for place in places]
    assert trees[0] == trees[1] == trees[2]
    known = [versions_of(place) for place in places]
    assert known[0] == known[1] == known[2] and recorded <= known[0]
    kept = {path.name for place in places for path in (place.root / ".tribrick-history" / "objects").glob("*/*")}
    assert {version.sha256 for version in known[0] if not version.deleted} <= kept, "the history has all"
    for name, when in deleted.items():
        if when > written.get(name, 0):
            assert name not in trees[0], "a deleted name came back"
    for place in places:
        assert not list((place.root / ".tribrick-history" / "incoming").iterdir())


def somebody_writes(place: Any, name: str, data: bytes) -> None:
    """Write, and take away what is in the way as a person would."""
    target = place.root / name
    if target.is_dir():
        shutil.rmtree(target)
    for parent in target.relative_to(place.root).parents:
        if (place.root / parent).is_file():
            (place.root / parent).unlink()
    place.write(name, data)
