"""The command over a real sshd and rsync, between three real directories."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.test import override_settings

from tribrick import far_copies
from tribrick.storage import HybridStorage, VolumeStorage
from tribrick.sync import command, move, plan
from tribrick.sync.side import Side
from tribrick.sync.state import State

# Each asks three sides over SSH several times, and takes about ten seconds; the short set has three of them.
OVER_SSH = pytest.mark.sample(3, "sync over ssh")

NODES = ("n1", "n2", "n3")


@pytest.fixture
def on(places: Any, entries: Any) -> Callable[..., Any]:
    """Run the command as on a node: ``on("n1", "run")`` gives exit code and JSON."""

    def run(node: str, *arguments: str, text: bool = False, peers: Any = None, **sync: Any) -> tuple[int, Any]:
        with site(places, entries, node, peers, **sync):
            out, code = io.StringIO(), 0
            try:
                more = [] if text else ["--json"]
                if arguments[0] == "run" and "--init" not in arguments:
                    more.append("--no-catalog")
                call_command("tribrick", "sync", *arguments, *more, stdout=out, stderr=io.StringIO())
            except CommandError as error:
                code = error.returncode
                if not out.getvalue():
                    return code, str(error)
            return code, out.getvalue() if text else json.loads(out.getvalue())

    return run


@contextlib.contextmanager
def site(places: Any, entries: Any, node: str, peers: Any = None, **sync: Any) -> Iterator[None]:
    place = next(one for one in places if one.node == node)
    given = {
        "state": str(place.path),
        "peers": [entries[other] for other in NODES if other != node] if peers is None else peers,
        "quiet": 0,
        **sync,
    }
    storage = {"BACKEND": "django.core.files.storage.FileSystemStorage", "OPTIONS": {"location": str(place.root)}}
    with override_settings(
        TRIBRICK={**settings.TRIBRICK, "NODE": node, "SENTINEL_ID": False, "SYNC": given},
        STORAGES={**settings.STORAGES, "default": storage},
    ):
        yield


def test_a_local_directory_of_a_site_with_a_volume_needs_no_sentinel(tmp_path: Path) -> None:
    """As on a site without a volume: the setting is there all the same, and the storage asks for none."""
    with override_settings(TRIBRICK={**settings.TRIBRICK, "SENTINEL_ID": "05fa2186-5327-41a8-9cf9-48f8123e3f6a"}):
        hosts = ["https://node2.example/"]
        assert command._proof(HybridStorage(hosts=hosts, location=tmp_path)) is None
        assert command._proof(VolumeStorage(location=tmp_path)) is not None


def everywhere(on: Any, *arguments: str, rounds: int = 2) -> None:
    for _ in range(rounds):
        for node in NODES:
            code, said = on(node, "run", *arguments)
            assert code == 0, said


def test_three_directories_become_the_same(on: Any, places: Any) -> None:
    one, two, three = places
    one.write("photos/Été 漢字.jpg", b"one")
    two.write("two.txt", b"two" * 1000)
    three.write("-rf", b"hostile")
    three.write("$(touch HACKED);`x`/a'b\"c *.jpg", b"hostile too")
    three.write(" spaces ", b"")
    everywhere(on)
    wanted = {
        "photos/Été 漢字.jpg": b"one", "two.txt": b"two" * 1000, "-rf": b"hostile",
        "$(touch HACKED);`x`/a'b\"c *.jpg": b"hostile too", " spaces ": b"",
    }  # fmt: skip
    assert one.tree() == two.tree() == three.tree() == wanted
    assert (two.root / "photos/Été 漢字.jpg").stat().st_mtime_ns == (
        one.root / "photos/Été 漢字.jpg"
    ).stat().st_mtime_ns
    two.write("photos/Été 漢字.jpg", b"changed on the second")
    (three.root / "two.txt").unlink()
    everywhere(on)
    wanted["photos/Été 漢字.jpg"] = b"changed on the second"
    del wanted["two.txt"]
    assert one.tree() == two.tree() == three.tree() == wanted
    assert b"one" in one.contents() and b"two" * 1000 in one.contents(), "what was replaced and removed is kept"
    for node in NODES:
        code, said = on(node, "run")
        assert code == 0 and not (said["written"] or said["removed"] or said["scan"]["changed"]), "nothing is left"
        assert on(node, "status")[0] == 0


@OVER_SSH
@pytest.mark.parametrize("strategy", ["newest", "keep-both"])
def test_concurrent_changes(on: Any, places: Any, strategy: str) -> None:
    one, two, three = places
    for name in ("a.jpg", "deleted.jpg", "same.jpg"):
        one.write(name, b"old")
    everywhere(on)
    two.write("a.jpg", b"from two")
    two.write("deleted.jpg", b"changed on two")
    two.write("same.jpg", b"the same")
    time.sleep(0.02)
    one.write("a.jpg", b"from one, later")
    (one.root / "deleted.jpg").unlink()
    one.write("same.jpg", b"the same")
    code, said = on("n1", "run", "--strategy", strategy)
    assert code == 0
    assert {conflict["about"] for conflict in said["conflicts"]} == {"a.jpg", "deleted.jpg"}
    everywhere(on, "--strategy", strategy)
    tree = one.tree()
    assert one.tree() == two.tree() == three.tree()
    assert tree["a.jpg"] == b"from one, later" and tree["same.jpg"] == b"the same" and "deleted.jpg" not in tree
    copies = sorted(tree[name] for name in tree if ".conflict-" in name)
    both = [b"from one, later"] if strategy == "keep-both" else []
    assert copies == sorted([b"changed on two", b"from two", *both])
    code, said = on("n3", "conflicts")
    assert code == 1 and len(said["conflicts"]) == len(copies)
    assert on("n3", "status")[0] == 1
    code, text = on("n3", "conflicts", text=True)
    assert "a.jpg" in text and f"{len(copies)} conflict copies" in text


@OVER_SSH
def test_a_conflict_is_resolved_on_one_node_for_all(on: Any, places: Any) -> None:
    one, two, three = places
    for name in ("a.jpg", "b.jpg"):
        one.write(name, b"old")
    everywhere(on)
    for name in ("a.jpg", "b.jpg"):
        two.write(name, b"from two")
        time.sleep(0.02)
        one.write(name, b"from one, later")
    everywhere(on)
    copies = {found["about"]: found["name"] for found in on("n3", "conflicts")[1]["conflicts"]}
    assert on("n3", "resolve", copies["a.jpg"], "--keep", "copy")[0] == 0
    assert three.tree()["a.jpg"] == b"from two"
    assert on("n2", "resolve", copies["b.jpg"], "--keep", "current")[0] == 0
    everywhere(on)
    assert one.tree() == two.tree() == three.tree() == {"a.jpg": b"from two", "b.jpg": b"from one, later"}
    assert on("n1", "conflicts")[0] == 0
    assert {b"old", b"from two", b"from one, later"} <= one.contents(), "the history has all"
    for wrong in (["nothing.jpg"], [copies["a.jpg"]], ["a.jpg"]):
        code, said = on("n1", "resolve", *wrong, "--keep", "copy")
        assert code == 1 and "neither a conflict copy nor undecided" in said


@OVER_SSH
def test_questions_go_to_a_file_and_answers_come_from_it(on: Any, places: Any, tmp_path: Path) -> None:
    one, two, three = places
    file = tmp_path / "questions.json"
    ask = ["--strategy", "ask-file", "--file", str(file)]
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    for name in names:
        one.write(name, b"old")
    for node in NODES:
        on(node, "run", *ask)
    for name in names:
        two.write(name, b"from two")
        one.write(name, b"from one")
    for node in ("n1", "n2", "n1"):
        code, said = on(node, "run", *ask)
    assert code == 1 and said["undecided"] == names
    assert set(one.tree().values()) == {b"from one"} and set(two.tree().values()) == {b"from two"}, "nothing is decided"
    questions = json.loads(file.read_text())
    assert [one["name"] for one in questions["conflicts"]] == names
    assert {choice["node"] for choice in questions["conflicts"][0]["choices"]} == {"n1", "n2"}
    questions["conflicts"][0]["answer"] = "n2"
    questions["conflicts"][1]["answer"] = "both"
    questions["conflicts"][2]["answer"] = next(
        choice["id"] for choice in questions["conflicts"][2]["choices"] if choice["node"] == "n1"
    )
    good = json.dumps(questions)
    for bad in ("no json", '{"conflicts": [{"name": "a.jpg"}]}', good.replace('"n2"', '"n9"', 1)):
        if bad.count("n9") and '"answer": "n9"' not in bad:
            bad = good.replace('"answer": "n2"', '"answer": "n9"')
        file.write_text(bad)
        code, said = on("n1", "run", *ask)
        assert code == 1 and isinstance(said, str), said
    assert set(one.tree().values()) == {b"from one"}
    file.write_text(good)
    code, said = on("n1", "run", *ask)
    assert said["undecided"] == ["d.jpg"]
    for node in ("n2", "n3"):
        on(node, "run", *ask)
    assert on("n2", "resolve", "d.jpg", "--keep", "n1", "--strategy", "ask-file", "--file", str(file))[0] == 0
    for node in NODES * 2:
        code, said = on(node, "run", *ask)
        assert code == 0, said
    tree = one.tree()
    assert one.tree() == two.tree() == three.tree()
    assert tree["a.jpg"] == b"from two" and tree["c.jpg"] == tree["d.jpg"] == b"from one"
    assert len([name for name in tree if name.startswith("b.conflict-")]) == 2
    assert json.loads(file.read_text())["conflicts"] == []


@OVER_SSH
def test_a_plan_changes_nothing(on: Any, places: Any) -> None:
    one, two, _three = places
    one.write("a.jpg", b"old")
    one.write("gone.jpg", b"gone")
    everywhere(on)
    two.write("a.jpg", b"new")
    two.write("b.jpg", b"b" * 5000)
    (two.root / "gone.jpg").unlink()
    on("n2", "run")
    one.write("c.jpg", b"c")

    def everything() -> Any:
        return [
            (str(path), path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for place in places
            for path in sorted([*place.root.rglob("*"), place.path])
        ]

    before = everything()
    code, said = on("n1", "plan")
    assert code == 0
    assert {step["name"]: step["kind"] for step in said["steps"]} == {
        "a.jpg": "write", "b.jpg": "write", "gone.jpg": "remove",
    }  # fmt: skip
    assert said["scan"]["new"] == ["c.jpg"]
    code, text = on("n1", "plan", text=True)
    assert "Nothing was done" in text and "write: b.jpg" in text
    assert everything() == before
    everywhere(on)
    assert on("n1", "plan")[1]["steps"] == []


@OVER_SSH
def test_many_deletions_of_a_peer_need_a_person(on: Any, places: Any) -> None:
    one, two, _three = places
    for number in range(30):
        one.write(f"{number}.jpg", b"%d" % number)
    everywhere(on)
    for number in range(15):
        (two.root / f"{number}.jpg").unlink()
    code, said = on("n2", "run")
    assert code == 1 and "15 of 30 files would be deleted" in said
    code, said = on("n1", "run")
    assert code == 2 and "15 of 30" in said["away"]["n2"], "a peer that refuses says why"
    assert len(one.tree()) == 30
    assert on("n2", "run", "--accept", "15")[0] == 0
    code, said = on("n1", "run")
    assert code == 1 and "--accept 15" in said and len(one.tree()) == 30
    assert on("n1", "run", "--accept", "15")[0] == 0
    assert len(one.tree()) == 15


def test_a_peer_that_is_away_stops_nobody(on: Any, places: Any, entries: Any, sshd: Any) -> None:
    one, two, _three = places
    two.write("a.jpg", b"two")
    wrong = {**entries["n3"], "identity": str(sshd["path"] / "host")}
    code, said = on("n1", "run", peers=[entries["n2"], wrong])
    assert code == 2 and list(said["away"]) == ["n3"]
    assert one.tree() == {"a.jpg": b"two"}
    for peers in ([{**entries["n3"], "port": 1}], [{**entries["n3"], "known_hosts": "/dev/null"}]):
        started = time.monotonic()
        code, said = on("n1", "run", peers=peers)
        assert code == 2 and list(said["away"]) == ["n3"] and time.monotonic() - started < 15


def test_a_peer_that_hangs_is_away(on: Any, entries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(move, "SILENCE", 0.5)
    monkeypatch.setattr(move, "CONNECT", 0.5)
    monkeypatch.setattr(far_copies, "CONNECT", 30.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        code, said = on("n1", "run", peers=[{**entries["n2"], "port": silent.getsockname()[1]}])
        assert code == 2 and list(said["away"]) == ["n2"] and time.monotonic() - started < 5


@OVER_SSH
def test_contents_come_from_whoever_has_them(on: Any, places: Any, entries: Any) -> None:
    """The third hears of the first's file through the second, and gets it from there; or waits for it."""
    one, two, three = places
    one.write("a.jpg", b"one")
    assert on("n2", "run", peers=[entries["n1"]])[0] == 0
    assert on("n3", "run", peers=[entries["n2"]])[0] == 0
    assert three.tree() == {"a.jpg": b"one"}
    one.write("b.jpg", b"from one")
    assert on("n2", "run", peers=[entries["n1"]])[0] == 0
    shutil.rmtree(two.root / ".tribrick-history" / "objects")
    (two.root / ".tribrick-history" / "objects").mkdir()
    code, said = on("n3", "run", peers=[entries["n2"]])
    assert code == 1 and said["missing"] == ["b.jpg"] and said["complaints"]
    assert on("n3", "run", peers=[entries["n2"], entries["n1"]])[0] == 0
    assert three.tree()["b.jpg"] == b"from one"


