"""The purger: what it removes, when it opens the cache, what it remembers; and that the role gives it what it takes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from tribrick import ledger, purge
from tribrick.ledger import Entry
from tribrick.purge import PIECE, Cache, PurgeError, Purger, Times, Told, keys, purger
from tribrick.testing import wait_for

ROLE = Path(__file__).resolve().parents[3] / "roles/media_edge"
NAME = "photos/a/3/cat.png"


class Node:
    """A ledger and a cache."""

    def __init__(self, work: Path) -> None:
        self.ledger, self.state, self.run = work / "ledger.sqlite", work / "state", work / "run"
        self.cache = Cache(work / "cache")
        for folder in (self.state, self.run, self.cache.root):
            folder.mkdir()
        ledger._create(self.ledger)
        os.utime(self.ledger)  # as a first pass of the follower does

    @property
    def gate(self) -> bool:
        return (self.run / "open").exists()

    @property
    def status(self) -> dict[str, Any]:
        return dict(json.loads((self.run / "status.json").read_text()))

    def purger(self, directories: tuple[str, ...] = ("",), **times: float) -> Purger:
        return Purger(self.ledger, self.cache, self.state, self.run, list(directories), Times(**{"held": 0.0, **times}))

    def running(self, **times: float) -> Purger:
        """One that was started a second ago, so that the ledger was followed since."""
        made = self.purger(**times)
        made._began -= 1
        return made

    def note(self, kind: str, name: str = NAME, size: int = 10) -> None:
        database = ledger._writable(self.ledger)
        with contextlib.closing(database):
            number, chain = ledger._last(database)
            entry = Entry(number + 1, kind, name, "0" * 64, size, "2026-11-26T00:00:00.000000+00:00", "{}")
            ledger._write(database, entry, entry.chain(chain))
        os.utime(self.ledger)

    def age(self, seconds: float) -> None:
        then = time.time() - seconds
        os.utime(self.ledger, (then, then))

    def fill(self, name: str = NAME, size: int = 10, ending: str = "") -> list[Path]:
        """Put a file into the cache as nginx does; return where its pieces lie."""
        made = []
        for key in keys(f"/media/{name}", size):
            digest = hashlib.md5(key, usedforsecurity=False).hexdigest()
            place = self.cache.root / digest[31] / digest[29:31] / f"{digest}{ending}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"\x05\0\0\0\nKEY: " + key + b"\nHTTP/1.1 200 OK\r\n\r\nbytes")
            made.append(place)
        return made


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def there(places: list[Path]) -> int:
    return sum(place.exists() for place in places)


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 5 * PIECE])
def test_every_piece_goes_and_nothing_else(node: Node, size: int) -> None:
    mine, other = node.fill(size=size), node.fill("photos/a/3/dog.png", 3 * PIECE)
    beside = node.fill(size=size, ending=".0000000042") + node.fill(size=size, ending="-not-nginx")
    node.note("added", size=size)
    made = node.purger()
    made.look()
    assert there(mine) == len(mine)
    node.note("deleted", size=0)  # the size is that of the file, whatever the change says
    made.look()
    assert (there(mine), there(other), there(beside)) == (0, 3, len(beside) // 2)


def test_a_name_whose_bytes_went_late_is_purged_again(node: Node) -> None:
    node.note("added")
    node.note("deleted")
    made = node.purger()
    made.look()
    mine = node.fill()
    node.note("purged")
    made.look()
    assert not there(mine)


def test_a_fill_that_ends_after_the_purge_is_found_later_and_only_then_noted(node: Node) -> None:
    node.note("added")
    made = node.purger(fill=0.6)
    made.look()
    node.note("deleted")
    made.look()
    late = node.fill()
    made.look()
    assert there(late) and node.status["done"] == 1 and node.status["applied"] == 2 and node.status["waiting"] == 1

    def done() -> bool:
        made.look()
        return bool(node.status["done"] == 2)

    wait_for(done, "the last purge", 10)
    assert not there(late)
    assert json.loads((node.state / "purged.json").read_text())["number"] == 2


def test_deletes_without_an_end_do_not_keep_the_place_where_it_was(node: Node) -> None:
    made = node.purger(fill=0.3)
    for number in range(12):
        node.note("added", f"photos/{number}")
        node.note("deleted", f"photos/{number}")
        made.look()
        time.sleep(0.1)  # the deletes are to come in the course of time, not at once
    assert node.status["waiting"] >= 1 and node.status["done"] >= 10


def test_a_purger_that_was_killed_purges_what_was_not_done(node: Node) -> None:
    node.note("added")
    first = node.purger()
    first.look()
    node.note("deleted")
    first.look()
    late = node.fill()
    node.note("added", "photos/x")
    again = node.purger()
    again.look()
    assert not there(late)
    assert again._done is not None and again._done.number == 1


@pytest.mark.parametrize(
    "spoil", ["no place", "damaged place", "other history", "shorter history", "other cache", "fewer directories"]
)
def test_without_a_place_every_deleted_name_is_purged(node: Node, spoil: str) -> None:
    for number in range(3):
        node.note("added", f"photos/{number}")
        node.note("deleted", f"photos/{number}")
    node.note("added", "photos/kept")
    first = node.purger(fill=0.1)

    def done() -> bool:
        first.look()
        return first._done is not None

    wait_for(done, "the first purge")
    place = node.state / "purged.json"
    found = json.loads(place.read_text())
    assert found["number"] == 7
    made = {
        "other history": {"number": 4},
        "shorter history": {"number": 400},
        "other cache": {"cache": "/var/cache/other"},
        "fewer directories": {"directories": []},
    }
    place.write_text("{" if spoil == "damaged place" else json.dumps(found | made.get(spoil, {})))
    if spoil == "no place":
        place.unlink()
    mine = [node.fill(f"photos/{number}")[0] for number in range(3)]
    kept = node.fill("photos/kept")
    node.purger().look()
    assert (there(mine), there(kept)) == (0, 1)


def test_directories_of_other_storages(node: Node) -> None:
    mine = [*node.fill("photos/1"), *node.fill("other/photos/1")]
    node.note("added", "photos/1")
    node.note("deleted", "photos/1")
    node.purger(("", "other/")).look()
    assert not there(mine)


def test_names_of_any_script(node: Node) -> None:
    mine = node.fill("photos/É ünï.png", 2 * PIECE)
    node.note("added", "photos/É ünï.png", 2 * PIECE)
    node.note("deleted", "photos/É ünï.png")
    node.purger().look()
    assert not there(mine)


# The gate.


def test_the_cache_opens_when_a_fresh_ledger_is_applied(node: Node) -> None:
    node.note("added")
    node.note("deleted")
    mine = node.fill()
    made = node.running()
    assert not node.gate
    made.look()
    assert node.gate and not there(mine)
    assert node.status["current"] and node.status["state"] == "up to date"


def test_a_ledger_that_was_young_when_the_node_went_down_does_not_open_the_cache(node: Node) -> None:
    node.note("added")
    mine = node.fill()
    time.sleep(0.05)  # the clock of file times is coarse
    made = node.purger()
    made.look()
    assert not node.gate and not node.status["current"] and "waits" in node.status["state"]
    made._began -= 1
    node.note("deleted")
    made.look()
    assert node.gate and not there(mine)


@pytest.mark.parametrize("absent", [False, True])
def test_after_a_boot_without_the_database_it_waits_and_then_serves_what_it_has(node: Node, absent: bool) -> None:
    node.note("added")
    node.age(60)
    if absent:
        node.ledger.unlink()
    made = node.purger(grace=0.4)
    made.look()
    assert not node.gate and "waits" in node.status["state"]

    def opened() -> bool:
        made.look()
        return node.gate

    wait_for(opened, "the grace ends", 10)
    assert not node.status["current"] and "what was cached before" in node.status["state"]


def test_what_was_deleted_while_the_node_was_away_goes_before_the_cache_opens(node: Node) -> None:
    node.note("added")
    node.age(60)
    made = node.running()
    mine = node.fill()
    made.look()
    assert not node.gate and there(mine)
    node.note("deleted")
    made.look()
    assert node.gate and not there(mine)


def test_the_cache_opens_once_nginx_has_let_go_of_what_was_removed(node: Node) -> None:
    """nginx keeps a file open for a second after its name is gone."""
    node.note("added")
    mine = node.fill()
    node.note("deleted")
    made = node.running(held=0.4)
    made.look()
    removed = time.monotonic()
    assert not there(mine) and not node.gate

    def opened() -> bool:
        node.note("added", (later := f"{time.monotonic()}.jpg"))
        node.note("deleted", later)
        made.look()
        return node.gate

    wait_for(opened, "nginx to have let go, though deletes go on", 10)
    assert time.monotonic() - removed >= 0.3


def test_a_restart_keeps_the_cache_open_and_a_cache_that_cannot_be_emptied_closes_it(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.note("added")
    node.running().look()
    node.age(60)
    made = node.running()
    made.look()
    assert node.gate
    node.note("deleted")
    node.fill()

    def fails(*_given: object) -> None:
        raise PermissionError("not allowed")

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "drop", fails)
        with pytest.raises(PermissionError):
            made.look()
    assert not node.gate


def test_a_ledger_that_cannot_be_read_is_told_once(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    made = node.purger()
    node.ledger.write_bytes(b"no ledger" * 1000)
    for _ in range(3):
        made.look()
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 1
    assert "cannot be read" in node.status["trouble"] and not node.gate


# Commands and the role.


def environment(node: Node, **more: str) -> dict[str, str]:
    given = {"LEDGER": node.ledger, "CACHE": node.cache.root, "STATE": node.state, "RUN": node.run}
    return {f"TRIBRICK_PURGE_{key}": str(value) for key, value in (given | more).items()}


def test_purge_by_hand_and_status(
    node: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in environment(node).items():
        monkeypatch.setenv(key, value)
    assert purge.main(["status"]) == 2
    mine, other = node.fill(size=3 * PIECE), node.fill(f"{NAME}bytes=1-2")
    assert purge.main(["purge", NAME]) == 0
    assert "3 removed" in capsys.readouterr().out
    assert (there(mine), there(other)) == (0, 1)
    node.running().look()
    assert purge.main(["status"]) == 0
    assert json.loads(capsys.readouterr().out)["current"]
    node.age(60)
    node.purger().look()
    assert purge.main(["status"]) == 1


def teller(node: Node, command: str, **times: float) -> Purger:
    return Purger(
        node.ledger, Told(command), node.state, node.run, [""], Times(**{"held": 0.0, **times}), only_new=True
    )


def test_a_command_hears_of_what_is_deleted_from_now_on(node: Node, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    node.note("added", "photos/old")
    node.note("deleted", "photos/old")
    made = teller(node, f"cat >>{heard}", fill=0.2)
    made.look()
    node.note("added", "photos/cafe\u0301 1.png")
    node.note("deleted", "photos/cafe\u0301 1.png")

    def done() -> bool:
        made.look()
        return bool(node.status["done"] == 4)

    wait_for(done, "the last word", 10)
    assert set(heard.read_text().splitlines()) == {"/media/photos/cafe%CC%81%201.png"}
    assert len(heard.read_text().splitlines()) >= 2  # a fill may end after the first


@pytest.mark.parametrize(
    ("command", "said"), [("echo no key >&2; exit 7", "ended with 7: no key"), ("exec sleep 60", "did not end within")]
)
def test_a_command_that_fails_hears_it_again(
    node: Node, tmp_path: Path, command: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purge, "_PATIENCE", 0.5)
    teller(node, "exit 9").look()  # the first start notes the place
    node.note("added")
    node.note("deleted")
    with pytest.raises(PurgeError, match=said):
        teller(node, command).look()
    heard = tmp_path / "heard"
    teller(node, f"cat >>{heard}").look()  # another command, since the first was wrong
    assert heard.read_text() == f"/media/{NAME}\n"


def test_a_command_gets_batches(node: Node, tmp_path: Path) -> None:
    teller(node, "exit 9").look()
    for number in range(purge._BATCH + 1):
        node.note("deleted", f"photos/{number}")
    teller(node, f"wc -l >>{tmp_path}/heard").look()
    assert [int(line) for line in (tmp_path / "heard").read_text().split()] == [purge._BATCH, 1]


@pytest.mark.parametrize("bad", [
    {"LEDGER": ""}, {"CACHE": "relative"}, {"FILL": "0"}, {"FILL": "x"}, {"GRACE": "-1"}, {"DIRECTORIES": "a//b"},
    {"DIRECTORIES": "/a"}, {"DIRECTORIES": "a:../b"},
])  # fmt: skip
def test_a_configuration_that_cannot_work_is_refused(node: Node, bad: dict[str, str]) -> None:
    with pytest.raises(PurgeError, match=f"TRIBRICK_PURGE_{next(iter(bad))}"):
        purger(environment(node, **bad))


def rendered(name: str, **given: Any) -> str:
    values = yaml.safe_load((ROLE / "defaults/main.yml").read_text()) | given | {"ansible_managed": "x"}
    strict = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)  # noqa: S701  no HTML
    strict.tests["match"] = lambda text, pattern: re.match(pattern, text) is not None
    for key, value in yaml.safe_load((ROLE / "vars/main.yml").read_text()).items():
        values[key] = strict.from_string(value).render(values)
    return strict.from_string((ROLE / "templates" / name).read_text()).render(values)


def options(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", rendered(name), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def test_the_program_takes_the_roles_environment() -> None:
    given = dict(re.findall(r'^(\w+)="([^"\\]*)"$', rendered("edge.env.j2"), re.MULTILINE))
    told = {"TRIBRICK_PURGE_COMMAND"}  # another service has it
    assert set(given) | told == set(re.findall(r"``(TRIBRICK_PURGE_\w+)``", str(purge.__doc__)))
    made = purger(given)
    assert (made.times, made.directories) == (Times(), [""]), "the role's defaults are the program's"
    web = yaml.safe_load((ROLE.parent / "media_web/defaults/main.yml").read_text())
    assert str(made.gate) == web["media_web_edge_gate"]
    assert str(made.gate) == yaml.safe_load((ROLE / "vars/main.yml").read_text())["__media_edge_gate"]
    playbook = (ROLE.parents[1] / "playbooks/deploy_receiver.yml").read_text()
    assert f"media_receiver_standby_gate: {made.gate}\n" in playbook
    made = purger(dict(re.findall(r'(\w+)="(.*)"', rendered("edge.env.j2", media_edge_directories=["", "a/b"]))))
    assert made.directories == ["", "a/b/"]


def test_nginx_and_the_purger_mean_the_same_pieces() -> None:
    locations = (ROLE.parent / "media_web/templates/locations.conf.j2").read_text()
    assert re.findall(r"^ *slice (\d+)m;$", locations, re.MULTILINE) == [str(PIECE // 2**20)]
    assert re.findall(r"^ *proxy_cache_key (.*);$", locations, re.MULTILINE) == ["$uri$slice_range"]
    assert "levels=1:2 use_temp_path=off" in rendered("site.conf.j2")


def test_the_units_start_programs_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = options("tribrick-purge.service.j2")["ExecStart"]
    assert line.split() == ["/opt/tribrick/site/bin/python3", "-I", "-m", purge.__name__, "run"]
    monkeypatch.setattr(Purger, "run", lambda _self, _stop: None)
    monkeypatch.setattr(purge.signal, "signal", lambda _number, _what: None)  # this process goes on with its own
    for key, value in re.findall(r'^(\w+)="(.*)"$', rendered("edge.env.j2"), re.MULTILINE):
        monkeypatch.setenv(key, value)
    assert purge.main(line.split()[4:]) == 0
    assert options("tribrick-purge.service.j2")["StateDirectory"] == [Path(os.environ["TRIBRICK_PURGE_STATE"]).name]
    assert options("tribrick-purge.service.j2")["RuntimeDirectory"] == [Path(os.environ["TRIBRICK_PURGE_RUN"]).name]
    assert sys.modules["tribrick.purge"] is purge
    [line] = options("tribrick-purge-tell.service.j2")["ExecStart"]
    words, own = line.split(), options("tribrick-purge-tell.service.j2")
    for word in words:
        if "=" in word:
            monkeypatch.setenv(*word.split("=", 1))
    assert words[-4:-1] == ["-I", "-m", purge.__name__] and purge.main(words[-1:]) == 0
    assert [Path(os.environ["TRIBRICK_PURGE_STATE"]).name] == own["StateDirectory"]
    assert [Path(os.environ["TRIBRICK_PURGE_RUN"]).name] == own["RuntimeDirectory"]


def test_the_rights_of_both() -> None:
    for name in ("tribrick-purge.service.j2", "tribrick-origin.service.j2"):
        unit = options(name)
        assert unit["CapabilityBoundingSet"] == unit["AmbientCapabilities"] == [""]
        assert unit["User"] == ["www-data"] and unit["ProtectSystem"] == ["strict"]
        assert unit["PrivateNetwork"] == unit["NoNewPrivileges"] == ["true"]
        assert unit["After"] == ["local-fs.target"], "it is there for when the mount and the database are not"
        assert "/etc/tribrick/site.env" in unit["InaccessiblePaths"][0]
    assert "ReadWritePaths" not in options("tribrick-origin.service.j2")
    assert options("tribrick-purge.service.j2")["ReadWritePaths"] == ["/var/cache/nginx/media"]
