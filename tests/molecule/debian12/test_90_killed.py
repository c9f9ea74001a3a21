"""A rollout killed at random moments and run again ends in the same state as one that was never killed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from helpers import LONG, NODES, ROOT, chance

KILLS = 10 if LONG else 3
# Made anew on each node or at each start, and different every time.
PRIVATE = r"/(glusterfs\.(pem|key|csr)|.*\.(crt|key))$|__pycache__|/\.stamp$|/(pyvenv\.cfg|RECORD|direct_url\.json)$"
STATE = """
cd / && find etc/tribrick etc/nginx etc/ssl/glusterfs* etc/glusterfs etc/systemd/system etc/sysctl.d etc/logrotate.d \
    etc/hosts etc/apt usr/local opt/tribrick etc/postgresql \\( -type f -o -type l \\) 2>/dev/null | LC_ALL=C sort |
while read -r f; do
    if [ -L "$f" ]; then echo "/$f -> $(readlink "$f")"; continue; fi
    echo "/$f $(stat -c '%a %U:%G' "$f") $(sha256sum <"$f")"
done
echo "units:"; systemctl list-unit-files --state=enabled,masked --no-legend --plain | awk '{print $1, $2}'
echo "active:"; systemctl list-units --type=service,socket,timer,mount --state=active --no-legend --plain |
    awk '{print $1}' | grep -Ev '^(user|session|run-|init|sys-|dev-|proc|-|etc-|tmp|logrotate.service)'
echo "held:"; apt-mark showhold; getent passwd tribrick; getent group tribrick
"""


def state(rig):
    """Return what a rollout leaves on each host, and the volume."""
    def host_state(host):
        lines = rig.root(host, STATE, timeout=120).splitlines()
        return [line for line in lines if not re.search(PRIVATE, line.split(" ")[0])]

    return {**rig.everywhere(host_state, (*NODES, "db1")), "volume": rig.volume_state()}


def play(*arguments):
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ansible-playbook"), "--inventory=localhost,", *arguments], cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}, capture_output=True, text=True, timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def start_afresh(rig):
    """New containers, same inventory: nothing of the first rollout is left on the hosts."""
    noted = rig.lab.recall()
    keep = {file: rig.lab.state / file for file in ("vault-password", "state.json")}
    texts = {file: path.read_bytes() for file, path in keep.items()}
    play("-e", f"lab_name={rig.lab.name}", "playbooks/lab_destroy.yml")
    rig.lab.state.mkdir(mode=0o700)
    for file, path in keep.items():
        path.write_bytes(texts[file])
        path.chmod(0o600)
    play("-e", f"lab_name={rig.lab.name} lab_subnet={noted['subnet']} lab_debian={noted['release']}"
         f" lab_image={noted['kind']} lab_image_tag={noted['tag']}", "playbooks/lab_create.yml")
    shutil.rmtree(Path.home() / ".ansible" / "cp", ignore_errors=True)  # connections to the hosts that are gone


def killed(rig, task, seconds):
    """Start site.yml; SIGKILL it with all it started so many seconds into its n-th task; return that task's name."""
    process = subprocess.Popen(
        rig.arguments(), cwd=ROOT, env=rig.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )
    seen, output = [], []
    for line in process.stdout:
        output.append(line)
        seen += re.findall(r"^TASK \[(.*?)\]", line)
        if len(seen) == task:
            break
    with contextlib.suppress(subprocess.TimeoutExpired):  # the moment within the task
        process.wait(timeout=seconds)
    assert process.poll() is None, "".join(output) + process.stdout.read()  # it was still at work
    os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    assert process.wait(timeout=30) == -signal.SIGKILL
    return seen[-1]


def test_killed_rollouts_end_in_the_same_state(rig):
    whole = rig.rollout().good()
    assert set(whole.changed().values()) == {0}
    tasks = len(re.findall(r"^TASK \[", whole.output, re.MULTILINE))
    wanted = state(rig)
    assert all(len(lines) > 30 for lines in wanted.values() if isinstance(lines, list)), wanted
    start_afresh(rig)
    assert rig.run_root("node1", "test -e /etc/tribrick").returncode != 0  # really afresh

    moments = chance("kills")
    reached = [
        killed(rig, task, moments.uniform(0, 1.5))
        for task in sorted(moments.randint(3, tasks - 2) for _ in range(KILLS))  # the preflight only looks
    ]
    print("killed in", reached)

    rig.rollout().good()
    assert set(rig.rollout().good().changed().values()) == {0}
    found = state(rig)
    for part, value in wanted.items():
        if isinstance(value, list):
            lost, more = sorted(set(value) - set(found[part])), sorted(set(found[part]) - set(value))
            told = f"only without kills: {lost[:20]}; only with kills: {more[:20]}"
            assert not lost and not more, f"{part}: {told}; killed in {reached}"
        else:
            assert found[part] == value, reached
    rig.known.clear()  # the first volume is gone with its containers
    rig.account()
    rig.upload("node1")
    rig.settle(60)