def test_a_content_that_is_not_what_it_should_be_is_not_taken(on: Any, places: Any, entries: Any) -> None:
    one, _two, three = places
    one.write("a.jpg", b"right")
    on("n1", "run", peers=[])
    (path,) = (one.root / ".tribrick-history" / "objects").glob("*/*")
    path.write_bytes(b"wrong")
    code, said = on("n3", "run", peers=[entries["n1"]])
    assert code == 1 and said["missing"] == ["a.jpg"]
    assert three.tree() == {} and three.contents() == set()


def test_a_large_file_goes_on_where_it_broke_off(
    on: Any, places: Any, entries: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _two, three = places
    data = os.urandom(6_000_000)
    one.write("film.mp4", data)
    on("n1", "run", peers=[])
    real = shutil.which("rsync")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "rsync"
    wrapper.write_text(
        f'#!/bin/sh\nexec 3<&0\n{real} --bwlimit=1000 "$@" <&3 &\nwhile kill -0 $! 2>/dev/null; do sleep 0.1\n'
        f'[ -z "$(find {three.root}/.tribrick-history/fetch/new -type f -size +1000k)" ] || kill $!\ndone\nwait $!\n'
    )
    wrapper.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        code, said = on("n3", "run", peers=[entries["n1"]])
    assert code == 1 and said["missing"] == ["film.mp4"] and three.tree() == {}
    (partial,) = (three.root / ".tribrick-history" / "fetch" / "partial").iterdir()
    arrived = partial.stat().st_size
    assert 500_000 < arrived < len(data)
    wrapper.write_text(f'#!/bin/sh\nexec {real} --stats "$@" >{tmp_path}/stats\n')
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        code, said = on("n3", "run", peers=[entries["n1"]])
    assert code == 0 and three.tree() == {"film.mp4": data}
    stats = (tmp_path / "stats").read_text()
    received = int(next(line for line in stats.splitlines() if "bytes received" in line).split()[-1].replace(",", ""))
    assert received < len(data) - arrived * 0.8, "what had arrived was not sent again"


def test_of_a_changed_file_only_the_difference_is_sent(
    on: Any, places: Any, entries: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _two, three = places
    data = os.urandom(3_000_000)
    one.write("film.mp4", data)
    on("n3", "run", peers=[entries["n1"]])
    one.write("film.mp4", data[:1_000_000] + b"changed" + data[1_000_000:])
    wrapper = tmp_path / "bin" / "rsync"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("rsync")} --stats "$@" >{tmp_path}/stats\n')
    wrapper.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        assert on("n3", "run", peers=[entries["n1"]])[0] == 0
    assert three.tree() == {"film.mp4": data[:1_000_000] + b"changed" + data[1_000_000:]}
    stats = (tmp_path / "stats").read_text()
    received = int(next(line for line in stats.splitlines() if "bytes received" in line).split()[-1].replace(",", ""))
    assert received < 200_000
    assert three.contents() == {data, data[:1_000_000] + b"changed" + data[1_000_000:]}, "the old content is whole"


@OVER_SSH
def test_killed_and_run_again(on: Any, places: Any, entries: Any, tmp_path: Path) -> None:
    """A real process, real SSH, real rsync, SIGKILL at any moment."""
    one, two, three = places
    for number in range(60):
        one.write(f"{number % 7}/{number}.txt", os.urandom(50_000))
    on("n1", "run", peers=[])
    for delay in (0.9, 1.1, 1.3, 1.5, 1.7):
        program = (
            "import django; django.setup()\nfrom django.core.management import call_command\n"
            "call_command('tribrick', 'sync', 'run', '--no-catalog')"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program], env=os.environ | other_site(places, entries, tmp_path),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            time.sleep(delay)
            process.kill()
        for name, data in three.tree().items():
            assert data == one.tree()[name], "never half a file"
    code, said = on("n3", "run", peers=[entries["n1"]])
    assert code == 0, said
    assert three.tree() == one.tree()
    everywhere(on)
    assert one.tree() == two.tree() == three.tree()
    with State.open(one.path) as state:
        assert state.counts()["versions"] == 60, "no version came from being killed"


def other_site(places: Any, entries: Any, tmp_path: Path) -> dict[str, str]:
    """The environment of the third node in a process of its own."""
    three = places[2]
    module = tmp_path / "site3" / "site3_settings.py"
    module.parent.mkdir(exist_ok=True)
    sync = {"state": str(three.path), "peers": [entries["n1"]], "quiet": 0}
    module.write_text(
        "SECRET_KEY = 'x'\nUSE_TZ = True\nINSTALLED_APPS = "
        "['django.contrib.auth', 'django.contrib.contenttypes', 'tribrick']\n"
        f"MEDIA_ROOT = {str(three.root)!r}\n"
        f"TRIBRICK = {{'NODE': 'n3', 'SENTINEL_ID': False, 'SYNC': {sync!r}}}\n"
    )
    paths = [str(Path(move.__file__).parents[2]), str(module.parent)]
    return {"PYTHONPATH": os.pathsep.join(paths), "DJANGO_SETTINGS_MODULE": "site3_settings"}


@OVER_SSH
def test_two_runs_at_once(on: Any, places: Any) -> None:
    """All three run at the same time, more than once: nobody waits for ever."""
    for place in places:
        for number in range(5):
            place.write(f"{place.node}-{number}.txt", place.node.encode() * 1000)
    with State.open(places[0].path) as state, state.locked("run", 0):
        code, said = on("n1", "run")
        assert code == 1 and "somebody else is at work" in said
    everywhere(on)
    assert places[0].tree() == places[1].tree() == places[2].tree() and len(places[0].tree()) == 15


# The door


def ssh(entries: Any, node: str, command: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    entry = entries[node]
    return subprocess.run(
        [
            "ssh", "-oBatchMode=yes", "-T", "-p", str(entry["port"]), "-i", entry["identity"],
            f"-oUserKnownHostsFile={entry['known_hosts']}", entry["address"], command,
        ],
        capture_output=True, timeout=60, check=False, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        "", "id", "cat /etc/passwd", "tribrick-sync 1 changes 0 - scan; id", "tribrick-sync 1 changes 0 - scan\nid",
        "tribrick-sync 1 changes -1 - scan", "tribrick-sync 2 changes 0 - scan", "rsync --server . ./",
        "rsync --server --sender -tIRe.LsfxCIvu --files-from=- --from0 . /etc/",
        "rsync --server --sender -tIRe.LsfxCIvu --files-from=- --from0 . ../",
        "rsync --server --sender -tIRLe.LsfxCIvu --files-from=- --from0 . ./",
        "rsync --server --sender -logDtpre.LsfxCIvu . ./",
        "rsync --server --sender -tIRe.LsfxCIvu --files-from=/etc/passwd --from0 . ./",
        "rsync --server --sender -tIRe.LsfxCIvu --files-from=- --remove-source-files . ./",
        "rsync --server --sender -tIRe.LsfxCIvu --files-from=- --log-file=x . ./",
        "rsync --server --sender -s", "rsync --server --daemon .", "rsync '", "internal-sftp",
    ],
)  # fmt: skip
def test_the_door_lets_nothing_else_through(places: Any, entries: Any, command: str) -> None:
    places[1].write("secret.jpg", b"secret")
    places[1].scan()
    done = ssh(entries, "n2", command, input=b"")
    assert done.returncode != 0 and b"this key may ask" in done.stderr + done.stdout
    assert b"root:" not in done.stdout and b"uid=" not in done.stdout


def test_nothing_can_be_written_or_read_around_the_door(places: Any, entries: Any, tmp_path: Path) -> None:
    entry = entries["n2"]
    places[1].write("a.jpg", b"x")
    places[1].scan()
    (tmp_path / "mine").write_bytes(b"x")
    shell = f"ssh -p {entry['port']} -i {entry['identity']} -oUserKnownHostsFile={entry['known_hosts']}"
    there = f"{entry['address']}:"
    for arguments in (
        [str(tmp_path / "mine"), f"{there}./"], [f"{there}/etc/passwd", str(tmp_path)], [f"{there}./", str(tmp_path)],
        ["--files-from=-", "--remove-source-files", f"{there}./", str(tmp_path)],
        ["--files-from=-", "--copy-links", f"{there}./", str(tmp_path)],
    ):  # fmt: skip
        done = subprocess.run(
            ["rsync", "-e", shell, *arguments], input=b"x\n", capture_output=True, timeout=60, check=False
        )
        assert done.returncode != 0 and b"this key may ask" in done.stderr, done.stderr
    # With the options of a run, names that lead out lead nowhere.
    (tmp_path / "got").mkdir()
    subprocess.run(
        ["rsync", "-e", shell, "--times", "--ignore-times", "--no-implied-dirs", "--files-from=-", f"{there}./",
         "got/"],
        input=b"../side.json\n../../a.jpg\n/etc/passwd\n", capture_output=True, timeout=60, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert [path for path in (tmp_path / "got").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "answer",
    [
        "", "nonsense", "[1, 2]", '{"tribrick-sync": 2, "state": "x", "after": 0, "scan": {}}',
        "HEAD", "HEAD\n[1, 5]", 'HEAD\n[1, ["../x", {"n1.00000001": 1}, "", 0, 0, 0, "n1", ""]]\n"end"',
        'HEAD\n[2, GOOD]\n[1, GOOD]\n"end"', "HEAD\n[1, GOOD]", 'HEAD\n[1, GOOD]\n"end"\n[2, GOOD]',
    ],
)  # fmt: skip
def test_a_peer_that_talks_nonsense_is_away_and_nothing_is_taken(
    on: Any, places: Any, entries: Any, sshd: Any, tmp_path: Path, answer: str
) -> None:
    head = json.dumps({"tribrick-sync": 1, "state": "0" * 32, "after": 0, "scan": {}})
    good = json.dumps(["good.jpg", {"n2.00000001": 1}, "1" * 64, 5, 0, 0, "n2", ""])
    (tmp_path / "answer").write_text(answer.replace("HEAD", head).replace("GOOD", good) + "\n")
    key = (sshd["path"] / "n2.pub").read_text()
    (sshd["path"] / "authorized_keys").write_text(f'restrict,command="cat {tmp_path}/answer" {key}')
    code, said = on("n1", "run", peers=[entries["n2"]])
    assert code == 2 and list(said["away"]) == ["n2"]
    with State.open(places[0].path) as state:
        assert state.counts()["versions"] == 0


# Settings and options


def test_the_first_run_is_asked_for(on: Any, places: Any, tmp_path: Path) -> None:
    places[0].path.unlink()
    places[0].write("a.jpg", b"one")
    code, said = on("n1", "run")
    assert code == 1 and "--init" in said
    code, said = on("n1", "run", "--init", "--no-catalog", peers=[])
    assert code == 1 and "belongs to a state already" in said, "the lost state may not be lost"
    places[0].path.unlink(missing_ok=True)
    (places[0].root / ".tribrick-history" / "side.json").unlink()
    assert on("n1", "run", "--init", "--no-catalog", peers=[])[0] == 0
    code, said = on("n1", "run", "--init", "--no-catalog", peers=[])
    assert code == 1 and "already" in said


def test_a_first_run_that_was_killed_goes_on(on: Any, places: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sync watch` begins a state only where there is none, so nobody would finish the beginning."""
    places[0].path.unlink()
    shutil.rmtree(places[0].root / ".tribrick-history")
    places[0].write("a.jpg", b"one")

    def killed(_side: Side) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Side, "begin", killed)
        with pytest.raises(KeyboardInterrupt):
            on("n1", "run", "--init", "--no-catalog", peers=[])
    assert on("n1", "run", peers=[])[0] == 0 and on("n1", "status")[1]["files"] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"peers": [{"name": "x"}]}, {"peers": [{"name": "x", "address": "a@b", "password": "x"}]},
        {"peers": [{"name": "x", "address": "-oProxyCommand=x@b"}]}, {"peers": [{"name": "a b", "address": "a@b"}]},
        {"peers": [{"name": "x", "address": "a@b"}] * 2}, {"nonsense": 1},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(on: Any, wrong: Any) -> None:
    with pytest.raises(ImproperlyConfigured):
        on("n1", "status", **wrong)


def test_wrong_options_are_refused(on: Any, places: Any) -> None:
    for arguments in (
        ["run", "a.jpg"], ["resolve"], ["resolve", "a.jpg"], ["run", "--peer", "nobody"],
        ["run", "--strategy", "ask-file"],
    ):  # fmt: skip
        code, said = on("n1", *arguments)
        assert code == 1 and isinstance(said, str), arguments
    code, said = on("n1", "status", state="")
    assert code == 1 and '"state"' in said
    places[0].path.write_bytes(b"damaged" * 1000)
    code, said = on("n1", "run")
    assert code == 1 and "--init" in said


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        call_command("tribrick", "sync", "--help")
    said = capsys.readouterr().out
    assert end.value.code == 0
    for word in ("status", "plan", "run", "conflicts", "resolve", "ask-file", "Exit codes", "--accept"):
        assert word in said


def test_portions() -> None:
    from tribrick.sync.versions import Version, VersionVector

    def step(number: int, name: str, size: int) -> plan.Step:
        return plan.Step(
            name, Version(name, VersionVector((("n.00000001", 1),)), f"{number:064x}", size, 0, 0, "n"), None
        )

    steps = [step(number, f"{number}.{'jpg' if number % 2 else 'txt'}", 100_000_000) for number in range(8)]
    steps.append(step(9, "huge.mp4", 10**12))
    steps.append(step(1, "again.jpg", 100_000_000))
    found = plan.portions(steps)
    assert all(len(fetch.contents) == 1 or fetch.size <= plan.PORTION_BYTES for fetch in found)
    assert [fetch.contents for fetch in found if fetch.size == 10**12] == [((f"{9:064x}", ""),)]
    contents = [sha256 for fetch in found for sha256, _basis in fetch.contents]
    assert len(contents) == len(set(contents)) == 9
    assert {fetch.compress for fetch in found} == {True, False}
