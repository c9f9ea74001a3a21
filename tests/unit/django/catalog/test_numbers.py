"""A follower who has seen number n never meets a smaller one later."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db import OperationalError, connection, connections, transaction

from tribrick import catalog
from tribrick.models import Change, Counter, MediaFile
from tribrick.storage import StoredFile


def record(name: str, **options: Any) -> MediaFile:
    return catalog.record(StoredFile(name, "0" * 64, 1), **options)


class Other(threading.Thread):
    """Runs *work* with a connection of its own; ``result`` is what it returned or raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.result = work, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:  # noqa: BLE001
            self.result = error
        finally:
            connection.close()

    def end(self) -> Any:
        self.join(30)
        assert not self.is_alive()
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def until_somebody_waits() -> None:
    deadline = time.monotonic() + 20
    with connection.cursor() as cursor:
        while True:
            cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
            if cursor.fetchone()[0]:
                return
            assert time.monotonic() < deadline, "no session waits for a lock"
            time.sleep(0.01)


def test_the_number_is_that_of_the_commit() -> None:
    """The transaction that began first commits last."""
    inserted, go = threading.Event(), threading.Event()

    def slow() -> None:
        with transaction.atomic():
            record("a")
            inserted.set()
            assert go.wait(20)

    other = Other(slow)
    assert inserted.wait(20)
    record("b")
    assert list(Change.objects.values_list("number", "name")) == [(1, "b")]
    go.set()
    other.end()
    assert dict(Change.objects.values_list("number", "name")) == {1: "b", 2: "a"}


def test_nobody_waits_for_an_open_transaction() -> None:
    with transaction.atomic():
        record("a")
        Other(lambda: record("b")).end()
    assert list(Change.objects.order_by("number").values_list("name", flat=True)) == ["b", "a"]


def test_a_rollback_leaves_neither_row_nor_lock() -> None:
    with transaction.atomic():
        record("a")
        transaction.set_rollback(True)
    record("b")
    assert Change.objects.get().name == "b"


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_follower_misses_nothing(isolation: str) -> None:
    """Twelve writers with slow, long, failing transactions; a follower goes on from the largest number."""
    seed = random.randrange(2**32)
    print("seed", seed)
    writing = threading.Event()
    writing.set()
    committed: list[str] = []

    def attempt(names: list[str], dice: random.Random, fails: bool) -> bool:
        """Return False where the isolation level asks for another attempt."""
        try:
            with transaction.atomic():
                with connection.cursor() as cursor:
                    cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}")
                for name in names:
                    record(name)
                    time.sleep(dice.random() * 0.01)
                transaction.set_rollback(fails)
        except OperationalError as error:
            if isolation == "SERIALIZABLE" and getattr(error.__cause__, "sqlstate", "") == "40001":
                return False
            raise
        return True

    def write(writer: int) -> None:
        dice = random.Random(seed + writer)
        for turn in range(12):
            names = [f"{writer}-{turn}-{part}" for part in range(dice.choice([1, 1, 3]))]
            fails = dice.random() < 0.2
            while not attempt(names, dice, fails):
                pass
            if not fails:
                committed.extend(names)

    def follow() -> list[tuple[int, str]]:
        seen: list[tuple[int, str]] = []
        while True:
            more = writing.is_set()
            last = seen[-1][0] if seen else 0
            seen += Change.objects.filter(number__gt=last).order_by("number").values_list("number", "name")  # type: ignore[arg-type]
            if not more:
                return seen

    follower = Other(follow)
    writers = [Other(lambda n=n: write(n)) for n in range(12)]
    try:
        for writer in writers:
            writer.end()
    finally:
        writing.clear()
    seen = follower.end()
    assert len(committed) > 100
    assert sorted(name for _number, name in seen) == sorted(committed)
    assert seen == list(Change.objects.order_by("number").values_list("number", "name"))
    for writer in range(12):  # what one writer did in order has numbers in order
        own = [name for _number, name in seen if name.startswith(f"{writer}-")]
        assert own == [name for name in committed if name.startswith(f"{writer}-")]


def test_who_holds_the_lock_waits_for_nobody(user: Any) -> None:
    """A holds a row that B's foreign key waits for, and B must not have taken the lock before."""
    waiting = threading.Event()

    def b() -> None:
        with transaction.atomic():
            record("b")
            record("c", owner=user)
            waiting.set()

    with transaction.atomic():
        get_user_model().objects.select_for_update().get(pk=user.pk)
        other = Other(b)
        assert waiting.wait(20)
        until_somebody_waits()  # B at its COMMIT, for the user's row
        record("a")
    other.end()
    assert dict(Change.objects.values_list("number", "name")) == {1: "a", 2: "b", 3: "c"}


def test_numbers_are_given_one_commit_at_a_time() -> None:
    """Nobody gets a number before the commit of him who got the last one can be seen."""
    with transaction.atomic():
        record("a")
        with connection.cursor() as cursor:
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # gives the number now: as in the middle of COMMIT
        other = Other(lambda: record("b"))
        until_somebody_waits()
        assert other.is_alive()
    other.end()
    assert dict(Change.objects.values_list("number", "name")) == {1: "a", 2: "b"}


def test_other_databases_count_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no deferred trigger the counter's row is held until the transaction ends."""
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE tribrick_change DISABLE TRIGGER tribrick_number_change")
    try:
        monkeypatch.setattr(type(connections[catalog.database()]), "vendor", "other")
        record("a")
        Counter.objects.all().delete()  # as a flush does
        record("b")
    finally:
        monkeypatch.undo()
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE tribrick_change ENABLE TRIGGER tribrick_number_change")
    assert dict(Change.objects.values_list("number", "name")) == {1: "a", 2: "b"}
