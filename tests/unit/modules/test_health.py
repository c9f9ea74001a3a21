"""The health check: from facts to findings, what is told, and the page for all hosts."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from ansible_collections.tribrick.media.plugins.module_utils import gluster, health

from .conftest import read

NODES = ["node1", "node2", "node3"]
HOSTS = {name: f"198.18.0.1{name[-1]}" for name in NODES}
CONFIG = health.Config(
    node="node1",
    hosts=HOSTS,
    nodes=NODES,
    web=NODES,
    volume="media",
    brick_path="/srv/gluster/media/brick",
    brick_mount="/srv/gluster/media",
    media_root="/srv/media",
    volume_id="1234",
)
FINE = health.Brick(process="S", healer=True, mounted=True, answers=True, volume_id=True)


def codes(found):
    return {(finding.code, finding.host, finding.severity) for finding in found}


def only(found):
    assert len(found) == 1, found
    return found[0]


# --- judging ---


@pytest.mark.parametrize("release", ["10.3", "11.1"])
def test_a_whole_pool_has_no_findings(release):
    assert health.judge_pool(CONFIG, gluster.parse_pool(read("pool_three", release))) == []


@pytest.mark.parametrize("release", ["10.3", "11.1"])
def test_a_dead_peer(release):
    found = only(health.judge_pool(CONFIG, gluster.parse_pool(read("pool_node3_down", release))))
    assert (found.code, found.host, found.severity) == ("peer-away", "node3", "error")
    assert "recover_node.yml -e node=node3" in found.command


def test_a_pool_of_one_is_a_lost_state_and_not_two_lost_nodes():
    found = only(health.judge_pool(CONFIG, gluster.parse_pool(read("pool_alone"))))
    assert (found.code, found.host) == ("glusterd-state-lost", "node1")
    assert "recover_glusterd.yml -e node=node1 -e confirm=yes" in found.command


def peer(name, state=3, connected=True):
    return gluster.Peer(f"uuid-{name}", (name,), connected, state, "")


def test_the_odd_one_out_is_told_and_never_the_majority():
    seen_by_node1 = [peer("node2"), peer("node3", state=gluster.PEER_REJECTED)]
    assert only(health.judge_pool(CONFIG, seen_by_node1)).host == "node3"
    both = [peer("node2", state=gluster.PEER_REJECTED), peer("node3", state=gluster.PEER_REJECTED)]
    assert only(health.judge_pool(CONFIG, both)).host == "node1"


def test_missing_and_foreign_peers():
    found = health.judge_pool(CONFIG, [peer("node2"), peer("stranger")])
    assert codes(found) == {("peer-missing", "node3", "error"), ("peer-unknown", "stranger", "warning")}


def test_a_volume_that_is_missing_stopped_or_without_quorum():
    started = gluster.parse_volumes(read("volume_started"))[0]
    assert only(health.judge_volume(CONFIG, None)).code == "volume-missing"
    stopped = gluster.parse_volumes(read("volume_stopped"))[0]
    assert "volume-stopped" in {f.code for f in health.judge_volume(CONFIG, stopped)}
    options = {**started.options, "cluster.quorum-type": "none"}
    assert [f.code for f in health.judge_volume(CONFIG, health.replace(started, options=options))] == ["volume-quorum"]
    options["cluster.quorum-type"] = "auto"
    assert health.judge_volume(CONFIG, health.replace(started, options=options)) == []


@pytest.mark.parametrize(
    ("change", "code", "command"),
    [
        ({"process": ""}, "brick-down", "recover_heal"),
        ({"process": "T"}, "brick-frozen", "recover_heal"),
        ({"volume_id": False}, "brick-wiped", "recover_brick.yml -e node=node1 -e confirm=yes"),
        ({"mounted": False}, "brick-not-mounted", "mount the disk"),
        ({"answers": False}, "brick-hung", "restart node1 by hand, then playbooks/recover_heal.yml"),
        ({"read_only": True}, "brick-read-only", "repair the disk"),
    ],
)
def test_what_can_be_wrong_with_a_brick(change, code, command):
    assert health.judge_brick(CONFIG, FINE) == []
    found = only(health.judge_brick(CONFIG, health.replace(FINE, **change)))
    assert (found.code, found.host, found.severity) == (code, "node1", "error")
    assert command in found.command


def test_without_the_self_heal_daemon():
    assert codes(health.judge_brick(CONFIG, health.replace(FINE, healer=False))) == {
        ("healer-down", "node1", "warning")
    }


def test_a_brick_on_a_shared_disk_is_allowed_where_the_inventory_says_so():
    shared = health.replace(CONFIG, shared_filesystem=True)
    assert health.judge_brick(shared, health.replace(FINE, mounted=False)) == []


def test_healing_is_a_note_at_first_and_split_brain_an_error_at_once():
    assert health.judge_heal(CONFIG, 0, None) == []
    note = only(health.judge_heal(CONFIG, 3, gluster.parse_heal(read("heal_ok"))))
    assert (note.code, note.severity) == ("heal-pending", "note")
    bricks = [gluster.BrickHeal("node1:/b", True, "Connected", 3, 1, 2, 0)]
    assert ("split-brain", "cluster", "error") in codes(health.judge_heal(CONFIG, 3, bricks))
    young = health.replace(note, since=1000.0)
    assert only(health.ripen(CONFIG, [young], 1500)).severity == "note"
    assert only(health.ripen(CONFIG, [young], 1601)).severity == "warning"


@pytest.mark.parametrize("state", ["absent", "dirty", "foreign", "hung", "dead", "no-quorum", "wrong-volume"])
def test_what_can_be_wrong_with_the_mount(state):
    assert health.judge_mount(CONFIG, "ok") == []
    found = only(health.judge_mount(CONFIG, state, "detail"))
    assert found.severity == "error" and "/srv/media" in found.what and ".yml" in found.command


def test_certificates_warn_ninety_days_ahead():
    now, day = 1_700_000_000.0, 86400
    good = {"/etc/ssl/glusterfs.pem": [("CN=node1", now + 91 * day)]}
    assert health.judge_certificates(CONFIG, good, now) == []
    soon = only(health.judge_certificates(CONFIG, {"/etc/ssl/glusterfs.pem": [("CN=node1", now + 89 * day)]}, now))
    assert soon.severity == "warning" and "in 89 days" in soon.what and "renew_certificates" in soon.command
    # The first of a bundle to end counts.
    bundle = {"/etc/ssl/glusterfs.ca": [("CN=new", now + 999 * day), ("CN=old", now - day)]}
    over = only(health.judge_certificates(CONFIG, bundle, now))
    assert over.severity == "error" and "CN=old" in over.what and "ran out on" in over.what
    assert over.command.startswith("./scripts/new-ca, then playbooks/renew_certificates.yml")
    between = only(health.judge_certificates(CONFIG, {"/etc/tribrick/receiver/node.crt": [("CN=node1", now)]}, now))
    assert between.severity == "warning" and between.command == "playbooks/renew_certificates.yml -e confirm=yes"
    for broken in ("no such file", []):
        assert only(health.judge_certificates(CONFIG, {"/etc/ssl/glusterfs.pem": broken}, now)).severity == "error"
    own = only(health.judge_certificates(CONFIG, {"/etc/tribrick/tls/given.crt": []}, now))
    assert "deploy_site" in own.command


def test_space_and_inodes():
    assert health.judge_space(CONFIG, "/", (20, 100), (20, 100)) == []
    assert codes(health.judge_space(CONFIG, "/", (14, 100), (4, 100))) == {
        ("space /", "node1", "warning"),
        ("inodes /", "node1", "error"),
    }
    assert health.judge_space(CONFIG, "/", (50, 100), (0, 0)) == []  # no inodes are counted there


def test_the_clock_that_differs_from_most_is_the_wrong_one():
    assert health.judge_clocks(CONFIG, {"node2": 1.0, "node3": -1.0}) == []
    other = only(health.judge_clocks(CONFIG, {"node2": 30.0, "node3": 0.2}))
    assert (other.host, other.severity) == ("node2", "warning") and "30 s ahead" in other.what
    own = only(health.judge_clocks(CONFIG, {"node2": 300.0, "node3": 301.0}))
    assert (own.host, own.severity) == ("node1", "error") and "behind" in own.what


SHOWN = """Id=glusterd.service
LoadState=loaded
ActiveState=active
Result=success
StateChangeTimestampMonotonic=5000000

