"""The standby: what it serves, from where, and what it never does."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tribrick import standby as module
from tribrick.ledger import Ledger
from tribrick.signature import sign
from tribrick.standby import PIECE, Memory, StandbyError, Wrong, application

from .conftest import LARGE, MODIFIED, NAME, SMALL, Answered, Node, ask

KEYS = {"web": "a secret of the site"}
SIZES = pytest.mark.parametrize("data", [SMALL, LARGE, b"", LARGE[:PIECE], LARGE[: PIECE + 1]], ids=len)


# Which copy


@SIZES
def test_the_first_right_copy_in_the_order_spool_mirror_brick(node: Node, data: bytes) -> None:
    node.note("added", NAME, data)
    made = node.standby()
    expected = []
    for number, root in enumerate((node.brick, node.mirror, node.spool)):
        node.put(root, NAME, data, MODIFIED + number)
        answer = ask(made, NAME)
        assert (answer.status, answer.body, answer.broken) == (200, data, None)
        expected.append(answer.headers["etag"])
    assert expected == [f'"{MODIFIED + number:x}-{len(data):x}"' for number in range(3)]


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=len)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: bytes(len(data)),  # what a brick in mid-heal has
        lambda data: data[:-4096] + bytes(4096),
        lambda data: bytes(4096) + data[4096:],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"",
        lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],
    ],
    ids=["zeros", "zero tail", "zero head", "shorter", "longer", "empty", "one bit"],
)
def test_a_wrong_copy_is_never_served(node: Node, data: bytes, spoil: Callable[[bytes], bytes]) -> None:
    node.note("added", NAME, data)
    for root in (node.spool, node.mirror, node.brick):
        node.put(root, NAME, spoil(data))
    made = node.standby()
    for method in ("GET", "HEAD"):
        answer = ask(made, NAME, method)
        assert answer.status == 503
        assert answer.headers["retry-after"] == "5"
        assert "etag" not in answer.headers
    assert ask(made, NAME).text.count("is not right") == 3
    for conditional in ("HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH"):
        assert ask(made, NAME, **{conditional: "*"}).status == 503
    assert ask(made, NAME, HTTP_RANGE="bytes=5000-5001").status == 503
    assert ask(made, NAME, HTTP_RANGE=f"bytes={len(data) + 5}-").status == 503
    node.put(node.brick, NAME, data)
    assert ask(made, NAME).body == data


def test_a_brick_in_mid_heal_is_served_once_it_is_whole(node: Node) -> None:
    """Full size, all zeros, then filled piece by piece, and in the end the time of the good copies."""
    node.note("added", NAME, LARGE)
    path = node.put(node.brick, NAME, bytes(len(LARGE)))
    made = node.standby()
    with path.open("r+b", buffering=0) as file:
        for at in range(0, len(LARGE), 1024 * 1024):
            assert ask(made, NAME).status == 503
            file.write(LARGE[at : at + 1024 * 1024])
            os.utime(path, (MODIFIED, MODIFIED))
    answer = ask(made, NAME)
    assert (answer.status, answer.body) == (200, LARGE)


def test_bytes_that_change_while_they_are_sent_break_the_answer_off(node: Node) -> None:
    node.note("added", NAME, LARGE)
    path = node.put(node.brick, NAME, LARGE)
    made = node.standby(["brick"])
    assert ask(made, NAME).status == 200
    before = path.stat()
    sent = b""
    answer = made({"REQUEST_METHOD": "GET", "PATH_INFO": f"/{NAME}"}, lambda *_said: None)
    pieces = iter(answer)
    sent += next(pieces)
    with path.open("r+b") as file:
        file.seek(2 * PIECE)
        file.write(bytes(PIECE))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    received: list[bytes] = []
    with pytest.raises(ConnectionAbortedError):
        received.extend(pieces)
    sent += b"".join(received)
    answer.close()
    assert sent == LARGE[: 2 * PIECE], "what was sent is right, and it is not all"
    assert ask(made, NAME).status == 503


def test_the_hashes_of_pieces_hold_even_if_no_time_changes(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write within one tick of the file system's clock leaves every time as it was."""
    node.note("added", NAME, LARGE)
    path = node.put(node.brick, NAME, LARGE)
    node.put(node.mirror, NAME, LARGE)
    monkeypatch.setattr(module, "_key", lambda status: (status.st_dev, status.st_ino, 1, 1, status.st_size))
    made = node.standby(["brick", "mirror"])
    assert ask(made, NAME).body == LARGE
    with path.open("r+b") as file:
        file.write(bytes(100))
    answer = ask(made, NAME)
    assert (answer.status, answer.body) == (200, LARGE), "from the mirror"
    assert ask(made, NAME, HTTP_RANGE=f"bytes={2 * PIECE}-{2 * PIECE + 9}").body == LARGE[2 * PIECE : 2 * PIECE + 10]


