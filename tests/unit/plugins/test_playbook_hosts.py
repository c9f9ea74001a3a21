"""Playbooks that must see certain hosts, run by Ansible itself where they do not. They end before any change."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
INVENTORY = """
[gluster_servers]
node1
node2
node3
[app_servers:children]
gluster_servers
[all:vars]
ansible_connection=local
ansible_become=false
ansible_python_interpreter={python}
tribrick_volume=media
tribrick_volume_id=3f0e8a52-1111-4222-8333-944455556666
tribrick_brick_mount={work}/disk
tribrick_brick_path={work}/disk/brick
tribrick_media_root={work}/media
tribrick_allow_shared_filesystem=true
tribrick_user=tribrick
tribrick_upload_directories=["photos"]
vault_tribrick_gluster_ca_certificate=none
vault_tribrick_gluster_ca_key=none
"""


@pytest.fixture
def play(tmp_path: Path):
    """Run a playbook on three hosts that are this machine; *dead* does not answer, only *apart* run the site."""

    def run(name: str | Path, *words: str, dead: str = "", apart: str = "") -> subprocess.CompletedProcess[str]:
        text = INVENTORY.format(python=sys.executable, work=tmp_path)
        if apart:
            text = text.replace("[app_servers:children]\ngluster_servers", f"[app_servers]\n{apart}")
        if dead:
            text = text.replace(dead, f"{dead} ansible_connection=ssh ansible_host=127.0.0.1 ansible_port=9", 1)
        (tmp_path / "hosts.ini").write_text(text, encoding="utf-8")
        settings = {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_SSH_RETRIES": "0"}
        return subprocess.run(
            [sys.executable, "-m", "ansible", "playbook", f"--inventory={tmp_path}/hosts.ini",
             str(ROOT / "playbooks" / name), *words],
            env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("recover_brick.yml", "node2"),  # neither consent nor proof, which ask the others
        ("recover_brick.yml", "node1,node3"),  # and the brick is not made anew
        ("recover_heal.yml", "node2"),  # one brick is the same as itself
        ("recover_split_brain.yml", "node2"),
        ("renew_certificates.yml", "node2"),  # the others would not believe its new CA
        ("restore_database.yml", "node2"),  # the sites of the others go on meanwhile
        ("fallback_enable.yml", "node2"),  # the others go on taking uploads, into the volume
        ("fallback_disable.yml", "node2"),
    ],
)
def test_what_needs_every_node_is_not_done_on_some(play, name: str, limit: str) -> None:
    done = play(name, "-e", "node=node2", "-e", "confirm=yes", "--limit", limit)
    assert done.returncode == 2 and "run it again without --limit" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["../site.yml", "fallback_enable.yml"])
@pytest.mark.parametrize("absent", ["node2,node3", "node2, node3,"])
def test_dead_hosts_are_left_out_however_the_list_is_written(play, name: str, absent: str) -> None:
    done = play(name, "-e", json.dumps({"absent": absent}), "--list-hosts")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"^ {6}(node\d)$", done.stdout, re.M)) == {"node1"}, done.stdout


@pytest.mark.parametrize("limit", [(), ("--limit", "node2")])
def test_the_page_of_health_judges_whoever_was_asked(play, limit: tuple[str, ...]) -> None:
    done = play("check_health.yml", *limit)
    asked = ["node2"] if limit else ["node1", "node2", "node3"]
    assert done.returncode == 2
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ERROR ")]
    assert found == [f"{name}:" for name in asked], done.stdout


@pytest.mark.parametrize("name", ["recover_mount.yml", "reboot_nodes.yml", "restore_media.yml"])
def test_a_node_that_nobody_has_is_refused(play, name: str) -> None:
    done = play(name, "-e", "node=node7", "-e", "confirm=yes", "-e", "everything=yes", "--check")
    assert done.returncode == 2 and "has no host node7" in done.stdout, done.stdout + done.stderr


def test_a_dead_host_does_not_keep_the_mounts_of_the_others_away(play) -> None:
    done = play("recover_mount.yml", "--check", dead="node1")
    assert done.returncode == 4, done.stdout + done.stderr
    recap = done.stdout.partition("PLAY RECAP")[2]
    assert re.search(r"node1 .*unreachable=1", recap)
    assert re.search(r"node2 .*changed=1 .*failed=0", recap) and re.search(r"node3 .*changed=1 .*failed=0", recap), (
        recap
    )


@pytest.mark.parametrize("name", ["fallback_enable.yml", "fallback_disable.yml"])
def test_the_gluster_free_mode_says_how_to_go_on_without_a_dead_host(play, name: str) -> None:
    done = play(name, "--check", dead="node1")
    assert done.returncode == 2, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "run it with -e absent=node1" in said, done.stdout
    assert "node2 cannot ask the catalog" in said, "what speaks against it elsewhere is told, too"
    assert "PLAY [Hold uploads up]" not in said and "failed=1" in said


def test_a_host_that_did_not_answer_is_asked_again_for_its_mode(play, tmp_path: Path) -> None:
    """What site.yml's first look did not see is seen before anything would take the node back to the volume."""
    (tmp_path / "fallback.json").write_text("{}", encoding="utf-8")
    asks = {"ansible.builtin.import_role": {"name": "tribrick.media.media_fallback", "tasks_from": "guard"}}
    silent = {"ansible.builtin.set_fact": {"__media_fallback_looked": {"unreachable": True, "changed": False}}}
    for first in (asks, silent):
        tasks = [{"name": "First", **first}, {"name": "Again", **asks}]
        written = tmp_path / "play.yml"
        written.write_text(
            yaml.safe_dump([{"hosts": "node1", "gather_facts": False, "tasks": tasks}]), encoding="utf-8"
        )
        done = play(written, "-e", f"__media_fallback_mark={tmp_path}/fallback.json")
        assert done.returncode == 2 and "node1 is in Gluster-free mode" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def bricks(tmp_path: Path) -> Path:
    """Three bricks, of which node2's has other bytes."""
    for name in ("node1", "node2", "node3"):
        (tmp_path / name / ".glusterfs").mkdir(parents=True)
        (tmp_path / name / "a.jpg").write_bytes(b"bad " if name == "node2" else b"good")
    return tmp_path


