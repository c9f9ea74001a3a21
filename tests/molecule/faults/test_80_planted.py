"""The judge is not blind: each of these breaks the first promise on purpose, and must be called red."""

from __future__ import annotations

import subprocess

import pytest

from faults import observer
from faults.checker import RED, report
from faults.history import Event, History
from faults.torture import Run
from faults.workload import EXTENSION
from helpers import LONG, NODES, SEED, wait_until
from kit import faults
from kit.lab import ROOT
from kit.run import Console

SITE = "/opt/tribrick/site/bin/python3"
FILES = 8

# Writes on a node, by forms that the kit does not use, and by its own; each line of the answer is an acknowledgement.
WRITE = """
import io, json, os, random, sys
def django(path, data):
    import django
    from django.conf import settings
    settings.configured or settings.configure(MEDIA_ROOT=os.path.dirname(path))
    from django.core.files.base import ContentFile
    from django.core.files.storage import FileSystemStorage
    FileSystemStorage(location=os.path.dirname(path)).save(os.path.basename(path), ContentFile(data))
def unsynced(path, data):
    with open(path, "xb") as file:
        file.write(data)
def fsync_before_rename(path, data):
    part = path + ".part"
    with open(part, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)
def kit(path, data):
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
def no_sentinel(path, data):
    import django
    from django.conf import settings
    settings.configured or settings.configure(MEDIA_ROOT=os.path.dirname(path), TRIBRICK={"SENTINEL_ID": False})
    django.setup()
    from django.core.files.base import ContentFile
    from tribrick.storage import VolumeStorage
    class Exactly(VolumeStorage):
        def get_available_name(self, name, max_length=None):
            return name
    Exactly(location=os.path.dirname(path), sentinel_id=False).save(os.path.basename(path), ContentFile(data))
form, root, seed, size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
for label in sys.stdin.read().split():
    globals()[form](os.path.join(root, label), random.Random(f"{seed} {label} {size}").randbytes(size))
    print(label, flush=True)
"""


def test_files_spoilt_behind_glusters_back(rig):
    """One run that ended well; then a file is gone from one brick, a byte flips on another, a file goes everywhere."""
    place = ROOT / ".lab" / "test" / "faults" / "planted"
    run = Run(rig.lab, Console(), f"{SEED}-planted", place, clients=3, renames=False, largest=131_073)
    run.nemesis.recover()
    run.start()
    wait_until("load", lambda: len(run.load.known.files) >= 10, 120)
    run.load.finish()
    assert not run.judge().red, "red before anything was broken"
    known = run.load.known.files
    gone, flipped, nowhere = sorted(known, key=lambda name: known[name][1])[-3:]

    rig.root("node3", f"rm {rig.brick}/{gone}")
    # Looking through a mount lets Gluster put it back, so only the bricks are asked.
    listed = observer.listing(rig.lab, run.token, "node1", EXTENSION)
    places = [place for place in observer.places() if place.startswith("brick")]
    seen = observer.look_everywhere(rig.lab, list(known), ("brick",))
    assert [(one.place, one.name) for one in seen if one.state == "absent"] == [("brick node3", gone)]
    found = report(run.seed, run.history.events, seen, listed, places)
    assert found.red and found.counts["lost"] == 1, found.line()

    flip = "import sys; f = open(sys.argv[1], 'r+b'); b = f.read(1); f.seek(0); f.write(bytes([b[0] ^ 1]))"
    rig.root("node2", f'python3 -c "{flip}" {rig.brick}/{flipped}')
    for node in NODES:
        rig.root(node, f"rm {rig.brick}/{nowhere}")
    found = run.judge()
    words = {one.name: one.verdict for one in found.verdicts}
    assert found.red and (words[flipped], words[nowhere]) == ("corrupt", "lost"), found.line()
    assert found.counts["corrupt"] == 1 and {word for word in words.values() if word in RED} == {"corrupt", "lost"}
    for name in (gone, flipped, nowhere):  # nobody else is to find them
        assert rig.request("DELETE", "node1", f"/api/media/{name}", headers=rig.auth).status_code == 204


