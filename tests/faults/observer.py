"""Looks at a lab: is it clean again, and what is there under every name, in nine places.

In Gluster-free mode the places are the web servers and the nodes' own trees: nobody looks at mounts and bricks.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence

import requests

from faults.checker import Seen
from kit.faults import everywhere, inside, state
from kit.lab import DATABASE, NODES, Lab
from kit.run import KitError

FIRST = next(iter(NODES))  # the node that is asked what any of them knows

# Runs on a node. Standard input: a directory, then names. Standard output: a line of JSON for each.
LOOK = """
import hashlib, json, os, sys
root = sys.stdin.readline().rstrip("\\n")
for line in sys.stdin:
    name = line.rstrip("\\n")
    found = {"name": name, "state": "file", "detail": ""}
    try:
        with open(os.path.join(root, name), "rb") as file:
            data = file.read()
        found |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(),
                  "zero_tail": len(data) - len(data.rstrip(b"\\0"))}
    except FileNotFoundError:
        found["state"] = "absent"
    except OSError as error:
        found |= {"state": "error", "detail": str(error)}
    print(json.dumps(found), flush=True)
"""


KINDS = ("web", "mount", "brick")
OWN_KINDS = ("web", "tree")  # in Gluster-free mode
MARK = "/etc/tribrick/fallback.json"  # of a node in that mode, or on its way


def places(kinds: Sequence[str] = KINDS) -> list[str]:
    """Return where every name is looked at."""
    return [f"{kind} {node}" for kind in kinds for node in NODES]


def without_gluster(lab: Lab) -> bool:
    """Tell whether the nodes that run are in Gluster-free mode; on the way in or out they are not."""
    there = [node for node in NODES if state(lab, node) == "running"]
    marks = [inside(lab, node, f"cat {MARK} 2>/dev/null || :") for node in there]
    return bool(marks) and all(mark and json.loads(mark)["entered"] for mark in marks)


def kinds_of(lab: Lab) -> tuple[str, ...]:
    """Return the kinds of places that count in the lab's mode."""
    return OWN_KINDS if without_gluster(lab) else KINDS


def root_of(lab: Lab, kind: str) -> str:
    """Return the directory of a kind of place on a node."""
    variables = lab.site_variables()
    if kind == "tree":
        return f"{variables.get('media_mirror_path', '/srv/media-mirror')}/live"
    return str(variables["tribrick_media_root"] if kind == "mount" else variables["tribrick_brick_path"])


def unhealed(lab: Lab, node: str) -> int:
    """Return how many entries wait to be healed; a brick that does not answer is an error."""
    volume = lab.site_variables()["tribrick_volume"]
    text = inside(lab, node, f"gluster --mode=script --xml volume heal {volume} info summary", deadline=60)
    numbers = [number.text or "" for number in ET.fromstring(text).iter("totalNumberOfEntries")]  # noqa: S314 - our lab
    if len(numbers) != len(NODES) or not all(number.isdigit() for number in numbers):
        raise KitError(f"heal info: {numbers}")
    return sum(map(int, numbers))


def bricks_offline(lab: Lab, node: str) -> list[str]:
    """Return the nodes whose bricks are offline, as one node sees it."""
    variables = lab.site_variables()
    command = f"gluster --mode=script --xml volume status {variables['tribrick_volume']}"
    tree = ET.fromstring(inside(lab, node, command, deadline=60))  # noqa: S314 - our lab
    online = {
        one.findtext("hostname")
        for one in tree.iter("node")
        if one.findtext("path") == variables["tribrick_brick_path"] and one.findtext("status") == "1"
    }
    return [one for one in NODES if one not in online]


def spooled(lab: Lab) -> int:
    """Return how many living files are in the spools and not yet on the volume; none in a lab without spools."""
    if not lab.spool:
        return 0
    return counted(lab, "tribrick_mediafile where spooled and state = 'stored'")


def undelivered(lab: Lab) -> int:
    """Return how many files wait to be sent to another node's tree."""
    return counted(lab, "tribrick_outbox where operation = 'put' and done is null")