def test_check_mode_asks_the_catalog_for_what_it_would_choose_by(play, bricks: Path) -> None:
    brick = json.dumps({"tribrick_brick_path": str(bricks / "{{ inventory_hostname }}")})
    done = play("recover_split_brain.yml", "--check", "-e", "confirm=yes", "-e", brick)
    assert "/usr/local/bin/tribrick-manage" in done.stdout, done.stdout + done.stderr


def test_hosts_without_a_volume_are_rebooted_without_one(play) -> None:
    extra = json.dumps({"confirm": True, "media_backend": "hybrid", "reboot_command": "true"})
    done = play("reboot_nodes.yml", "--check", "-e", extra)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipping: [node3]" in done.stdout.partition("Wait for its mount")[2], "the last one, too"


@pytest.mark.parametrize(
    ("settings", "fails"), [("INSTALLED_APPS = []", False), ("raise ValueError", True), ("import nothing_here", True)]
)
def test_a_site_that_cannot_be_asked_is_not_one_without_a_catalog(tmp_path: Path, settings: str, fails: bool) -> None:
    """Files whose unlink was lost would stay, and recover_quorum would end well."""
    (tmp_path / "chosen.py").write_text(settings, encoding="utf-8")
    words = os.environ | {"DJANGO_SETTINGS_MODULE": "chosen", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "django", "help", "tribrick"]
    done = subprocess.run(command, env=words, capture_output=True, text=True, timeout=60, check=False)
    plays = yaml.safe_load((ROOT / "playbooks/recover_quorum.yml").read_text(encoding="utf-8"))
    [look] = [task for play in plays for task in play["tasks"] if task.get("register") == "__catalog"]
    judge = jinja2.Environment(autoescape=True).compile_expression(str(look["failed_when"]))
    assert bool(judge(__catalog={"rc": done.returncode, "stderr": done.stderr})) is fails


