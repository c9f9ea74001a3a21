"""Versions, their merge and its laws, for any histories."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tribrick.sync import versions
from tribrick.sync.versions import SETTLED, BadVersion, Version, VersionVector

NODES = ("n1", "n2", "n3")
ACTORS = [f"{node}.0000000{number}" for number, node in enumerate(NODES)]
DAY = 24 * 3600 * 10**9

vectors = st.dictionaries(st.sampled_from([*ACTORS, SETTLED]), st.integers(1, 4), min_size=1).map(VersionVector.of)


@st.composite
def some_versions(draw: st.DrawFn, name: str = "a.jpg") -> Version:
    content = draw(st.sampled_from(["", "1" * 64, "2" * 64, "3" * 64]))
    return Version(
        name, draw(vectors), content, 5 if content else 0, draw(st.integers(0, 3)), draw(st.integers(0, 3)),
        draw(st.sampled_from(NODES)),
    )  # fmt: skip


sets = st.frozensets(some_versions(), max_size=6)


@given(sets, sets, sets)
def test_a_merge_is_commutative_associative_and_idempotent(one: Any, two: Any, three: Any) -> None:
    merge = versions.merge
    assert merge(one, two) == merge(two, one)
    assert merge(merge(one, two), three) == merge(one, merge(two, three))
    assert merge(merge(one, one), one) == merge(one, ()) == merge(merge(one, ()), one)


@given(sets)
def test_heads_are_what_nobody_follows(known: Any) -> None:
    heads = versions.heads(known)
    assert bool(heads) == bool(known)
    for version in known:
        followed = any(version.vector < other.vector for other in known)
        assert (version in heads) != followed
    assert heads == sorted(heads, key=lambda version: version.rank), "the winner is the last"


@given(vectors, vectors, vectors)
def test_vectors_are_ordered_in_part(one: VersionVector, two: VersionVector, three: VersionVector) -> None:
    assert not one < one
    assert not (one < two and two < one)
    if one < two and two < three:
        assert one < three
    join = one.join(two)
    assert one <= join and two <= join and join == two.join(one)
    if one <= three and two <= three:
        assert join <= three, "the least that has seen both"


@given(sets, st.booleans())
def test_a_conflict_ends_and_nothing_is_lost_by_it(known: Any, keep_both: bool) -> None:
    heads = versions.heads(known)
    made = versions.settle(known, keep_both=keep_both)
    if len(heads) < 2:
        assert made == []
        return
    assert versions.heads([*known, made[0]]) == [made[0]], "the first follows all"
    shown = {version.sha256 for version in made if not version.deleted}
    assert shown == {head.sha256 for head in heads if not head.deleted}
    assert made[0].deleted == any(head.deleted for head in heads), "a deletion wins"
    if not made[0].deleted:
        assert made[0].sha256 == max(heads, key=lambda head: (head.at, head.node, head.sha256)).sha256
    assert all(copy.name != "a.jpg" and copy.origin == "a.jpg" for copy in made[1:])
    assert versions.settle(random.sample(sorted(known, key=lambda v: v.id), len(known)), keep_both=keep_both) == made


@given(sets)
def test_the_same_content_on_all_sides_is_no_conflict(known: Any) -> None:
    same = {replace(version, sha256="1" * 64, size=5) for version in known}
    for keep_both in (False, True):
        assert len(versions.settle(same, keep_both=keep_both)) <= 1


@given(
    some_versions(), st.sampled_from(["", "été/a.jpg", "x" * 250, "漢" * 80 + ".jpeg", "d/" * 300 + "x.tar.gz", ".."])
)
def test_a_conflict_copy_has_a_name_that_peers_take(version: Version, name: str) -> None:
    loser = replace(version, name=name or "a.jpg", sha256="ab" * 32, node="n" * 253, size=5)
    if versions.refusal(loser.name, versions.OWN_NAME_LENGTH):
        return
    copy = versions.conflict_copy(loser)
    assert versions.refusal(copy.name) == ""
    assert copy.name != loser.name and copy.name.rpartition("/")[0] == loser.name.rpartition("/")[0]
    again = versions.conflict_copy(replace(copy, sha256="cd" * 32))
    assert again.origin == loser.name and again.name.count(".conflict-") == 1, "it does not grow"


@given(some_versions())
def test_a_version_is_read_as_it_was_written(version: Version) -> None:
    import json

    assert versions.parse(json.loads(version.text)) == version


GOOD: list[Any] = ["a/b.jpg", {"n1.00000001": 1}, "1" * 64, 5, 1, 1, "n1", ""]


def spoilt(place: int, value: Any) -> list[Any]:
    return [*GOOD[:place], value, *GOOD[place + 1 :]]


@pytest.mark.parametrize(
    "bad",
    [
        None, 5, "text", [], GOOD[:-1], [*GOOD, 1], {"name": "a"},
        *(spoilt(0, name) for name in (
            "", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", ".hidden", ".tribrick-history/x", "a\nb", "a\0b",
            "a\u2028b", "\udc80", "a\x1b[31m", "x" * 256, "d/" * 513 + "x", "a/.abcdefghijklmnopqrst.part", 5, None,
        )),
        *(spoilt(1, vector) for vector in ({}, {"n1": 1}, {"n1.00000001": 0}, {"n1.00000001": -1}, {"../x.00000001": 1},
                                           {"n1.00000001": "1"}, {"n1.00000001": True}, {"~~": 1}, [], None,
                                           {"n1.00000001": 2**63})),
        *(spoilt(2, sha256) for sha256 in ("1" * 63, "G" * 64, None, "../" + "1" * 61)),
        spoilt(3, -1), spoilt(3, 1.5), spoilt(4, "1"), spoilt(5, 2**70), spoilt(6, ""), spoilt(6, "a b"),
        spoilt(7, "../x"),
    ],
)  # fmt: skip
def test_what_is_no_version_is_refused(bad: Any) -> None:
    versions.parse(GOOD)
    with pytest.raises(BadVersion):
        versions.parse(bad)


# Three nodes without disks: any histories, and messages that are lost, repeated and in any order.


class Replica:
    """What one node knows, and what its disk shows: names with versions."""

    def __init__(self, node: str, skew: int) -> None:
        self.node, self.actor, self.skew, self.count = node, f"{node}.00000000", skew, 0
        self.known: set[Version] = set()
        self.disk: dict[str, Version] = {}

    def change(self, name: str, content: str, at: int) -> None:
        self.count += 1
        before = self.disk.get(name)
        vector = (before.vector if before else VersionVector()).with_count(self.actor, self.count)
        new = Version(
            name, vector, content, len(content), at, at + self.skew, self.node, before.origin if before else ""
        )
        self.known.add(new)
        self.disk[name] = new

    def heads(self, name: str) -> list[Version]:
        return versions.heads(version for version in self.known if version.name == name)

    def learn(self, message: Iterable[Version], keep_both: bool) -> None:
        self.known |= set(message)
        fresh = True
        while fresh:
            made: set[Version] = set()
            live = {name for name in self.names() if any(not head.deleted for head in self.heads(name))}
            for name in self.names():
                made |= set(versions.settle(self.heads(name), keep_both=keep_both))
                if name in live and len(self.heads(name)) == 1 and any(other.startswith(f"{name}/") for other in live):
                    made |= set(versions.demote(self.heads(name)[0]))
            fresh = bool(made - self.known)
            self.known |= made

    def names(self) -> set[str]:
        return {version.name for version in self.known}

    def show(self, only: Callable[[str], bool] = lambda name: True) -> None:
        """Bring the disk to what is known; *only* leaves the rest undone, as a crash does."""
        for name in self.names():
            if only(name):
                [self.disk[name]] = self.heads(name)

    def tree(self) -> dict[str, str]:
        return {name: version.sha256 for name, version in self.disk.items() if not version.deleted}


events = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 2), st.sampled_from(["a", "b", "a/x", "a/x/y"])),
        st.tuples(st.just("delete"), st.integers(0, 2), st.integers(0, 9)),
        st.tuples(st.just("send"), st.permutations(range(3)), st.integers(0, 2**16)),
        st.tuples(st.just("show"), st.integers(0, 2), st.integers(0, 2**16)),
    ),
    max_size=40,
)


@settings(max_examples=400)
@given(events, st.lists(st.sampled_from([0, 1, -30 * DAY, 30 * DAY]), min_size=3, max_size=3), st.booleans())
def test_three_nodes_converge(history: Any, skews: list[int], keep_both: bool) -> None:
    nodes = [Replica(name, skew) for name, skew in zip(NODES, skews, strict=True)]
    written: dict[str, int] = {}
    contents: set[str] = set()
    deleted: dict[str, int] = {}
    numbers = itertools.count(1)
    sent: list[tuple[int, list[Version]]] = []
    for what, who, more in history:
        now = next(numbers)
        if what == "write":
            content = f"{now:064x}"
            nodes[who].change(more, content, now * 10**9)
            written[more] = now
            contents.add(content)
        elif what == "delete":
            names = sorted(nodes[who].tree())
            if names:
                name = names[more % len(names)]
                nodes[who].change(name, "", now * 10**9)
                deleted[name] = now
        elif what == "send":  # some of what one knows to another; and some older message once more
            rng = random.Random(more)
            known = sorted(nodes[who[0]].known, key=lambda version: version.id)
            message = rng.sample(known, rng.randint(0, len(known)))
            sent.append((who[1], message))
            for to, old in rng.sample(sent, min(2, len(sent))):
                nodes[to].learn(old, keep_both)
        else:
            nodes[who].learn([], keep_both)  # what was changed here since is settled first, as a run does
            nodes[who].show(lambda name: random.Random(f"{more}{name}").random() < 0.5)  # noqa: B023
    for _ in range(2):
        for one in nodes:
            for other in nodes:
                one.learn(other.known, keep_both)
    for one in nodes:
        one.show()
    assert nodes[0].tree() == nodes[1].tree() == nodes[2].tree()
    assert nodes[0].known == nodes[1].known == nodes[2].known
    assert contents == {version.sha256 for version in nodes[0].known if not version.deleted}, "the history has all"
    for name, when in deleted.items():
        if when > written.get(name, 0):
            assert name not in nodes[0].tree() or ".conflict-" in name, "a deleted name came back"
