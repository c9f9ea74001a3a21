#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Free a media mount that hangs or is dead, and mount it again."""

from __future__ import annotations

DOCUMENTATION = r"""
module: media_mount
short_description: Free a media mount that hangs or is dead, and mount it again
description:
  - Looks at the mount as the health check does. A mount that answers with the right sentinel is left alone.
  - A call on a hung FUSE mount cannot be killed. Such a mount is freed through its connection's C(abort) in
    C(/sys/fs/fuse/connections). All calls that hang on it then end with an error; nothing acknowledged is lost.
  - Then its process is ended, the mount is taken away and the mount unit started. Files below an unmounted mount point,
    foreign mounts, and other volumes are refused.
options:
  path: {description: The media mount., type: path, required: true}
  volume_id: {description: Identity in the volume's sentinel., type: str, required: true}
  unit: {description: The mount unit., type: str, required: true}
  timeout: {description: Seconds to wait for the mount., type: int, default: 90}
attributes:
  check_mode: {support: full, description: Says what it would do.}
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Bring the mount back
  tribrick.media.media_mount:
    path: /srv/media
    volume_id: 3f0e8a52-1111-4222-8333-944455556666
    unit: srv-media.mount
"""

RETURN = r"""
before: {description: What was found, such as ok or hung or dead or absent., returned: always, type: str}
actions: {description: What was (in check mode, would be) done., returned: always, type: list, elements: str}
"""

import os
import re
import signal
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.health import find_process, look_at_mount

CONNECTIONS = "/sys/fs/fuse/connections"


def connections(mountinfo: str, path: str) -> list[str]:
    """Numbers of the FUSE connections mounted at *path*, from /proc/self/mountinfo: the minor device numbers."""
    found = []
    for line in mountinfo.splitlines():
        words = line.split()
        if len(words) > 9 and "-" in words and words[words.index("-") + 1] == "fuse.glusterfs":
            place = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), words[4])
            if place == path:
                found.append(words[2].partition(":")[2])
    return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "volume_id": {"type": "str", "required": True},
            "unit": {"type": "str", "required": True},
            "timeout": {"type": "int", "default": 90},
        },
        supports_check_mode=True,
    )
    path, unit = module.params["path"], module.params["unit"]
    actions: list[str] = []

    def say(**more: object) -> dict:
        return {"changed": bool(actions), "before": before, "actions": actions, **more}

    def call(*words: str, limit: int = 20) -> None:
        actions.append(" ".join(words))
        if not module.check_mode:
            module.run_command(["timeout", "-k", "2", str(limit), *words])

    # The keeper would start the unit in the middle of this. A run that was killed may have left it stopped.
    timer = "tribrick-media-keeper.timer"
    before, detail = look_at_mount(path, module.params["volume_id"])
    if before == "ok":
        if module.run_command(["systemctl", "is-active", "--quiet", timer])[0] != 0:
            call("systemctl", "start", timer)
        module.exit_json(**say())
    if before in ("dirty", "foreign", "wrong-volume"):
        words = {
            "dirty": f"{path} is not mounted and files lie below it ({detail}); move them away, then run again",
            "foreign": f"{path} is a mount of {detail}; unmount it, then run again",
            "wrong-volume": f"{path} is the mount of a volume with the identity {detail}, and not of this site's",
        }
        module.fail_json(msg=words[before], **say())
    call("systemctl", "stop", timer)
    if before != "absent":
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as stream:
            numbers = connections(stream.read(), path)
        for number in numbers:
            abort = f"{CONNECTIONS}/{number}/abort"
            if before == "hung" and os.path.exists(abort):
                actions.append(f"echo 1 > {abort}")
                if not module.check_mode:
                    with open(abort, "w", encoding="ascii") as stream:
                        stream.write("1")
        pid = find_process("glusterfs", path)
        if pid:
            actions.append(f"kill {pid}")
            if not module.check_mode:
                os.kill(pid, signal.SIGKILL)
        for _ in numbers:
            call("umount", "--lazy", path)
    call("systemctl", "reset-failed", unit)
    call("systemctl", "start", unit, limit=module.params["timeout"])
    call("systemctl", "start", timer)
    if module.check_mode:
        module.exit_json(**say())
    deadline = time.monotonic() + module.params["timeout"]
    while True:
        state, detail = look_at_mount(path, module.params["volume_id"])
        if state == "ok":
            module.exit_json(**say())
        if time.monotonic() > deadline:
            break
        if state == "absent":  # a quorum of bricks may have come back meanwhile
            module.run_command(["timeout", "-k", "2", str(module.params["timeout"]), "systemctl", "start", unit])
        time.sleep(0.5)  # poll
    module.fail_json(
        msg=f"{path} is not back after {module.params['timeout']} s ({state} {detail}".rstrip() + "). A mount needs a "
        "majority of the bricks: playbooks/check_health.yml says which are down; then playbooks/recover_quorum.yml",
        **say(),
    )


if __name__ == "__main__":
    main()
