"""What the tests of corruption and replacement share: files of theirs, the audit, recoveries killed on the way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import requests

from faults import observer
from faults.checker import Seen, wanted_hash
from faults.history import Event, content
from faults.torture import Run
from faults.workload import EXTENSION
from helpers import LONG, NODES, Rig, Rollout, chance, sha256
from kit.lab import ROOT

# Playbooks that want consent. The long set kills each on its way and runs it again, the short set one of them.
DESTRUCTIVE = ("recover_split_brain", "recover_brick", "recover_glusterd", "recover_node", "renew_certificates")
LIMIT = 1500.0


def keep(run: Run, rig: Rig, label: str, size: int, host: str) -> str:
    """Upload a file that no client reads, so that nobody sees it spoiled; the verdict is about it, too."""
    op, data = run.history.number(), content(run.seed, label, size)
    run.history.add(Event(op, "invoke", "upload", 0.0, "test", host, label, size))
    answer = rig.request(
        "POST", host, "/api/media/", headers={"Authorization": f"Token {run.token}"},
        files={"file": (f"{label}{EXTENSION}", data)},
    )  # fmt: skip
    assert answer.status_code == 201, f"{host} answered {answer.status_code}: {answer.text[:300]}"
    name = str(answer.json()["name"])
    run.history.add(Event(op, "ok", "upload", 0.0, "test", host, label, size, name, status=201))
    return name


def delete(run: Run, rig: Rig, name: str, host: str) -> None:
    """Delete a file; the verdict is about it, too."""
    op = run.history.number()
    run.history.add(Event(op, "invoke", "delete", 0.0, "test", host, name=name))
    answer = rig.request("DELETE", host, f"/api/media/{name}", headers={"Authorization": f"Token {run.token}"})
    assert answer.status_code == 204, f"{host} answered {answer.status_code}: {answer.text[:300]}"
    run.history.add(Event(op, "ok", "delete", 0.0, "test", host, name=name, status=204))


def served(
    run: Run, rig: Rig, files: dict[str, tuple[str, int]], hosts: tuple[str, ...]
) -> list[requests.Response]:
    """Each of these nodes serves each of these files (name -> label, size) now, not after a while."""
    answers = []
    for name, (label, size) in files.items():
        for host in hosts:
            answer = rig.request("GET", host, f"/media/{name}")
            assert answer.status_code == 200, f"{host} {name}: {answer.status_code} {answer.text[:200]}"
            assert sha256(answer.content) == wanted_hash(run.seed, label, size), f"{host} {name}: other bytes"
            answers.append(answer)
    return answers


@contextlib.contextmanager
def fault(run: Run, name: str, where: str) -> Iterator[None]:
    """Mark in the history what is made by hand; at its end the lab has to become clean."""
    run.console.say(f"{name} on {where}")
    run.history.mark(f"inject {name}", where)
    try:
        yield
    finally:
        run.history.mark("ended", where)
    run.nemesis.recover(where)
    run.nemesis.done.append(name)


def holds(run: Run, proof: str, where: str) -> None:
    """Mark how the fault is seen from outside."""
    run.history.mark(f"holds {proof}", where)
    run.console.say(f"  holds: {proof}")


def audit(rig: Rig, host: str) -> dict[tuple[str, str], str]:
    """Return what the site's audit finds on a node, (copy, name) -> kind; deletes and uploads under way left out.

    By the bricks' hashes alone: the mount may read any brick, and looking there heals what a brick merely lacks.
    """
    only = " ".join(f"--copy brick-{node}" for node in NODES)
    done = rig.run_root(host, f"tribrick audit --json {only}", timeout=300)
    assert done.returncode in (0, 1), f"{host}: {done.returncode} {done.stdout[-500:]} {done.stderr[-500:]}"
    said = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{"):])[0]
    assert not said["away"], said["away"]
    return {(one["copy"], one["name"]): one["kind"] for one in said["findings"] if one["kind"] not in ("dead", "extra")}


def bricks(rig: Rig, name: str) -> dict[str, Seen]:
    """Return what each brick holds under a name."""
    return {node: observer.look(rig.lab, "brick", node, [name])[0] for node in NODES}


def wrong_places(run: Run, rig: Rig, files: dict[str, tuple[str, int]]) -> list[str]:
    """Return where files (name -> label, size) are not as they were sent: three web servers, mounts and bricks."""
    seen = observer.look_everywhere(rig.lab, files)
    assert len(seen) == 9 * len(files)
    return [
        f"{one.place} {one.name}: {one.state} {one.size} B {one.detail}"
        for one in seen if one.sha256 != wanted_hash(run.seed, *files[one.name])
    ]  # fmt: skip


def turn(name: str) -> bool:
    """Tell whether a playbook is to be killed on its way in this run."""
    return name in DESTRUCTIVE and (LONG or name == chance("killed recovery").choice(DESTRUCTIVE))


def recovery(run: Run, rig: Rig, name: str, *extra: str) -> Rollout:
    """Run a recovery's playbook as an operator would; where it is its turn, kill it on its way first."""
    if turn(name):
        kill(run, rig, name, *extra)
    run.history.mark(f"playbook {name}")
    done = playbook(rig, name, *extra)
    run.console.say(f"  {name}: exit code {done.code} after {done.seconds:.0f} s")
    return done.good()


def _words(rig: Rig, name: str, *extra: str) -> list[str]:
    return [*rig.arguments(*extra)[:-1], f"playbooks/{name}.yml"]


def playbook(rig: Rig, name: str, *extra: str) -> Rollout:
    """Run a playbook to its end."""
    start = time.monotonic()
    done = subprocess.run(
        _words(rig, name, *extra), cwd=ROOT, env=rig.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    return Rollout(done.returncode, done.stdout, time.monotonic() - start)


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it: Ansible's workers have sessions of their own."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def kill(run: Run, rig: Rig, name: str, *extra: str) -> None:
    """Run a playbook and kill it, and all that it has started here, in a task that the seed chooses."""
    listed = subprocess.run(
        [*_words(rig, name, *extra), "--list-tasks"], cwd=ROOT, env=rig.environment, capture_output=True, text=True,
        timeout=120, check=True,
    ).stdout  # fmt: skip
    tasks = len(re.findall(r"TAGS: \[", listed)) - len(re.findall(r"^  play #", listed, re.MULTILINE))
    random = chance(f"kill {name} {' '.join(extra)}")
    number, pause = random.randint(2, tasks), random.random() * 2
    run.history.mark(f"playbook {name} killed")
    with subprocess.Popen(
        _words(rig, name, *extra), cwd=ROOT, env=rig.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said, task = [], ""
        for line in process.stdout:
            said.append(line)
            if line.startswith("TASK ["):
                task, number = line.strip(" *\n"), number - 1
                if number == 0:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(pause)  # somewhere within the task
                    for one in family(process.pid):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(one, signal.SIGKILL)
                    break
        process.wait(60)
    assert number == 0 and process.returncode != 0, "it ended before it was killed:\n" + "".join(said)[-3000:]
    run.console.say(f"  {name} killed {pause:.1f} s into {task}")