def test_a_brick_without_its_disk_is_refused_with_words(play, tmp_path: Path) -> None:
    [volume, *_] = yaml.safe_load((ROOT / "playbooks/deploy_volume.yml").read_text(encoding="utf-8"))
    role = next(one for one in volume["roles"] if one["role"].endswith(".gluster_volume"))
    (tmp_path / "play.yml").write_text(yaml.safe_dump([volume | {"roles": [role]}]), encoding="utf-8")
    hosts = {name: {"address": f"192.0.2.{at}"} for at, name in enumerate(("node1", "node2", "node3"), 11)}
    extra = {"tribrick_allow_shared_filesystem": False, "tribrick_hosts": hosts, "tribrick_replica": 3,
             "tribrick_uid": 2971, "tribrick_gid": 2971}  # fmt: skip
    done = play(tmp_path / "play.yml", "-e", json.dumps(extra))
    said = " ".join(done.stdout.split())
    assert done.returncode == 2 and "/disk on node2: mount the brick's disk" in said, done.stdout + done.stderr


def test_nobody_is_told_to_move_files_away_that_lie_on_own_disks(play, tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.jpg").write_bytes(b"x")
    done = play("recover_mount.yml", "--check", "-e", "media_backend=hybrid")
    assert done.returncode == 2 and "move them away" not in done.stdout, done.stdout + done.stderr
    assert "there is no volume to mount" in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", ["recover_brick.yml", "recover_glusterd.yml", "recover_node.yml"])
def test_an_empty_name_is_answered_with_words(play, name: str) -> None:
    done = play(name, "-e", "node=", "-e", "confirm=yes", "--check")
    assert done.returncode == 2 and "Name the node with -e node=NODE" in " ".join(done.stdout.split()), done.stderr


def test_an_empty_lost_name_is_none(play) -> None:
    """Otherwise the host of the same name would start with an identity that the pool does not know."""
    given = ((), ("-e", "instead_of="))
    chosen = [play("recover_node.yml", "-e", "node=node2", *more, "--list-hosts").stdout for more in given]
    assert "Give it an identity of its own" in chosen[0]
    assert sorted(chosen[0].splitlines()) == sorted(chosen[1].splitlines())


def test_days_that_are_no_number_are_refused(play) -> None:
    """As a number they were 0, so that nothing was renewed, and all looked well."""
    done = play("renew_certificates.yml", "-e", "confirm=yes", "-e", "within=400d")
    assert done.returncode == 2 and "certificate_renewal_within" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["recover_brick", "recover_glusterd", "recover_heal", "recover_quorum", "recover_split_brain"]
)
def test_names_are_looked_up_where_the_volume_is_mounted(play, tmp_path: Path, name: str) -> None:
    """A node that does not run the site has no mount, and names that a brick has lost would be looked up nowhere."""
    plays = yaml.safe_load((ROOT / "playbooks" / f"{name}.yml").read_text(encoding="utf-8"))
    variables = next(one["vars"] for one in plays if "recovery_media_root" in one.get("vars", {}))
    mend = {"ansible.builtin.include_role": {"name": "tribrick.media.recovery", "tasks_from": "mend"}}
    made = {"hosts": "node1:node3", "gather_facts": False, "vars": variables | {"__recovery_lasting": {"a.jpg": {}}}}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([made | {"tasks": [mend]}]), encoding="utf-8")
    done = play(tmp_path / "play.yml", apart="node2\nnode3")
    assert "ok: [node1 -> node2]" in done.stdout and "ok: [node3]" in done.stdout, done.stdout + done.stderr


def test_mounts_on_hosts_without_a_brick_forget_wrong_copies_too(play, tmp_path: Path) -> None:
    [*_, last] = yaml.safe_load((ROOT / "playbooks/recover_split_brain.yml").read_text(encoding="utf-8"))
    kept = {"ansible.builtin.set_fact": {"__recovery_kept": {"kept": {"a.jpg": [7]}}}}
    first = {"hosts": "gluster_servers", "gather_facts": False, "tasks": [kept]}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([first, last]), encoding="utf-8")
    done = play(tmp_path / "play.yml", apart="node2\napp1")
    assert done.returncode == 0, done.stdout + done.stderr
    [told] = re.findall(r"TASK \[Have mounts without a brick read anew.*?\n\n", done.stdout, re.DOTALL)
    assert "ok: [app1]" in told and "skipping: [node2]" in told
