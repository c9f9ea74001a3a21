"""What glusterd is started with, and what is said of a volume's options."""

from __future__ import annotations

from typing import Any

import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
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


def told(**result: Any) -> list[str]:
    """What the role says after the module, by its own variables."""
    variables = yaml.safe_load((ROOT / "roles/gluster_volume/vars/main.yml").read_text(encoding="utf-8"))
    own = {name: trust_as_template(value) for name, value in variables.items() if isinstance(value, str)}
    given = {"gluster_volume_name": "media", "gluster_volume_absent": ["node2"], "__gluster_volume_result": result}
    said: list[str] = Templar(loader=DataLoader(), variables=own | given).template(own["__gluster_volume_told"])
    return said


def test_options_that_were_taken_out_of_the_inventory_are_told() -> None:
    drift = [
        {"name": "network.ping-timeout", "found": "42", "wanted": "20", "reason": ""},
        {"name": "performance.cache-size", "found": "1GB", "wanted": None, "reason": "not in the profile"},
    ]
    [strange] = told(pending=[], drift=drift)
    assert "performance.cache-size. Take" in strange and "ping-timeout" not in strange
    assert strange.endswith("gluster volume reset media OPTION")
    [waits] = told(pending=["one", "two"], drift=[])
    assert waits == "node2 away; these changes wait: one; two"
    assert told(pending=[], drift=drift[:1]) == told() == []