Id=nginx.service
LoadState=loaded
ActiveState=failed
Result=exit-code
StateChangeTimestampMonotonic=90000000
"""


def test_units_and_since_when():
    shown = health.parse_show(SHOWN) | {"tribrick-site.socket": {}}
    found = health.judge_units("node1", shown, now=1000.0, uptime=100.0)
    assert {f.code for f in found} == {"unit nginx.service", "unit tribrick-site.socket"}
    failed = next(f for f in found if "nginx" in f.code)
    assert failed.since == 990.0 and "failed (exit-code)" in failed.what
    assert health.parse_show("nonsense\n\nmore") == {}


def test_a_unit_that_fails_again_and_again_is_told_and_one_that_starts_is_not():
    waiting = {"LoadState": "loaded", "ActiveState": "activating", "SubState": "auto-restart", "Result": "exit-code"}
    for change, told in (({"NRestarts": "12"}, True), ({"NRestarts": "1"}, False), ({"SubState": "start"}, False)):
        found = health.judge_units("node1", {"tribrick-origin.service": waiting | change}, now=1000.0, uptime=100.0)
        assert bool(found) is told
    found = health.judge_units("node1", {"glusterd.service": waiting | {"NRestarts": "12"}}, now=1000.0, uptime=100.0)
    assert "fails again and again (exit-code, 12 restarts)" in only(found).what


def test_mounts_the_uppermost_counts():
    text = (
        "node1:/media /srv/media fuse.glusterfs rw 0 0\ntmpfs /srv/media tmpfs rw 0 0\nx /srv/me\\040dia ext4 rw 0 0\n"
    )
    assert health.parse_mounts(text, "/srv/media") == ("tmpfs", "tmpfs")
    assert health.parse_mounts(text, "/srv/me dia") == ("x", "ext4")
    assert health.parse_mounts("", "/srv/media") is None
    assert health.parse_mounts("broken\n\n", "/srv/media") is None


def test_certificate_texts():
    assert health.parse_certificate("subject=CN=node1\nnotAfter=Nov 20 12:00:00 2026 GMT\n") == (
        "CN=node1",
        1795176000.0,
    )
    for broken in ("", "subject=CN=x\n", "subject=CN=x\nnotAfter=soon\n"):
        with pytest.raises(ValueError, match=r"openssl said|does not match"):
            health.parse_certificate(broken)
    one = "-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----\n"
    assert health.split_pem("text\n" + one + "between\n" + one) == [one, one]
    assert health.split_pem(one[:30]) == []


def test_the_ledger():
    assert health.judge_ledger(CONFIG, None) == [] == health.judge_ledger(CONFIG, 10)
    assert only(health.judge_ledger(CONFIG, 400)).severity == "warning"


def test_a_ledger_of_a_clock_that_ran_ahead(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.touch()
    os.utime(path, (time.time() + 86400, time.time() + 86400))
    assert len(health.see_ledger(replace(CONFIG, ledger=str(path)))) == 1


def test_the_mirror(tmp_path):
    assert health.judge_mirror(CONFIG, 10799) == []
    said = only(health.judge_mirror(CONFIG, 10801, ["the volume is away", "and more"]))
    assert said.severity == "warning" and said.command == "playbooks/deploy_mirror.yml"
    assert "3 h ago (the volume is away)" in said.what

    assert health.see_mirror(CONFIG) == [], "a host without one"
    path = tmp_path / "mirror.json"
    path.write_text(json.dumps({"place": str(tmp_path)}))
    config = replace(CONFIG, mirror=str(path))
    assert health.see_mirror(config) == [], "deployed just now"
    old = time.time() - 20000
    os.utime(path, (old, old))
    assert "it has not run yet" in only(health.see_mirror(config)).what
    state = {"good": time.time() - 60, "problems": []}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert health.see_mirror(config) == []
    (tmp_path / "state.json").write_text(json.dumps({**state, "good": time.time() + 86400 * 400}))
    assert len(health.see_mirror(config)) == 1, "a clock that ran ahead"
    (tmp_path / "state.json").write_text(json.dumps({"good": old, "problems": ["pg_dump ended with 1"]}))
    assert "pg_dump ended with 1" in only(health.see_mirror(config)).what
    (tmp_path / "state.json").write_text(json.dumps({"good": 0, "problems": ["never well"]}))
    assert "never well" in only(health.see_mirror(config)).what
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):  # look() makes a finding of it
        health.see_mirror(config)


def test_the_mode_without_glusterfs_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "FALLBACK", str(tmp_path / "mark"))
    monkeypatch.setattr(health, "HELD", str(tmp_path / "held"))
    assert health.see_fallback(CONFIG) == []
    (tmp_path / "mark").write_text(json.dumps({"since": "2026-11-01T10:00:00Z"}))
    (tmp_path / "held").write_text("")
    said = only(health.see_fallback(CONFIG))
    assert said.severity == "warning" and "2026-11-01T10:00:00Z" in said.what
    assert said.command == "playbooks/fallback_disable.yml"
    old = time.time() - health.HELD_SECONDS - 60
    os.utime(tmp_path / "held", (old, old))
    assert [one.severity for one in health.see_fallback(CONFIG)] == ["warning", "error"]
    (tmp_path / "mark").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):  # look() makes a finding of it
        health.see_fallback(CONFIG)


def test_a_configuration_of_another_version_is_refused():
    for text in (
        "",
        "[]",
        '{"node": 1, "hosts": {}, "nodes": []}',
        '{"node": "a", "hosts": {}, "nodes": [], "new": 1}',
    ):
        with pytest.raises(ValueError, match=r"run site\.yml"):
            health.read_config(text)


# --- telling ---


def finding(code="brick-down", host="node1", severity="error", since=None):
    return health.Finding(code, host, "what", severity, "site.yml", since)


def test_first_sight_is_remembered_and_forgotten():
    found, memory = health.remember([finding()], {}, 100.0)
    assert only(found).since is None and memory == {"brick-down node1": 100.0}
    found, memory = health.remember([finding()], memory, 160.0)
    assert only(found).since == 100.0 and memory == {"brick-down node1": 100.0}
    assert health.remember([], memory, 200.0) == ([], {})
    known = only(health.remember([finding(since=50.0)], memory, 160.0)[0])
    assert known.since == 50.0  # systemd knows better


def test_only_changes_are_told():
    assert health.changes({}, [finding(severity="note")]) == ([], [])
    news, over = health.changes({}, [finding()])
    assert [f.code for f in news] == ["brick-down"] and over == []
    assert health.changes({"brick-down node1": "error"}, [finding()]) == ([], [])
    news, over = health.changes({"brick-down node1": "warning"}, [finding()])
    assert len(news) == 1  # worse than told
    assert health.changes({"brick-down node1": "error"}, []) == ([], ["brick-down node1"])


def test_the_page_names_host_time_and_command():
    text = health.page([finding("a", "node2", "warning"), finding("b", "node1", since=100.0)], 400.0)
    assert text.splitlines() == [
        "ERROR    node1: what, for 5 min",
        "         -> site.yml",
        "WARNING  node2: what",
        "         -> site.yml",
    ]
    assert health.page([], 0) == "all is well"
    assert health.verdict([]) == "ok" == health.verdict([finding(severity="note")])
    assert health.verdict([finding(severity="warning")]) == "warning"


def answer(*found):
    return {"rc": 1, "stdout": json.dumps({"findings": [health.asdict(f) for f in found]})}


def test_all_hosts_on_one_page():
    away = finding("peer-away", "node3")
    merged = health.merge(
        {
            "node1": answer(away),
            "node2": answer(away, finding("brick-down", "node2")),
            "node3": {"unreachable": True, "msg": "no route\nmore"},
        }
    )
    assert codes(merged) == {("unreachable", "node3", "error"), ("brick-down", "node2", "error")}
    assert "no route" in next(f.what for f in merged if f.code == "unreachable")


def test_a_peer_that_answers_over_ssh_is_not_lost():
    away = finding("peer-away", "node3")
    down = finding("glusterd", "node3")
    assert codes(health.merge({"node1": answer(away), "node3": answer(down)})) == {("glusterd", "node3", "error")}
    cut = only(health.merge({"node1": answer(away), "node3": answer()}))
    assert cut.code == "peer-away" and "network" in cut.command


@pytest.mark.parametrize(
    "broken",
    [
        {"rc": 127, "stdout": "", "stderr": "No such file"},
        {"rc": 0, "stdout": '{"findings": [{"code": "x"}]}'},
        {"rc": 0, "stdout": '{"findings": '},
        {"rc": 0, "stdout": "[]"},
        {"rc": 1, "stdout": json.dumps({"findings": [health.asdict(finding(severity="fine"))]})},
    ],
)
def test_a_host_that_answers_nonsense_is_no_healthy_host(broken):
    found = only(health.merge({"node1": broken}))
    assert (found.code, found.severity) == ("check", "error")


def test_no_answer_at_all_is_no_healthy_host():
    assert only(health.merge({"node1": {}})).code == "unreachable"


# --- the program ---


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Runs the timer with given findings; what the notify command got lies in a file."""
    config = {"node": "node1", "hosts": {}, "nodes": [], "notify_command": f"cat >> {tmp_path}/mail; . {tmp_path}/then"}
    (tmp_path / "config").write_text(json.dumps(config))
    (tmp_path / "then").write_text("true\n")
    found = []
    monkeypatch.setattr(health, "look", lambda _: list(found))

    def once(*now):
        found[:] = now
        return health.main(["--timer", "--config", f"{tmp_path}/config", "--memory", f"{tmp_path}/memory"])

    once.mail = lambda: (tmp_path / "mail").read_text() if (tmp_path / "mail").exists() else ""
    once.then = tmp_path / "then"
    return once


