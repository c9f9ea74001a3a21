"""Fixtures for the tests that run inside a Molecule scenario (`molecule verify`, ./scripts/test NAME)."""

from __future__ import annotations

import os

import pytest
import testinfra
import yaml

from helpers import LONG, NODES, SEED, Rig
from kit.lab import SSH_USER, Lab


def pytest_report_header() -> str:
    return f"set {'long' if LONG else 'short'}, seed {SEED}"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once why a test failed: a scenario takes long, and may be stopped before pytest sums up."""
    if report.failed:
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
        print("", *(line[:500] for line in lines[:20]), "", sep="\n", flush=True)


@pytest.fixture(scope="session")
def rig() -> Rig:
    """The scenario's lab with an account for the tests."""
    name = os.environ["MOLECULE_SCENARIO_NAME"]
    rig = Rig(Lab(name))
    rig.wait_ready(60)
    rig.account()
    return rig


@pytest.fixture(scope="module", params=NODES)
def host(request: pytest.FixtureRequest) -> testinfra.host.Host:
    """Each node over SSH, as root by sudo.

    testinfra's own reading of an inventory leaves Ansible's expressions as they are (`ansible_host`), so the names come
    from the rendered inventory and the way there from the lab.
    """
    lab = Lab(os.environ["MOLECULE_SCENARIO_NAME"])
    inventory = yaml.safe_load((lab.inventory / "hosts.yml").read_text(encoding="utf-8"))
    assert list(inventory["gluster_servers"]["hosts"]) == list(NODES)
    return testinfra.get_host(
        f"ssh://{SSH_USER}@{lab.addresses[request.param]}",
        sudo=True,
        ssh_identity_file=str(lab.state / "id_ed25519"),
        ssh_extra_args=f"-F none -o BatchMode=yes -o StrictHostKeyChecking=yes"
        f" -o UserKnownHostsFile={lab.state / 'known_hosts'} -o LogLevel=ERROR",
    )