def plant(rig, history: History, seed: str, form: str, directory: str, node: str, size: int) -> None:
    """Write files by one form; what the program says is done counts as acknowledged."""
    labels = [f"{form}-{number}" for number in range(FILES)]
    done = subprocess.run(
        ["docker", "exec", "-i", rig.container(node), SITE, "-c", WRITE, form, directory, seed, str(size)],
        input="\n".join(labels), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == labels, f"{form}: {done.stderr[-1000:]}"
    for label in labels:
        op = history.number()
        name = f"{directory.rsplit('/', 1)[-1]}/{label}"
        history.add(Event(op, "invoke", "create", 0.0, form, node, label, size, name))
        history.add(Event(op, "ok", "create", 0.0, form, node, label, size, name))


def judge_planted(rig, history: History, seed: str) -> dict[str, list[str]]:
    """Return the verdicts by form."""
    names = [event.name for event in history.events if event.kind == "ok"]
    seen = observer.look_everywhere(rig.lab, names, ("mount", "brick"))
    found: dict[str, list[str]] = {}
    for one in report(seed, history.events, seen, {}, observer.places()).verdicts:
        found.setdefault(one.label.rsplit("-", 1)[0], []).append(one.verdict)
    return found


@pytest.mark.parametrize("forms", [("unsynced", "django"), ("fsync_before_rename",)], ids="-".join)
def test_forms_of_saving_that_a_power_cut_undoes(rig, forms):
    """The kit's own form beside them stays whole.

    Each fsync carries the whole log of a disk, so what comes after a form saves it: the cut follows at once, and a form
    that syncs too early has a cut of its own. Gluster itself syncs a second after an unsynced write.
    """
    run_clean(rig)
    directory, history = f"{rig.mount}/planted-{forms[0]}", History()
    rig.root("node1", f"mkdir -m 0777 -p {directory}")
    try:
        for form in ("kit", *forms):
            plant(rig, history, SEED, form, directory, "node1", 50_000)
        faults.power_cut(rig.lab, list(NODES))
    finally:
        faults.power_on(rig.lab, list(NODES))
    run_clean(rig)
    found = judge_planted(rig, history, SEED)
    rig.root("node1", f"rm -rf {directory}", timeout=120)
    assert set(found.pop("kit")) == {"stable"}, found
    for form, verdicts in found.items():
        assert set(verdicts) & {"lost", "torn", "corrupt"}, f"{form} was not called red: {verdicts}"
    assert len(found) == len(forms)


def test_without_the_sentinel_files_go_below_an_absent_mount(rig):
    """Two guards are taken away: the immutable mount point, and the sentinel."""
    run_clean(rig)
    node, history = "node2", History()
    unit = "$(systemd-escape --path --suffix=mount " + rig.mount + ")"
    rig.root(node, "systemctl stop tribrick-media-keeper.timer")
    try:
        # Who reads a file just then keeps it busy.
        wait_until("the end of the mount", lambda: rig.run_root(node, f"systemctl stop {unit}").returncode == 0, 60)
        assert rig.run_root(node, f"mountpoint -q {rig.mount}").returncode != 0
        assert "wrote" not in rig.root(node, f"touch {rig.mount}/x && echo wrote || :"), "no guard below the mount"
        rig.root(node, f"chattr -i {rig.mount} && chmod 0777 {rig.mount}")
        plant(rig, history, SEED, "no_sentinel", rig.mount, node, 1000)
    finally:
        rig.root(
            node,
            f"mkdir -p /root/below; find {rig.mount} -mindepth 1 -maxdepth 1 -exec mv -t /root/below {{}} +; "
            f"chmod 0000 {rig.mount}; chattr +i {rig.mount}; "
            f"systemctl start {unit}; systemctl start tribrick-media-keeper.timer",
            timeout=120,
        )
    run_clean(rig)
    for event in history.events:
        event.name = event.label  # they were saved at the top of what was taken for the volume
    assert judge_planted(rig, history, SEED) == {"no_sentinel": ["lost"] * FILES}


def run_clean(rig) -> None:
    wait_until("the lab to be clean", lambda: observer.clean(rig.lab) is None, 300, interval=1)


if LONG:

    def test_without_quorum_two_sides_rename_one_file(rig):
        run_clean(rig)
        directory, history = f"{rig.mount}/planted-quorum", History()
        rig.root("node1", f"mkdir -m 0777 -p {directory}")
        plant(rig, history, SEED, "kit", directory, "node1", 1000)
        option = f"gluster --mode=script volume set {rig.volume} cluster.quorum-type"
        rig.root("node1", f"{option} none")
        try:
            with faults.make(rig.lab, "partition", ["node3"]).holding():
                for node, new in (("node3", "left"), ("node1", "right")):
                    rig.root(
                        node, f"cd {directory} && for f in kit-*; do case $f in *.*) ;; *) mv $f $f.{new};; esac; done",
                        check=False, timeout=120,
                    )  # fmt: skip
                    for label in [f"kit-{number}" for number in range(FILES)]:
                        op, old = history.number(), f"planted-quorum/{label}"
                        history.add(Event(op, "invoke", "rename", 0, new, node, label, 1000, old, f"{old}.{new}"))
                        history.add(Event(op, "ok", "rename", 0, new, node, label, 1000, old, f"{old}.{new}"))
        finally:
            rig.root("node1", f"{option} auto")
        found = judge_planted(rig, history, SEED)
        rig.root("node1", f"rm -rf {directory}", timeout=120, check=False)
        assert set(found["kit"]) & {"lost", "resurrected", "corrupt", "torn"}, found