def test_the_timer_tells_once_for_each_change(program, capsys):
    program()
    assert program.mail() == "" and capsys.readouterr().out == ""
    program(finding())
    assert "node1: error" in program.mail() and "what" in program.mail()
    assert capsys.readouterr().out.startswith("<3>node1: what -> site.yml")
    before = program.mail()
    program(finding())
    assert program.mail() == before and capsys.readouterr().out == ""
    program()
    assert program.mail().endswith("node1: ok\n\nall is well\n\nover: brick-down node1\n")


def test_a_failed_notification_is_tried_again(program, capsys):
    program.then.write_text("exit 7\n")
    program(finding())
    assert "exit code 7" in capsys.readouterr().out
    program.then.write_text("true\n")
    program(finding())
    assert program.mail().count("node1: error") == 2
    program(finding())
    assert program.mail().count("node1: error") == 2


def test_a_broken_memory_is_as_good_as_none(program, tmp_path):
    (tmp_path / "memory").write_text("{")
    assert program(finding()) == 0
    assert json.loads((tmp_path / "memory").read_text())["told"] == {"brick-down node1": "error"}


def test_a_part_that_fails_is_a_finding(monkeypatch):
    def broken(_):
        raise ValueError("glusterd said nonsense")

    broken.__name__ = "see_space"
    monkeypatch.setattr(health, "see_space", broken)
    config = health.Config(node="n", hosts={}, nodes=[])
    monkeypatch.setattr(health, "see_units", lambda _: [])
    found = only(health.look(config))
    assert found.code == "check space" and found.severity == "error" and "nonsense" in found.what