def counted(lab: Lab, what: str) -> int:
    """Ask the database for a number of rows."""
    query = f"select count(*) from {what}"  # noqa: S608 - of our own words
    name = lab.site_variables()["tribrick_database_name"]
    return int(inside(lab, DATABASE[0], f"su postgres -c 'psql -qtA -d {name}' <<'SQL'\n{query}\nSQL"))


def clean(lab: Lab, under_way: int = 0) -> str | None:
    """Return None when every node is ready, every brick online and nothing waits to be healed or drained.

    While files are being written, Gluster counts those as waiting too: *under_way* says how many these may be. In
    Gluster-free mode nothing may wait to be sent to another node instead.
    """
    try:
        for node in NODES:
            if (seen := state(lab, node)) != "running":
                return f"{node} is {seen}"
        for node in NODES:
            answer = requests.get(f"{lab.url(node)}/readyz", timeout=(2, 5))
            if answer.status_code != 200:
                return f"{node} /readyz {answer.status_code}: {answer.text[:200]}"
        if without_gluster(lab):
            waiting = undelivered(lab)
            return f"{waiting} files wait to be sent to other nodes" if waiting > under_way else None
        if offline := bricks_offline(lab, FIRST):
            return f"brick offline: {', '.join(offline)}"
        if (waiting := unhealed(lab, FIRST)) > under_way:
            return f"{waiting} entries wait to be healed"
        if (waiting := spooled(lab)) > 0:
            return f"{waiting} files wait in the spools"
    except (KitError, requests.RequestException, subprocess.SubprocessError, ET.ParseError) as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def listing(lab: Lab, token: str, node: str, extension: str) -> dict[str, str]:
    """Return stored name -> label of all that the site says is there."""
    found: dict[str, str] = {}
    path: str | None = "/api/media/?limit=200"
    while path is not None:
        answer = requests.get(lab.url(node) + path, headers={"Authorization": f"Token {token}"}, timeout=30)
        if answer.status_code != 200:
            raise KitError(f"{node} {path}: {answer.status_code} {answer.text[:200]}")
        page = answer.json()
        found |= {row["name"]: row["original"].removesuffix(extension) for row in page["results"]}
        path = page["next"]
    return found


def look(lab: Lab, kind: str, node: str, names: Sequence[str]) -> list[Seen]:
    """Look at names in one place."""
    place = f"{kind} {node}"
    if kind == "web":
        with requests.Session() as session:
            return [_fetch(session, lab.url(node), place, name) for name in names]
    done = subprocess.run(
        ["docker", "exec", "-i", lab.container(node), "timeout", "600", "python3", "-c", LOOK],
        input="\n".join([root_of(lab, kind), *names]) + "\n",
        capture_output=True,
        text=True,
        timeout=660,
        check=False,
    )
    seen = [Seen(place, **json.loads(line)) for line in done.stdout.splitlines()]
    if done.returncode != 0 or len(seen) != len(names):
        raise KitError(f"{place}: {len(seen)} of {len(names)} names were looked at; {done.stderr[-300:]}")
    return seen


def _fetch(session: requests.Session, url: str, place: str, name: str) -> Seen:
    try:
        answer = session.get(f"{url}/media/{name}", timeout=(3, 60), allow_redirects=False)
    except requests.RequestException as error:
        return Seen(place, name, "error", detail=str(error))
    if answer.status_code in (404, 410):
        return Seen(place, name, "absent")
    if answer.status_code != 200:
        return Seen(place, name, "error", detail=f"{answer.status_code} {answer.text[:100]}")
    data = answer.content
    tail = len(data) - len(data.rstrip(b"\0"))
    return Seen(place, name, "file", len(data), hashlib.sha256(data).hexdigest(), tail)


def look_everywhere(lab: Lab, names: Iterable[str], kinds: Sequence[str] = KINDS) -> list[Seen]:
    """Look at names in all places, one node beside the other."""
    ordered = sorted(set(names))
    if not ordered:
        return []
    found = everywhere(lambda node: [one for kind in kinds for one in look(lab, kind, node, ordered)], list(NODES))
    return [one for seen in found.values() for one in seen]
