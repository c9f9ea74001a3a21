"""Measures a run against plain rsync -a: not a test of the suite, it is called by its name.

    pytest -s tests/unit/django/sync/speed.py

10,000 files of 20 KB, 100 of them changed at the other side before each turn. Both go over the same
sshd. The run is a whole process, Django's start included; the other side looks at its disk in it.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tribrick.sync import move
from tribrick.sync.state import State

FILES, CHANGED, SIZE, TURNS = 10_000, 100, 20_000, 7


def test_speed(places: Any, entries: Any, tmp_path: Path, sshd: Any) -> None:
    one, _two, three = places
    for number in range(FILES):
        one.write(f"{number % 100}/{number}.jpg", random.randbytes(SIZE))
    site = tmp_path / "site"
    site.mkdir()
    sync = {"state": str(three.path), "peers": [entries["n1"]], "quiet": 0}
    (site / "speed_settings.py").write_text(
        "SECRET_KEY = 'x'\nUSE_TZ = True\nINSTALLED_APPS = "
        "['django.contrib.auth', 'django.contrib.contenttypes', 'tribrick']\n"
        f"MEDIA_ROOT = {str(three.root)!r}\nTRIBRICK = {{'NODE': 'n3', 'SENTINEL_ID': False, 'SYNC': {sync!r}}}\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(move.__file__).parents[2]), str(site)]),
        "DJANGO_SETTINGS_MODULE": "speed_settings",
    }
    run = [sys.executable, "-m", "django", "tribrick", "sync", "run", "--no-catalog"]
    plain = tmp_path / "plain"
    plain.mkdir()
    key = (sshd["path"] / "host.pub").read_text()  # a key that opens everything, for rsync alone
    with (sshd["path"] / "authorized_keys").open("a") as keys:
        keys.write(key)
    entry = entries["n1"]
    shell = f"ssh -oBatchMode=yes -p {entry['port']} -i {sshd['path']}/host -oUserKnownHostsFile={entry['known_hosts']}"
    rsync = ["rsync", "-a", "-e", shell, "--exclude=/.tribrick-history", f"{entry['address']}:{one.root}/", f"{plain}/"]

    def seconds(command: list[str]) -> float:
        started = time.monotonic()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=500)
        return time.monotonic() - started

    print(f"\nfirst: rsync -a {seconds(rsync):.2f} s, run {seconds(run):.2f} s")
    times: dict[str, list[float]] = {"rsync": [], "run": []}
    for turn in range(TURNS):
        for number in random.sample(range(FILES), CHANGED):
            one.write(f"{number % 100}/{number}.jpg", random.randbytes(SIZE))
        for what in ("rsync", "run") if turn % 2 else ("run", "rsync"):
            times[what].append(seconds(rsync if what == "rsync" else run))
        time.sleep(0.1)
    assert one.tree() == three.tree()
    assert sorted(path.name for path in plain.rglob("*.jpg")) == sorted(Path(name).name for name in one.tree())
    with State.open(three.path) as state:
        assert state.dirty() == []
    for what, found in times.items():
        print(f"{what}: median {statistics.median(found):.2f} s, all {' '.join(f'{one:.2f}' for one in sorted(found))}")
    shutil.rmtree(plain)