def test_a_hung_thing_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "PROBES", str(tmp_path))
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / "health-mount.pid").write_text(str(sleeper.pid))
        began = time.monotonic()
        with pytest.raises(health.TimedOut, match="an earlier look still hangs"):
            health.probe("mount", ["sleep", "60"], 5)
        assert time.monotonic() - began < 1
    finally:
        sleeper.kill()
        sleeper.wait()
    with pytest.raises(health.TimedOut, match="no answer within"):
        health.probe("mount", ["sleep", "60"], 0.2)
    assert health.probe("mount", ["echo", "well"])[1] == "well\n"


def test_the_program_runs_beside_its_parser_alone(tmp_path):
    """As it is installed on a node: two files, no Ansible."""
    source = Path(health.__file__).parent
    for name in ("health.py", "gluster.py"):
        (tmp_path / name).write_text((source / name).read_text())
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-S", f"{tmp_path}/health.py", "--config", f"{tmp_path}/none"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2 and "tribrick-health: " in done.stderr, done.stderr


def test_every_playbook_that_is_advised_exists():
    plugins = Path(health.__file__).parents[1]
    named = set()
    for file in plugins.glob("module*/*.py"):
        named |= set(re.findall(r"playbooks/\w+\.yml", file.read_text()))
    assert "playbooks/recover_heal.yml" in named
    assert [name for name in sorted(named) if not (plugins.parent / name).is_file()] == []


