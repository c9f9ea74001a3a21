"""What glusterd is started with."""

from __future__ import annotations

import yaml
from unit.node.test_edge import ROOT, render

PORTS = {"gluster_server_brick_ports": {"first": 49152, "last": 49251}}


def test_ports_of_bricks_are_reserved_before_a_brick_starts() -> None:
    """The first rollout starts bricks without a boot; an outgoing connection could have taken the port."""
    tasks = yaml.safe_load((ROOT / "roles/gluster_server/tasks/main.yml").read_text(encoding="utf-8"))
    [listed] = [task["tribrick.media.templates"]["files"] for task in tasks if "tribrick.media.templates" in task]
    [file] = [one["dest"] for one in listed if one["src"] == "sysctl.conf.j2"]
    lines = render("gluster_server", "glusterd.service.j2", gluster_server_required_units=[]).splitlines()
    [reserves] = [at for at, line in enumerate(lines) if line.startswith("ExecStartPre=-") and line.endswith(file)]
    [starts] = [at for at, line in enumerate(lines) if line.startswith("ExecStart=")]
    assert reserves < starts
    assert "24007,49152-49251" in render("gluster_server", "sysctl.conf.j2", **PORTS)