def test_a_copy_that_broke_an_answer_off_is_read_again_as_a_whole(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first pieces are right, so without that every answer would break off, for as long as no time changes."""
    node.note("added", NAME, LARGE)
    path = node.put(node.brick, NAME, LARGE)
    node.put(node.mirror, NAME, LARGE)
    monkeypatch.setattr(module, "_key", lambda status: (status.st_dev, status.st_ino, 1, 1, status.st_size))
    made = node.standby(["brick", "mirror"])
    assert ask(made, NAME).body == LARGE
    with path.open("r+b") as file:
        file.seek(2 * PIECE)
        file.write(bytes(100))
    broken = ask(made, NAME)
    assert broken.broken is not None and broken.body == LARGE[: 2 * PIECE]
    assert ask(made, NAME).body == LARGE, "from the mirror"


def test_a_change_during_the_whole_reading_is_seen(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sink's bytes are read before a heal overwrites them with the same bytes: still no proof."""
    node.note("added", NAME, LARGE)
    path = node.put(node.brick, NAME, LARGE)
    read = module._pread

    def touched(descriptor: int, at: int, length: int) -> bytes:
        found = read(descriptor, at, length)
        if at >= 2 * 1024 * 1024:
            path.chmod(0o600)
        return found

    monkeypatch.setattr(module, "_pread", touched)
    answer = ask(node.standby(["brick"]), NAME)
    assert answer.status == 503
    assert "changed while it was read" in answer.text


def test_a_whole_reading_is_done_once(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.note("added", NAME, LARGE)
    path = node.put(node.brick, NAME, LARGE)
    whole = []
    monkeypatch.setattr(
        module, "_read_whole", lambda copy, known, do=module._read_whole: whole.append(1) or do(copy, known)
    )
    made = node.standby()
    for _ in range(3):
        assert ask(made, NAME).status == 200
    assert len(whole) == 1
    os.utime(path, (MODIFIED, MODIFIED + 1))
    assert ask(made, NAME).status == 200
    assert len(whole) == 2, "another time of change, another reading"
    path.chmod(0o600)
    assert ask(made, NAME).status == 200
    assert len(whole) == 3


def test_a_wrong_copy_is_not_read_again_at_once(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.note("added", NAME, LARGE)
    node.put(node.brick, NAME, bytes(len(LARGE)))
    whole = []
    monkeypatch.setattr(
        module, "_read_whole", lambda copy, known, do=module._read_whole: whole.append(1) or do(copy, known)
    )
    made = node.standby()
    assert [ask(made, NAME).status for _ in range(3)] == [503, 503, 503]
    assert len(whole) == 1
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + module.DOUBT + 1)
    assert ask(made, NAME).status == 503
    assert len(whole) == 2


def test_the_memory_has_a_limit() -> None:
    memory = Memory(10_000)
    for number in range(100):
        memory.put((number, 0, 0, 0, 0), "x", bytes(500))
        assert memory._used <= 10_000
    assert memory.get((0, 0, 0, 0, 0), "x") is None
    assert memory.get((99, 0, 0, 0, 0), "x") == bytes(500)
    assert memory.get((99, 0, 0, 0, 0), "y") is None, "of other bytes nothing is known"
    memory.put((99, 0, 0, 0, 0), "x", Wrong("no"))
    memory.forget((99, 0, 0, 0, 0), "x")
    for number in range(100):
        memory.forget((number, 0, 0, 0, 0), "x")
    assert memory._used == 0


def test_a_file_whose_hashes_would_fill_the_memory_is_not_served(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.note("added", NAME, LARGE)
    node.put(node.brick, NAME, LARGE)
    made = node.standby()
    monkeypatch.setattr(module, "LARGEST", len(LARGE) - 1)
    answer = ask(made, NAME)
    assert (answer.status, "larger than what is served" in answer.text) == (503, True)
    monkeypatch.setattr(module, "LARGEST", len(LARGE))
    assert ask(made, NAME).status == 200
    assert 2 * module.KEPT >= 2 * (32 * -(-module.LARGEST // PIECE)) > 0


def test_the_same_sentence_is_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    seldom, now = module.Seldom(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def said(text: str) -> bool:
        return seldom.filter(logging.LogRecord("x", logging.WARNING, "", 0, "%s", (text,), None))

    assert [said("a"), said("a"), said("b")] == [True, False, True]
    now[0] += 61
    assert [said("a"), said("a")] == [True, False]
    assert [said(str(number)) for number in range(3000)] == [True] * 3000
    assert len(seldom._said) <= 1000


# What is deleted, private, unknown


@pytest.mark.parametrize("kinds", [["deleted"], ["deleted", "purged"]])
@pytest.mark.parametrize("age", [0, 100_000])
def test_a_tombstoned_name_is_404_wherever_its_bytes_are(node: Node, kinds: list[str], age: float) -> None:
    node.note("added", NAME, SMALL)
    for root in (node.spool, node.mirror, node.brick):
        node.put(root, NAME, SMALL)
    made = node.standby()
    assert ask(made, NAME).status == 200
    for kind in kinds:
        node.note(kind, NAME)
    node.age(age)
    answer = ask(made, NAME)
    assert (answer.status, answer.text) == (404, "the file was deleted\n")
    assert answer.headers["cache-control"] == "no-store"


def test_a_file_that_is_deleted_while_it_is_verified(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.note("added", NAME, LARGE)
    node.put(node.brick, NAME, LARGE)
    whole = module._read_whole

    def deleted(*given: Any) -> bytes:
        node.note("deleted", NAME)
        return whole(*given)

    monkeypatch.setattr(module, "_read_whole", deleted)
    monkeypatch.setattr(module, "RELOOK", 0.0)
    assert ask(node.standby(), NAME).status == 404


def private_ways() -> dict[str, dict[str, str]]:
    secret, name = KEYS["web"], "private/a/3/cat.jpg"
    return {
        "none": {},
        "empty": {"HTTP_AUTHORIZATION": ""},
        "other scheme": {"HTTP_AUTHORIZATION": "Basic eDp5"},
        "other name": {"HTTP_AUTHORIZATION": sign(secret, "GET", "private/a/3/dog.jpg", key_id="web")},
        "other method": {"HTTP_AUTHORIZATION": sign(secret, "DELETE", name, key_id="web")},
        "other secret": {"HTTP_AUTHORIZATION": sign("x", "GET", name, key_id="web")},
        "other key": {"HTTP_AUTHORIZATION": sign(secret, "GET", name, key_id="other")},
        "too old": {"HTTP_AUTHORIZATION": sign(secret, "GET", name, key_id="web", now=time.time() - 400)},
    }


@pytest.mark.parametrize("way", private_ways())
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_private_name_without_the_signed_header_is_refused(node: Node, way: str, method: str) -> None:
    name = "private/a/3/cat.jpg"
    node.note("added", name, SMALL)
    node.put(node.brick, name, SMALL)
    made = node.standby(keys=KEYS)
    for asked in (name, "private/nowhere"):
        answer = ask(made, asked, method, **private_ways()[way])
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Tribrick"
        assert "etag" not in answer.headers


def test_a_private_name_with_the_signed_header(node: Node) -> None:
    name = "private/a/3/cat.jpg"
    node.note("added", name, SMALL)
    node.put(node.brick, name, SMALL)
    signed = {"HTTP_AUTHORIZATION": sign(KEYS["web"], "GET", name, key_id="web")}
    made = node.standby(keys=KEYS)
    answer = ask(made, name, **signed)
    assert (answer.status, answer.body) == (200, SMALL)
    assert answer.headers["cache-control"] == "private"
    assert ask(made, name, "HEAD", **signed).status == 200
    again = ask(made, name, HTTP_IF_NONE_MATCH=answer.headers["etag"], **signed)
    assert (again.status, again.headers["cache-control"]) == (304, "private")
    assert ask(node.standby(), name, **signed).status == 401, "without keys nothing private is served"
    other = node.standby(keys=KEYS, private=frozenset({"albums"}))
    assert ask(other, name).status == 200
    assert ask(other, "albums/x").status == 401


def test_a_name_that_the_ledger_does_not_know(node: Node) -> None:
    made = node.standby()
    assert ask(made, NAME).status == 404
    node.age(11)
    answer = ask(made, NAME)
    assert answer.status == 503
    assert "does not know the name, but it is 11 s old" in answer.text
    node.age(0)
    node.put(node.spool, NAME, SMALL)
    answer = ask(made, NAME)
    assert answer.status == 503, "uploaded just now, and the ledger comes later"
    assert SMALL not in answer.body
    assert ask(made, "derived/a/b.jpg").status == 503


def test_a_living_name_is_never_404(node: Node, tmp_path: Path) -> None:
    node.note("added", NAME, SMALL)
    made = node.standby()
    answer = ask(made, NAME)
    assert answer.status == 503
    assert answer.text.count("does not have it") == 3
    node.brick.rename(tmp_path / "away")
    node.mirror.rmdir()
    assert ask(made, NAME).status == 503


def test_an_old_ledger(node: Node) -> None:
    node.note("added", NAME, SMALL)
    node.put(node.mirror, NAME, SMALL)
    made = node.standby(max_age=600.0)
    node.age(599)
    assert ask(made, NAME).body == SMALL, "with the database away visitors still see pictures"
    node.age(601)
    answer = ask(made, NAME)
    assert answer.status == 503
    assert "601 s old" in answer.text
    assert answer.headers["retry-after"] == "5"


def test_an_absent_and_a_damaged_ledger(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    node.note("added", NAME, SMALL)
    node.put(node.mirror, NAME, SMALL)
    made = node.standby()
    good = node.ledger.read_bytes()
    node.ledger.write_bytes(random.Random(3).randbytes(8192))
    assert (ask(made, NAME).status, ask(made, NAME).text) == (503, "the ledger cannot be read\n")
    node.ledger.write_bytes(good[:100] + bytes(len(good) - 100))
    assert ask(made, NAME).status == 503
    node.ledger.unlink()
    assert (ask(made, NAME).status, ask(made, NAME).text) == (503, "there is no ledger\n")
    assert ask(made, "never").status == 503
    node.ledger.write_bytes(good)
    assert ask(made, NAME).body == SMALL


def test_a_locked_ledger_does_not_hold_a_request(node: Node) -> None:
    node.note("added", NAME, SMALL)
    made = node.standby(stall=0.3)
    writer = sqlite3.connect(node.ledger, isolation_level=None)
    with contextlib.closing(writer):
        writer.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        assert ask(made, NAME).text == "the ledger does not answer\n"
        assert ask(made, NAME).text == "the ledger does not answer\n"
        assert time.monotonic() - began < 8, "SQLite alone would wait for 10 s"


# Names, links, methods


@pytest.mark.parametrize(
    "name",
    ["..", "../x", "photos/../../x", ".glusterfs/x", "photos/.x", "photos//x", "photos/", "/etc/passwd", "-/x", "a\0b"],
)
def test_names_that_no_stored_file_has(node: Node, name: str) -> None:
    assert ask(node.standby(), f"/{name}").status == 400


def test_links_and_other_things_under_a_name(node: Node, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SMALL)
    for name in ("photos/link", "photos/pipe", "photos/directory", "out/secret", "photos/pointer"):
        node.note("added", name, SMALL)
    for root in (node.spool, node.mirror, node.brick):
        (root / "photos/directory").mkdir(parents=True)
        (root / "photos/link").symlink_to(tmp_path / "secret")
        (root / "out").symlink_to(tmp_path)
        os.mkfifo(root / "photos/pipe")
        (root / "photos/pointer").write_bytes(SMALL)
        (root / "photos/pointer").chmod(0o1000)
    made = node.standby()
    for name in ("photos/link", "photos/pipe", "photos/directory", "out/secret", "photos/pointer"):
        assert ask(made, name).status == 503, name


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "OPTIONS", "PROPFIND"])
def test_other_methods(node: Node, method: str) -> None:
    answer = ask(node.standby(), NAME, method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_odd_names(node: Node) -> None:
    name = "photos/Été ☕ %41+.txt"
    node.note("added", name, SMALL)
    node.put(node.brick, name, SMALL)
    made = node.standby()
    assert ask(made, name).body == SMALL
    assert ask(made, name, QUERY_STRING="v=2").body == SMALL
    told: list[Any] = []
    made({"REQUEST_METHOD": "GET", "PATH_INFO": "/\xff"}, lambda *said: told.append(said))
    assert told[0][0].startswith("400")


def test_nothing_is_written_and_nothing_else_is_opened(node: Node) -> None:
    node.note("added", NAME, LARGE)
    for root in (node.spool, node.mirror, node.brick):
        node.put(root, NAME, bytes(len(LARGE)) if root != node.brick else LARGE)
    made = node.standby()

    def everything() -> list[tuple[str, int, int]]:
        found = [(path, path.lstat()) for path in sorted(node.work.rglob("*"))]
        return [(str(path), status.st_size, status.st_mtime_ns) for path, status in found]

    before = everything()
    seen: list[tuple[str, Any]] = []
    recording = [True]

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if recording and event in ("open", "os.listdir", "os.scandir", "sqlite3.connect", "os.rename", "os.remove"):
            seen.append((event, given))

    sys.addaudithook(hook)
    try:
        assert ask(made, NAME).body == LARGE
        ask(made, "/-/ready")
        ask(made, "nowhere")
    finally:
        recording.clear()
    assert everything() == before
    roots = {str(node.spool), str(node.mirror), str(node.brick)}
    absolute = {str(given[0]) for event, given in seen if event == "open" and os.path.isabs(os.fspath(given[0]))}
    assert absolute == roots
    assert {event for event, _ in seen} == {"open", "sqlite3.connect"}
    assert not [given for event, given in seen if event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)]


# Deadlines and bounds


class Hung:
    """Lets calls of a source hang until it is released."""

    def __init__(self) -> None:
        self.calls = 0
        self.released = threading.Event()

    def __call__(self, *_given: Any) -> int:
        self.calls += 1
        self.released.wait(30)
        raise OSError("late")


def test_a_disk_that_hangs_holds_one_request_for_a_moment(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.note("added", NAME, SMALL)
    node.put(node.brick, NAME, SMALL)
    made, hung = node.standby(), Hung()
    spool = made.sources[0]
    spool.stall = 0.3
    monkeypatch.setattr(spool, "_open", hung)
    monkeypatch.setattr(spool._guard, "_probe", hung)
    try:
        began = time.monotonic()
        assert ask(made, NAME).body == SMALL
        assert 0.25 < time.monotonic() - began < 10
        assert [ask(made, NAME).body for _ in range(20)] == [SMALL] * 20
        assert hung.calls == 2, "it is left alone: one call, and one probe"
        assert '"spool": "does not answer"' in ask(made, "/-/ready").text
    finally:
        hung.released.set()


def test_a_file_opened_too_late_is_closed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.note("added", NAME, SMALL)
    path = node.put(node.spool, NAME, SMALL)
    made, gate, late = node.standby(["spool"]), threading.Event(), []
    made.sources[0].stall = 0.2

    def slow(_name: str) -> int:
        gate.wait(30)
        late.append(os.open(path, os.O_RDONLY))
        return late[0]

    monkeypatch.setattr(made.sources[0], "_open", slow)
    assert "does not answer" in ask(made, NAME).text
    gate.set()
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if late and os.fstat(late[0]):
                time.sleep(0.01)
                continue
        if late:
            return
        time.sleep(0.01)
    pytest.fail("the file is still open")


def test_a_long_verification_is_503_at_the_deadline_and_goes_on(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.note("added", NAME, LARGE)
    node.put(node.brick, NAME, LARGE)
    go_on, whole, began = threading.Event(), module._read_whole, []

    def slow(*given: Any) -> bytes:
        began.append(1)
        go_on.wait(30)
        return whole(*given)

    monkeypatch.setattr(module, "_read_whole", slow)
    made = node.standby(["brick"], deadline=0.3)
    answers: list[Answered] = []
    askers = [threading.Thread(target=lambda: answers.append(ask(made, NAME))) for _ in range(8)]
    start = time.monotonic()
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(10)
    assert time.monotonic() - start < 10
    assert {answer.status for answer in answers} == {503} and len(answers) == 8
    assert answers[0].text == "the file is being verified\n"
    assert answers[0].headers["retry-after"] == "5"
    assert began == [1], "once for all who ask"
    go_on.set()
    until = time.monotonic() + 10
    while (answer := ask(made, NAME)).status == 503 and time.monotonic() < until:
        time.sleep(0.02)
    assert answer.body == LARGE
    assert began == [1]


def test_verifications_that_wait_are_bounded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING", 3)
    go_on, whole = threading.Event(), module._read_whole
    monkeypatch.setattr(module, "_read_whole", lambda *given: go_on.wait(30) and whole(*given))
    names = [f"photos/{number}" for number in range(4)]
    for name in names:
        node.note("added", name, LARGE)
        node.put(node.mirror, name, LARGE)
    made = node.standby(["mirror"], deadline=0.1)
    said = [ask(made, name).text for name in names]
    assert said == ["the file is being verified\n"] * 3 + ["3 files are being verified\n"]
    go_on.set()
    until = time.monotonic() + 20
    while made.verifier._running and time.monotonic() < until:
        time.sleep(0.02)
    assert [ask(made, name).status for name in names[:3]] == [200] * 3


def test_many_at_once(node: Node) -> None:
    """Reads of all kinds while copies come, go and are spoiled: each answer is right, or is none."""
    rng = random.Random(7)
    names = {f"photos/{number}": rng.randbytes(size) for number, size in enumerate((10, 5000, PIECE + 1, 3 * PIECE))}
    for name, data in names.items():
        node.note("added", name, data)
        node.put(node.mirror, name, data)
    made, stop, wrong, right = node.standby(), threading.Event(), [], []

    def read(seed: int) -> None:
        dice = random.Random(seed)
        while not stop.is_set():
            name, data = dice.choice(list(names.items()))
            start = dice.randrange(len(data))
            answer = ask(made, name, HTTP_RANGE=f"bytes={start}-")
            whole = data[start:]
            good = answer.status in (200, 206) and (
                answer.body == whole or (answer.broken and whole.startswith(answer.body))
            )
            (right if good else wrong).append((answer.status, len(answer.body), answer.broken))

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for reader in readers:
        reader.start()
    until = time.monotonic() + 3
    while time.monotonic() < until:
        name, data = rng.choice(list(names.items()))
        path = node.put(rng.choice([node.spool, node.brick]), name, rng.choice([data, bytes(len(data)), data[:-1]]))
        if rng.random() < 0.3:
            path.unlink()
    stop.set()
    for reader in readers:
        reader.join(30)
    assert not wrong, wrong[:5]
    assert len(right) > 50


# Health


def test_ready_says_what_there_is(node: Node, tmp_path: Path) -> None:
    import json

    node.note("added", NAME, SMALL)
    made = node.standby()
    answer = ask(made, "/-/ready")
    said = json.loads(answer.body)
    assert answer.status == 200
    assert said["sources"] == {"spool": "ok", "mirror": "ok", "brick": "ok"}
    assert said["ledger"]["last"] == 1 and said["ledger"]["age"] < 5 and said["ledger"]["fresh"] and said["ready"]
    node.age(40)
    said = json.loads(ask(made, "/-/ready").body)
    assert said["ready"] and not said["ledger"]["fresh"] and 39 < said["ledger"]["age"] < 45
    node.mirror.rmdir()
    (node.brick / ".glusterfs").rmdir()
    answer = ask(made, "/-/ready")
    assert answer.status == 200
    assert "is not a directory" in json.loads(answer.body)["sources"]["mirror"]
    assert "has no .glusterfs" in json.loads(answer.body)["sources"]["brick"]
    node.spool.rmdir()
    assert ask(made, "/-/ready").status == 503, "nothing can be served"
    node.spool.mkdir()
    node.age(4000)
    assert ask(made, "/-/ready").status == 503
    node.ledger.unlink()
    answer = ask(made, "/-/ready")
    assert (answer.status, json.loads(answer.body)["ledger"]) == (503, {"error": "there is no ledger"})


# Configuration


def test_the_environment(node: Node, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text('{"web": "x"}')
    keys.chmod(0o600)
    given = {
        "LEDGER": str(node.ledger), "SPOOL": str(node.spool), "MIRROR": str(node.mirror), "BRICK": str(node.socket),
        "KEYS": str(keys), "PRIVATE": "private albums", "UNCATALOGUED": "",
        "FRESH": "5", "MAX_AGE": "60", "DEADLINE": "0.5", "STALL": "3",
    }  # fmt: skip

    def made(**changed: str | None) -> Any:
        pairs = {**given, **changed}
        return application({f"TRIBRICK_STANDBY_{key}": value for key, value in pairs.items() if value is not None})

    full = made()
    assert [source.name for source in full.sources] == ["spool", "mirror", "brick"]
    assert {source.stall for source in full.sources} == {3.0}
    assert full.keys == {"web": "x"}
    assert full.rules == module.Rules(frozenset({"private", "albums"}), frozenset(), 5.0, 60.0, 0.5, 3.0)
    least = application({"TRIBRICK_STANDBY_LEDGER": "/l", "TRIBRICK_STANDBY_MIRROR": "/m"})
    assert least.rules == module.Rules() and least.keys is None
    assert [source.name for source in least.sources] == ["mirror"]
    for key, value in (
        ("LEDGER", None), ("LEDGER", "relative"), ("SPOOL", "relative"), ("FRESH", "0"), ("FRESH", "-1"),
        ("DEADLINE", "soon"),
        ("PRIVATE", "a/b"), ("UNCATALOGUED", ".."), ("KEYS", "/nowhere"),
    ):  # fmt: skip
        with pytest.raises(StandbyError, match=f"TRIBRICK_STANDBY_{key}"):
            made(**{key: value})
    with pytest.raises(StandbyError, match="_MIRROR and _BRICK"):
        made(SPOOL=None, MIRROR=None, BRICK=None)
    keys.chmod(0o644)
    with pytest.raises(StandbyError, match="everybody may read"):
        made()


def test_the_hash_is_the_ledgers(node: Node) -> None:
    """Right size, right SHA-256 of something else: the ledger decides."""
    node.note("added", NAME, SMALL, sha256=hashlib.sha256(b"x").hexdigest())
    node.put(node.mirror, NAME, SMALL)
    assert ask(node.standby(), NAME).status == 503
    with Ledger(node.ledger) as own:
        assert own.last()[0] == 1


def test_who_asked_a_healthy_mount_gets_the_ledgers_last_word(node: Node) -> None:
    """Unknown to the mount and to the ledger, however old that is: never stored. Alive: served, or 503."""
    standby, missing = node.standby(), {"HTTP_X_TRIBRICK_MISSING": "1"}
    node.note("added", NAME, SMALL)
    node.age(60)
    assert ask(standby, "photos/b/4/none.jpg").status == 503
    assert ask(standby, "photos/b/4/none.jpg", **missing).status == 404
    assert ask(standby, "derived/none.jpg", **missing).status == 404
    assert ask(standby, NAME, **missing).status == 503
    node.put(node.mirror, NAME, SMALL)
    assert ask(standby, NAME, **missing).body == SMALL


def test_a_deleted_file_is_told_from_one_that_never_was(node: Node) -> None:
    node.note("added", NAME, SMALL)
    node.note("deleted", NAME)
    answer = ask(node.standby(), NAME)
    assert (answer.status, answer.headers["x-tribrick-state"]) == (404, "deleted")
    answer = ask(node.standby(), "photos/b/4/none.jpg")
    assert answer.status == 404 and "x-tribrick-state" not in answer.headers