def test_who_holds_the_sites_address_is_noted_and_its_silence_is_an_error():
    config = replace(CONFIG, address="192.0.2.10")
    assert health.judge_address(config, False, "") == []
    held = only(health.judge_address(config, True, ""))
    assert (held.severity, held.host) == ("note", "node1") and "holds the site's address 192.0.2.10" in held.what
    assert health.verdict([held]) == "ok"
    silent = only(health.judge_address(config, False, "timed out"))
    assert (silent.severity, silent.host) == ("error", "cluster")
    assert "192.0.2.10 does not answer (timed out)" in silent.what and silent.command == "playbooks/deploy_vip.yml"


def test_two_holders_of_the_address_are_an_error():
    def says(node, held):
        config = replace(CONFIG, node=node, address="192.0.2.10")
        findings = [asdict(finding) for finding in health.judge_address(config, held, "")]
        return {"stdout": json.dumps({"findings": findings})}

    one = health.merge({"node1": says("node1", True), "node2": says("node2", False)})
    assert [finding.code for finding in one] == ["address-held"]
    two = health.merge({"node1": says("node1", True), "node2": says("node2", True)})
    twice = only([finding for finding in two if finding.code == "address-twice"])
    assert twice.severity == "error" and "node1 and node2 hold" in twice.what


def test_without_an_address_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(health, "run", lambda *_: pytest.fail("asked"))
    assert health.see_address(CONFIG) == []


def test_the_address_is_asked_for_wherever_it_is(monkeypatch):
    monkeypatch.setattr(health, "run", lambda *_: (0, '[{}, {"ifname": "eth0"}]', ""))
    # Nobody listens on port 80 of this address of the loopback network.
    config = replace(CONFIG, address="127.77.77.77")
    codes = [(finding.code, finding.severity) for finding in health.see_address(config)]
    assert codes == [("address-held", "note"), ("address", "error")]


def test_the_web_server_is_asked_on_its_own_port():
    class Web(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            """Quiet."""

    with http.server.HTTPServer(("127.0.0.1", 0), Web) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        config = replace(CONFIG, web_port=server.server_port, hosts=dict.fromkeys(NODES, "127.0.0.1"))
        try:
            assert health.see_web(config) == []
            assert health.see_clocks(config) == [], "nobody is far off"
        finally:
            server.shutdown()
            thread.join()
    assert only(health.see_web(config)).code == "web"


def test_a_glusterd_that_hangs_is_told_with_the_playbook_that_mends_it(monkeypatch):
    monkeypatch.setattr(health, "run", lambda command, limit=10, given="": (124, "", ""))
    found = only(health.see_cluster(CONFIG))
    assert found.code == "glusterd" and "no answer within 20 s" in found.what
    assert found.command == "playbooks/recover_glusterd.yml -e node=node1"
