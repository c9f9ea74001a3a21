#!/usr/bin/python3
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""What is wrong with this node, since when, and which playbook mends it.

The role ``health`` installs this file on every host. A timer runs it there, and the playbook check_health runs the
same copy over SSH, so both say the same words. It needs Python's standard library, root, and the file ``gluster.py``
beside it. It changes nothing but its own memory, and no hung disk, mount or daemon keeps it waiting.

    tribrick-health              a page for a person
    tribrick-health --json       the findings for a machine
    tribrick-health --timer      what the timer does: journal and notification, once for each change

Exit code: 0 nothing to do, 1 something is wrong, 2 the configuration cannot be read.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import email.utils
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

try:
    from ansible_collections.tribrick.media.plugins.module_utils import gluster
except ImportError:  # on a node the file lies beside this one
    import gluster

CONFIGURATION = "/etc/tribrick/health.json"
# A directory of its own: /var/lib/tribrick belongs to the user of the site, and this runs as root.
MEMORY = "/var/lib/tribrick-health/memory.json"
PROBES = "/run/tribrick"
# What the role media_fallback leaves: the mark of the Gluster-free mode, and the one that holds uploads up.
FALLBACK = "/etc/tribrick/fallback.json"
HELD = "/etc/tribrick/uploads-held"
# Switching all nodes takes a minute or two.
HELD_SECONDS = 600

# A unit that waits to be started again after fewer restarts may just have crashed once.
RESTARTS = 3

# note: passes by itself, shown and not counted; warning: act in the next days; error: act now.
SEVERITIES = ("note", "warning", "error")
# journald's levels as a service's output names them.
_LEVELS = {"note": "<6>", "warning": "<4>", "error": "<3>"}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with *host*, and the playbook with its arguments that mends it."""

    code: str
    host: str
    what: str
    severity: str
    command: str
    since: float | None = None

    @property
    def key(self) -> str:
        return f"{self.code} {self.host}"


@dataclass(frozen=True)
class Config:
    """What the role writes into /etc/tribrick/health.json."""

    node: str
    hosts: Mapping[str, str]
    nodes: Sequence[str]
    web: Sequence[str] = ()
    web_port: int = 80
    volume: str = ""
    brick_path: str = ""
    brick_mount: str = ""
    shared_filesystem: bool = False
    media_root: str = ""
    volume_id: str = ""
    units: Sequence[str] = ()
    certificates: Sequence[str] = ()
    certificate_days: int = 90
    paths: Sequence[str] = ()
    full_warning: int = 85
    full_error: int = 95
    databases: Sequence[str] = ()
    ledger: str = ""
    clock_seconds: int = 5
    heal_seconds: int = 600
    address: str = ""
    mirror: str = ""
    mirror_seconds: int = 10800
    notify_command: str = ""

    @property
    def has_brick(self) -> bool:
        return self.node in self.nodes


def read_config(text: str) -> Config:
    """The configuration, checked. Raises ValueError with a sentence."""
    try:
        values = json.loads(text)
        config = Config(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the configuration is not the one that site.yml writes ({error}); run site.yml") from error
    if not isinstance(config.node, str) or not config.node:
        raise ValueError("the configuration names no node; run site.yml")
    return config


# --- judging: facts -> findings, all pure ---------------------------------------------------


def judge_units(node: str, shown: Mapping[str, Mapping[str, str]], now: float, uptime: float) -> list[Finding]:
    """Units that should run. *shown* is what ``systemctl show`` said of each."""
    found = []
    for name, values in shown.items():
        load, active = values.get("LoadState", ""), values.get("ActiveState", "")
        stamp = values.get("StateChangeTimestampMonotonic", "")
        since = now - uptime + int(stamp) / 1e6 if stamp.isdigit() and int(stamp) else None
        if load != "loaded":
            state = "is masked" if load == "masked" else "is not installed"
        elif values.get("SubState", "").startswith("auto-restart") and int(values.get("NRestarts") or 0) >= RESTARTS:
            # "activating" between two of them; its last change is a moment ago each time.
            state, since = f"fails again and again ({values.get('Result')}, {values['NRestarts']} restarts)", None
        elif active in ("active", "activating", "reloading"):
            continue
        else:
            state = f"is {active or 'in an unknown state'} ({values.get('Result') or 'no result'})"
        command = "site.yml"
        if name == "glusterd.service":
            command = f"playbooks/recover_glusterd.yml -e node={node}"
        elif name.endswith(".mount"):
            command = f"playbooks/recover_mount.yml -e node={node}"
        found.append(Finding(f"unit {name}", node, f"{name} {state}", "error", command, since))
    return found


def judge_pool(config: Config, peers: Sequence[gluster.Peer]) -> list[Finding]:
    """The pool as the own glusterd sees it."""
    others = [name for name in config.nodes if name != config.node]
    members = gluster.identify(peers, config.nodes, config.node, lambda name: frozenset([config.hosts.get(name, name)]))
    if others and not members.peers and not members.unexpected:
        return [
            Finding(
                "glusterd-state-lost",
                config.node,
                "glusterd knows no other node: its state was lost, or the node was never rolled out",
                "error",
                f"playbooks/recover_glusterd.yml -e node={config.node} -e confirm=yes",
            )
        ]
    found = []
    rejected = [name for name, peer in members.peers.items() if peer.state == gluster.PEER_REJECTED]
    # Who is rejected by most of the others is the odd one out; two nodes are never told to give up theirs for one.
    odd = [config.node] if len(rejected) * 2 > len(others) else rejected
    for name in odd:
        found.append(
            Finding(
                "peer-rejected",
                name,
                f"the pool rejects {name}: its configuration of volumes differs from the others'",
                "error",
                f"playbooks/recover_glusterd.yml -e node={name} -e confirm=yes",
            )
        )
    for name in others:
        peer = members.peers.get(name)
        if peer is None:
            found.append(Finding("peer-missing", name, f"{name} is not in the pool", "error", "site.yml"))
        elif not peer.connected:
            found.append(
                Finding(
                    "peer-away",
                    name,
                    f"glusterd on {name} does not answer",
                    "error",
                    f"start {name}; when it is lost for good: playbooks/recover_node.yml -e node={name} -e confirm=yes",
                )
            )
    found += [
        Finding(
            "peer-unknown",
            name,
            f"{name} is a member of the pool and not of the inventory",
            "warning",
            f"gluster peer detach {name}, once no brick is on it",
        )
        for name in members.unexpected
    ]
    return found


def judge_volume(config: Config, volume: gluster.Volume | None) -> list[Finding]:
    """The volume as the own glusterd knows it."""
    deploy, name = "playbooks/deploy_volume.yml", config.volume
    if volume is None:
        text = f"glusterd does not know the volume {name}"
        return [Finding("volume-missing", config.node, text, "error", deploy)]
    found = []
    if not volume.started:
        text = f"the volume {name} is {volume.status.lower()}"
        found.append(Finding("volume-stopped", "cluster", text, "error", deploy))
    quorum = volume.options.get("cluster.quorum-type", "auto")
    if quorum != "auto":
        text = f"cluster.quorum-type of {name} is {quorum}: copies can come to differ"
        found.append(Finding("volume-quorum", "cluster", text, "error", deploy))
    return found


@dataclass(frozen=True)
class Brick:
    """What can be seen of the own brick without glusterd."""

    process: str  # "" for none, else the letter of its state in /proc
    healer: bool
    mounted: bool
    answers: bool
    volume_id: bool
    read_only: bool = False


def judge_brick(config: Config, brick: Brick) -> list[Finding]:
    node, path = config.node, config.brick_path
    confirm = f"-e node={node} -e confirm=yes"
    heal = "playbooks/recover_heal.yml"
    if not brick.answers:
        text = f"the file system of the brick {path} does not answer"
        # reboot_nodes first waits for a brick that answers, on and on.
        mend = f"look at the disk; restart {node} by hand, then {heal}"
        return [Finding("brick-hung", node, text, "error", mend)]
    if not brick.mounted and not config.shared_filesystem:
        text = f"nothing is mounted at {config.brick_mount}, where the brick's file system belongs"
        mend = f"mount the disk, then {heal}; a new disk: playbooks/recover_brick.yml {confirm}"
        return [Finding("brick-not-mounted", node, text, "error", mend)]
    if not brick.volume_id:
        text = f"{path} carries no mark of the volume: it was wiped, or its disk replaced"
        return [Finding("brick-wiped", node, text, "error", f"playbooks/recover_brick.yml {confirm}")]
    found = []
    if brick.read_only:
        text = f"the file system of the brick {path} has become read-only"
        mend = f"repair the disk, then {heal}; a new disk: playbooks/recover_brick.yml {confirm}"
        found.append(Finding("brick-read-only", node, text, "error", mend))
    if not brick.process:
        found.append(Finding("brick-down", node, "the brick's process does not run", "error", heal))
    elif brick.process in "Tt":
        text = "the brick's process is stopped (SIGSTOP)"
        found.append(Finding("brick-frozen", node, text, "error", heal))
    if not brick.healer:
        found.append(Finding("healer-down", node, "the self-heal daemon does not run", "warning", heal))
    return found


def judge_heal(config: Config, pending: int, bricks: Sequence[gluster.BrickHeal] | None) -> list[Finding]:
    """Files that wait to be healed, by the own brick's index; *bricks* is what glusterd said about split-brain."""
    found = []
    broken = max((brick.split_brain or 0 for brick in bricks or ()), default=0)
    if broken:
        text = (
            f"{broken} {'entries have' if broken > 1 else 'entry has'} copies that contradict each other (split-brain)"
        )
        found.append(
            Finding("split-brain", "cluster", text, "error", "playbooks/recover_split_brain.yml -e confirm=yes")
        )
    if pending:
        text = f"{pending} {'entries wait' if pending > 1 else 'entry waits'} to be healed"
        found.append(Finding("heal-pending", config.node, text, "note", "playbooks/recover_heal.yml"))
    return found


def judge_mount(config: Config, state: str, detail: str = "") -> list[Finding]:
    """The media mount; *state* is one of absent, foreign, hung, dead, no-quorum, wrong-volume, dirty, or ok."""
    node, root = config.node, config.media_root
    mend = f"playbooks/recover_mount.yml -e node={node}"
    words = {
        "absent": (f"{root} is not mounted", mend),
        "dirty": (f"{root} is not mounted, and files lie below it: {detail}", f"move them away, then {mend}"),
        "foreign": (f"{root} is a mount of {detail}, not of the volume", f"unmount it, then {mend}"),
        "hung": (f"{root} does not answer", mend),
        "dead": (f"the mount process of {root} has died ({detail})", mend),
        "no-quorum": (
            f"{root} is mounted and refuses ({detail}): too few bricks answer",
            "playbooks/recover_quorum.yml",
        ),
        "wrong-volume": (f"{root} is the mount of another volume: {detail}", "playbooks/deploy_volume.yml"),
    }
    if state == "ok":
        return []
    text, command = words[state]
    return [Finding(f"mount-{state}", node, text, "error", command)]


def judge_certificates(
    config: Config, shown: Mapping[str, Sequence[tuple[str, float]] | str], now: float
) -> list[Finding]:
    """Certificates by file: (subject, end) of each in it, or why they cannot be read."""
    found = []
    for path, certificates in shown.items():
        mend = "playbooks/renew_certificates.yml -e confirm=yes"
        if path.endswith("glusterfs.ca"):
            mend = f"./scripts/new-ca, then {mend}"
        elif "/receiver/" not in path and "glusterfs" not in os.path.basename(path):
            mend = "renew it, then playbooks/deploy_site.yml"  # what browsers see is the operator's
        if isinstance(certificates, str):
            text = f"the certificate {path} cannot be read: {certificates}"
            found.append(Finding(f"certificate {path}", config.node, text, "error", mend))
            continue
        if not certificates:
            text = f"{path} holds no certificate"
            found.append(Finding(f"certificate {path}", config.node, text, "error", mend))
            continue
        subject, end = min(certificates, key=lambda item: item[1])
        days = (end - now) / 86400
        if days < 0:
            text = f"the certificate {path} ({subject}) ran out on {_date(end)}"
            found.append(Finding(f"certificate {path}", config.node, text, "error", mend, end))
        elif days < config.certificate_days:
            text = f"the certificate {path} ({subject}) runs out on {_date(end)}, in {int(days)} days"
            found.append(Finding(f"certificate {path}", config.node, text, "warning", mend))
    return found


def judge_space(config: Config, path: str, blocks: tuple[int, int], inodes: tuple[int, int]) -> list[Finding]:
    """A file system's (free, all) blocks and inodes."""
    found = []
    for kind, (free, total) in {"space": blocks, "inodes": inodes}.items():
        if total <= 0:  # btrfs counts no inodes
            continue
        used = 100 * (total - free) / total
        if used >= config.full_warning:
            severity = "error" if used >= config.full_error else "warning"
            text = f"{path} has {100 - used:.0f} % of its {kind} left"
            mend = "make room: delete through the site, grow the disk, or clear logs"
            found.append(Finding(f"{kind} {path}", config.node, text, severity, mend))
    return found


def judge_clocks(config: Config, offsets: Mapping[str, float]) -> list[Finding]:
    """Seconds by which each peer's clock is ahead of ours; a clock that differs from most is the wrong one."""
    wrong = {name: value for name, value in offsets.items() if abs(value) > config.clock_seconds}
    if wrong and len(wrong) * 2 > len(offsets) and len(offsets) > 1:
        worst = max(wrong.values(), key=abs)
        wrong = {config.node: -worst}
    return [
        Finding(
            "clock",
            name,
            f"the clock of {name} is {abs(value):.0f} s {'ahead' if value > 0 else 'behind'}",
            "error" if abs(value) > 60 else "warning",
            f"set the clock of {name} and look at its NTP client (timedatectl)",
        )
        for name, value in wrong.items()
    ]


def judge_ledger(config: Config, age: float | None) -> list[Finding]:
    """Seconds since the ledger's follower last reached the database; None for no ledger."""
    if age is None or age < 300:
        return []
    text = f"the ledger has not been followed for {_span(age)}: the database is away, or tribrick-ledger is"
    return [Finding("ledger", config.node, text, "warning", "playbooks/deploy_site.yml", None)]


def judge_mirror(config: Config, age: float, problems: Sequence[str] = ()) -> list[Finding]:
    """Seconds since the last good run of the mirror, and what the last run said."""
    if age < config.mirror_seconds:
        return []
    why = f" ({problems[0]})" if problems else ""
    text = f"the last good run of the mirror was {_span(age)} ago{why}; journalctl -t tribrick-mirror tells more"
    return [Finding("mirror", config.node, text, "warning", "playbooks/deploy_mirror.yml", None)]


def judge_address(config: Config, held: bool, why: str) -> list[Finding]:
    """The site's one address; *why* it does not answer, empty when it does."""
    found = []
    if held:
        text = f"holds the site's address {config.address}"
        found.append(Finding("address-held", config.node, text, "note", "nothing to do"))
    if why:
        text = f"the site's address {config.address} does not answer ({why})"
        found.append(Finding("address", "cluster", text, "error", "playbooks/deploy_vip.yml"))
    return found


# --- remembering and telling, pure ----------------------------------------------------------


def remember(
    found: Sequence[Finding], memory: Mapping[str, float], now: float
) -> tuple[list[Finding], dict[str, float]]:
    """The findings with the time of their first sight, and the new memory."""
    kept = {finding.key: min(memory.get(finding.key, now), now) for finding in found}
    dated = [replace(f, since=f.since if f.since is not None else memory.get(f.key)) for f in found]
    return dated, kept


def ripen(config: Config, found: Sequence[Finding], now: float) -> list[Finding]:
    """Healing that goes on for too long is more than a note."""
    return [
        replace(f, severity="warning")
        if f.code == "heal-pending" and f.since is not None and now - f.since > config.heal_seconds
        else f
        for f in found
    ]


def verdict(found: Iterable[Finding]) -> str:
    """The worst of the findings: error, warning or ok."""
    worst = max((SEVERITIES.index(finding.severity) for finding in found), default=0)
    return SEVERITIES[worst] if worst else "ok"


def page(found: Sequence[Finding], now: float) -> str:
    """The findings for a person."""
    lines = []
    for finding in sorted(found, key=lambda f: (-SEVERITIES.index(f.severity), f.host, f.code)):
        since = f", for {_span(now - finding.since)}" if finding.since is not None else ""
        lines += [
            f"{finding.severity.upper():8} {finding.host}: {finding.what}{since}",
            f"         -> {finding.command}",
        ]
    return "\n".join(lines) if lines else "all is well"


def changes(before: Mapping[str, str], after: Sequence[Finding]) -> tuple[list[Finding], list[str]]:
    """What is new or worse since the last word, and the keys of what is over. Notes are nobody's business."""
    bad = {f.key: f for f in after if f.severity != "note"}
    news = [f for key, f in bad.items() if before.get(key) != f.severity]
    return news, [key for key in before if key not in bad]


def merge(answers: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """The findings of all hosts, each once. *answers*: what Ansible got from ``tribrick-health --json`` by host.

    A host that does not answer, or answers nonsense, is a finding. What the others say of it is left out then.
    """
    found: dict[str, Finding] = {}
    away = set()
    for host, answer in answers.items():
        error = None
        if answer.get("unreachable") or not answer:
            away.add(host)
            first = re.split(r"ssh: |over SSH: ", str(answer.get("msg") or "no answer").strip())[-1].splitlines()[0][
                :120
            ]
            text = f"{host} does not answer over SSH ({first})"
            mend = f"start it; when it is lost for good: playbooks/recover_node.yml -e node={host} -e confirm=yes"
            error = Finding("unreachable", host, text, "error", mend)
        else:
            try:
                report = json.loads(answer.get("stdout") or "")
                own = [Finding(**finding) for finding in report["findings"]]
                if any(finding.severity not in SEVERITIES for finding in own):
                    raise ValueError("unknown severity")
            except (ValueError, TypeError, KeyError):
                said = str(answer.get("stderr") or answer.get("msg") or "nothing").strip()[:160]
                text = f"the check gave no result on {host}: {said}"
                error = Finding("check", host, text, "error", "site.yml")
                own = []
            for finding in own:
                known = found.get(finding.key)
                if known is None or SEVERITIES.index(finding.severity) > SEVERITIES.index(known.severity):
                    found[finding.key] = finding
        if error is not None:
            found[error.key] = error
    holders = [finding for finding in found.values() if finding.code == "address-held" and finding.host not in away]
    if len(holders) > 1:
        text = f"{' and '.join(sorted(f.host for f in holders))} hold the site's address at the same time"
        mend = "look at the network between the nodes (VRRP); playbooks/deploy_base.yml puts the firewall right"
        found["address-twice cluster"] = Finding("address-twice", "cluster", text, "error", mend)
    merged = []
    for finding in found.values():
        if finding.host in away and finding.code != "unreachable":
            continue
        if (
            finding.code == "peer-away" and finding.host in answers
        ):  # it answers us: the cause is its glusterd, or the net
            if {f"glusterd {finding.host}", f"glusterd-state-lost {finding.host}"} & found.keys():
                continue
            mend = "look at the network between the nodes; playbooks/deploy_base.yml puts firewall and names right"
            finding = replace(finding, command=mend)
        merged.append(finding)
    return merged


def parse_show(text: str) -> dict[str, dict[str, str]]:
    """``systemctl show -p Id,...``: properties by unit."""
    units = {}
    for block in text.strip().split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" in values:
            units[values["Id"]] = values
    return units


def parse_mounts(text: str, path: str) -> tuple[str, str] | None:
    """(source, type) of the uppermost mount at *path*, from /proc/self/mounts."""
    found = None
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 3 and re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), words[1]) == path:
            found = (words[0], words[2])
    return found


def parse_certificate(text: str) -> tuple[str, float]:
    """(subject, end) from ``openssl x509 -noout -subject -enddate -nameopt RFC2253``."""
    subject = re.search(r"^subject=\s*(.*)$", text, re.MULTILINE)
    end = re.search(r"^notAfter=(.*)$", text, re.MULTILINE)
    if not subject or not end:
        raise ValueError(f"openssl said {' '.join(text.split())[:100]!r}")
    when = datetime.datetime.strptime(end[1].strip(), "%b %d %H:%M:%S %Y GMT").replace(tzinfo=datetime.timezone.utc)
    return subject[1].strip(), when.timestamp()


def split_pem(text: str) -> list[str]:
    """The certificates of a bundle."""
    return re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n?", text, re.DOTALL)


def _date(when: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(when))


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


# --- the outside world ----------------------------------------------------------------------


class TimedOut(Exception):
    """A program did not end in time. It was killed, and nobody waits for it."""


def run(command: Sequence[str], limit: float = 10, given: str = "") -> tuple[int, str, str]:
    """Run a program; never wait longer than *limit*, not even for one that cannot be killed."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C", "LANG": "C"},
    )
    try:
        out, err = process.communicate(given, timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise TimedOut(f"{command[0]} gave no answer within {limit:g} s") from None
    return process.returncode, out, err


def probe(name: str, command: Sequence[str], limit: float = 4) -> tuple[int, str, str]:
    """Like run, for a thing that may hang: no second probe is made while an earlier one still hangs there."""
    mark = Path(PROBES, f"health-{name}.pid")
    try:
        pid = int(mark.read_text())
        if f"({os.path.basename(command[0])})" in Path(f"/proc/{pid}/stat").read_text():
            raise TimedOut("an earlier look still hangs")
    except (OSError, ValueError):
        pass
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(str(process.pid))
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        raise TimedOut(f"no answer within {limit:g} s") from None
    mark.unlink(missing_ok=True)
    return process.returncode, out, err


def see_units(config: Config) -> list[Finding]:
    properties = "Id,LoadState,ActiveState,SubState,Result,NRestarts,StateChangeTimestampMonotonic"
    _, out, _ = run(["systemctl", "show", "--property", properties, *config.units])
    shown = parse_show(out)
    named = {name: shown.get(name, {}) for name in config.units}
    return judge_units(config.node, named, time.time(), time.clock_gettime(time.CLOCK_MONOTONIC))


def see_cluster(config: Config) -> list[Finding]:
    """Pool, volume, and split-brain when the own brick has something to heal."""

    def call(command: list[str], **_: Any) -> tuple[int, str, str]:
        return run(command, 60)

    cli = gluster.Cli(call, config.node, 20)
    try:
        found = judge_pool(config, cli.pool())
        volume = cli.volume(config.volume)
    except (gluster.GlusterUnavailable, gluster.GlusterMissing, gluster.GlusterSlow) as error:
        mend = f"playbooks/recover_glusterd.yml -e node={config.node}"
        hangs = f"glusterd runs and gave no answer within {cli.timeout} s"
        text = hangs if isinstance(error, gluster.GlusterSlow) else error.message
        return [Finding("glusterd", config.node, text, "error", mend)]
    if any(f.code == "glusterd-state-lost" for f in found):
        return found
    found += judge_volume(config, volume)
    pending = count_pending(config.brick_path)
    bricks = None
    if pending and volume is not None and volume.started:
        try:
            bricks = cli.heal(config.volume)
        except gluster.GlusterError:  # a crawl that takes too long, or no quorum; other findings say why
            bricks = None
    return found + judge_heal(config, pending, bricks)


def count_pending(brick: str) -> int:
    """Entries in the brick's own index of what is to be healed."""
    names = set()
    for index in ("xattrop", "dirty"):
        try:
            names |= {n for n in os.listdir(f"{brick}/.glusterfs/indices/{index}") if not n.startswith(f"{index}-")}
        except OSError:
            continue
    return len(names)


def see_brick(config: Config) -> list[Finding]:
    look = (
        "import json, os, sys\n"
        "path = sys.argv[1]\n"
        "try:\n"
        "    mark = bool(os.getxattr(path, 'trusted.glusterfs.volume-id')) and os.path.isdir(path + '/.glusterfs')\n"
        "except OSError:\n"
        "    mark = False\n"
        "try:\n"
        "    only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)\n"
        "except OSError:\n"
        "    only = False\n"
        "print(json.dumps([mark, only, os.path.ismount(sys.argv[2])]))\n"
    )
    process, healer = find_brick(config.brick_path), bool(find_process("glusterfs", f"shd/{config.volume}"))
    try:
        code, out, err = probe("brick", [sys.executable, "-c", look, config.brick_path, config.brick_mount])
        if code != 0:
            raise ValueError(err.strip()[-200:])
        mark, only, mounted = json.loads(out)
        brick = Brick(process, healer, mounted, True, mark, only)
    except TimedOut:
        brick = Brick(process, healer, True, False, True)
    return judge_brick(config, brick)


def find_process(program: str, word: str) -> int:
    """The living process of *program* that has *word* among its arguments, 0 for none."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            if os.path.basename(words[0]) == program.encode() and word.encode() in words:
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    return int(entry.name)
        except OSError:
            continue
    return 0


def find_brick(path: str) -> str:
    """State letter of the process that serves the brick at *path*, "" for none."""
    pid = find_process("glusterfsd", path)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if pid else ""
    except OSError:
        return ""


def see_mount(config: Config) -> list[Finding]:
    return judge_mount(config, *look_at_mount(config.media_root, config.volume_id))


def look_at_mount(root: str, volume_id: str = "") -> tuple[str, str]:
    """(state, detail) of the media mount, as judge_mount takes it."""
    mount = parse_mounts(Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape"), root)
    if mount is None:
        try:
            files = sorted(os.listdir(root))
        except OSError:
            files = []
        return ("dirty", ", ".join(files[:3])) if files else ("absent", "")
    if mount[1] != "fuse.glusterfs":
        return "foreign", f"{mount[0]} ({mount[1]})"
    try:
        code, out, err = probe("mount", ["cat", f"{root}/.tribrick-volume"])
    except TimedOut as late:
        return "hung", str(late)
    if code != 0:
        why = err.strip().rpartition(": ")[2] or f"exit code {code}"
        return ("no-quorum" if find_process("glusterfs", root) else "dead"), why
    try:
        seen = json.loads(out).get("id")
    except (ValueError, AttributeError):
        seen = out[:60]
    return ("ok", "") if not volume_id or seen == volume_id else ("wrong-volume", str(seen))


def see_certificates(config: Config) -> list[Finding]:
    shown: dict[str, list[tuple[str, float]] | str] = {}
    for path in config.certificates:
        try:
            shown[path] = [
                parse_certificate(
                    run(["openssl", "x509", "-noout", "-subject", "-enddate", "-nameopt", "RFC2253"], 10, pem)[1]
                )
                for pem in split_pem(Path(path).read_text(encoding="ascii", errors="replace"))
            ]
        except (OSError, ValueError) as error:
            shown[path] = str(error)
    found = judge_certificates(config, shown, time.time())
    own, bundle = "/etc/ssl/glusterfs.pem", "/etc/ssl/glusterfs.ca"
    if own in config.certificates and bundle in config.certificates and not found:
        code, out, err = run(["openssl", "verify", "-CAfile", bundle, own])
        if code != 0:
            why = " ".join((err or out).split())[:200]
            text = f"{own} is not valid under {bundle}: {why}"
            mend = "playbooks/renew_certificates.yml -e confirm=yes"
            found.append(Finding("certificate-chain", config.node, text, "error", mend))
    return found


def see_space(config: Config) -> list[Finding]:
    found: list[Finding] = []
    seen: set[tuple[str, ...]] = set()
    for path in [*config.paths, *([config.brick_path] if config.has_brick else [])]:
        try:
            code, out, _ = probe(f"space{path.replace('/', '-')}", ["stat", "-f", "-c", "%i %a %b %d %c", "--", path])
        except TimedOut:
            continue  # said as brick-hung
        words = tuple(out.split())
        if code != 0 or len(words) != 5 or words in seen:
            continue
        seen.add(words)
        free, total, ifree, itotal = (int(word) for word in words[1:])
        found += judge_space(config, path, (free, total), (ifree, itotal))
    return found


def see_clocks(config: Config) -> list[Finding]:
    """Peers' clocks by the Date of their web server, good to a second."""
    offsets = {}
    for name in config.web:
        if name == config.node:
            continue
        connection = http.client.HTTPConnection(config.hosts[name], config.web_port, timeout=3)
        try:
            before = time.time()
            connection.request("HEAD", "/", headers={"Host": config.hosts[name]})
            date = connection.getresponse().getheader("Date", "")
            after = time.time()
            offsets[name] = email.utils.parsedate_to_datetime(date).timestamp() + 0.5 - (before + after) / 2
        except (OSError, http.client.HTTPException, ValueError, TypeError):
            continue  # an absent web server is somebody else's finding
        finally:
            connection.close()
    return judge_clocks(config, offsets)


def see_web(config: Config) -> list[Finding]:
    """The own web server answers, whatever it answers."""
    if config.node not in config.web:
        return []
    connection = http.client.HTTPConnection("127.0.0.1", config.web_port, timeout=5)
    try:
        connection.request("HEAD", "/", headers={"Host": config.node})
        connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        return [
            Finding(
                "web", config.node, f"the web server does not answer ({error})", "error", "playbooks/deploy_site.yml"
            )
        ]
    finally:
        connection.close()
    return []


def see_address(config: Config) -> list[Finding]:
    """Whether the site's address is here, and whether a web server answers to it, wherever it is."""
    if not config.address:
        return []
    code, out, err = run(["ip", "-json", "address", "show", "to", config.address])
    if code != 0:
        raise ValueError(err.strip()[-200:])
    held = any("ifname" in link for link in json.loads(out or "[]"))
    connection = http.client.HTTPConnection(config.address, config.web_port, timeout=3)
    try:
        connection.request("HEAD", "/_tribrick_alive", headers={"Host": config.address})
        connection.getresponse()
        why = ""
    except (OSError, http.client.HTTPException) as error:
        why = str(error) or type(error).__name__
    finally:
        connection.close()
    return judge_address(config, held, why)


def see_databases(config: Config) -> list[Finding]:
    """One of the database's addresses takes a connection."""
    errors = []
    for address in config.databases:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), 3).close()
        except (OSError, ValueError) as error:
            errors.append(f"{address}: {error}")
        else:
            return []
    if not errors:
        return []
    text = f"PostgreSQL cannot be reached from {config.node} ({'; '.join(errors)})"
    return [Finding("database", config.node, text, "error", "bring PostgreSQL back; playbooks/deploy_database.yml")]


def see_ledger(config: Config) -> list[Finding]:
    try:
        age = abs(time.time() - os.stat(config.ledger).st_mtime) if config.ledger else None
    except OSError:
        age = None
    return judge_ledger(config, age)


def see_mirror(config: Config) -> list[Finding]:
    """The mirror's own record. Until its first good run, time counts from when it was deployed."""
    if not config.mirror:
        return []
    with open(config.mirror, encoding="utf-8") as stream:
        place = json.load(stream)["place"]
    last, problems = os.stat(config.mirror).st_mtime, []
    try:
        with open(os.path.join(place, "state.json"), encoding="utf-8") as stream:
            state = json.load(stream)
        last, problems = float(state["good"]) or last, [str(one) for one in state["problems"]]
    except FileNotFoundError:
        problems = ["it has not run yet"]
    # A time that is still to come is that of a clock that was set back: the last good run may be any age.
    return judge_mirror(config, abs(time.time() - last), problems)


def judge_fallback(config: Config, mark: Mapping[str, Any] | None, held: float | None) -> list[Finding]:
    """The mark of the Gluster-free mode, and for how many seconds uploads have been held up."""
    found = []
    if mark is not None:
        text = f"{config.node} works without GlusterFS since {mark.get('since', 'an unknown time')}, or is on its way"
        found.append(Finding("fallback", config.node, text, "warning", "playbooks/fallback_disable.yml"))
    if held is not None and held > HELD_SECONDS:
        text = f"uploads have been refused on {config.node} for {_span(held)}: a switch of the mode was broken off"
        command = "playbooks/fallback_enable.yml to go on with entering it, playbooks/fallback_disable.yml to leave"
        found.append(Finding("uploads-held", config.node, text, "error", command))
    return found


def see_fallback(config: Config) -> list[Finding]:
    """What playbooks/fallback_enable.yml and fallback_disable.yml leave on a node."""
    mark, held = None, None
    with contextlib.suppress(FileNotFoundError), open(FALLBACK, encoding="utf-8") as stream:
        mark = json.load(stream)
    with contextlib.suppress(FileNotFoundError):
        held = time.time() - os.stat(HELD).st_mtime
    return judge_fallback(config, mark, held)


def look(config: Config) -> list[Finding]:
    """All findings. A part of the check that fails is a finding, and the others go on."""
    parts: list[Callable[[Config], list[Finding]]] = [
        see_units,
        see_space,
        see_clocks,
        see_web,
        see_address,
        see_databases,
        see_ledger,
        see_mirror,
        see_fallback,
    ]
    parts += [see_certificates] if config.certificates else []
    parts += [see_brick, see_cluster] if config.has_brick else []
    parts += [see_mount] if config.media_root else []
    found: list[Finding] = []
    for part in parts:
        try:
            found += part(config)
        except (OSError, ValueError, KeyError, TimedOut, subprocess.SubprocessError, gluster.GlusterError) as error:
            name = part.__name__.removeprefix("see_")
            text = f"the check of {name} failed: {error}"
            found.append(Finding(f"check {name}", config.node, text, "error", "site.yml"))
    codes = {finding.code for finding in found}
    if codes & {"glusterd", "glusterd-state-lost"}:  # one cause, one line
        found = [f for f in found if f.code != "unit glusterd.service"]
    if any(code.startswith("mount-") for code in codes):
        found = [f for f in found if not f.code.endswith(".mount")]
    return found


def load(path: str) -> dict[str, Any]:
    """The memory of earlier runs; an unreadable one is as good as none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def store(path: str, value: Mapping[str, Any]) -> None:
    temporary = f"{path}.new"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def tell(config: Config, news: Sequence[Finding], over: Sequence[str], found: Sequence[Finding], now: float) -> bool:
    """Write what changed to the journal and hand it to the notify command. True if it was taken."""
    for finding in news:
        print(f"{_LEVELS[finding.severity]}{finding.host}: {finding.what} -> {finding.command}")
    for key in over:
        print(f"<5>over: {key}")
    sys.stdout.flush()
    if not config.notify_command:
        return True
    state = verdict(found)
    text = f"{config.node}: {state}\n\n{page(found, now)}\n"
    if over:
        text += "\nover: " + ", ".join(over) + "\n"
    environment = {"TRIBRICK_NODE": config.node, "TRIBRICK_STATUS": state}
    try:
        code, out, err = run(
            ["env", *(f"{k}={v}" for k, v in environment.items()), "sh", "-c", config.notify_command], 60, text
        )
        why = "" if code == 0 else f"exit code {code}: {' '.join((err or out).split())[:200]}"
    except (TimedOut, OSError) as error:
        why = str(error)
    if why:
        print(f"<3>the notify command failed ({why}); it is tried again")
    return not why


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tribrick-health", description="What is wrong with this node.")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--timer", action="store_true", help="tell the journal and the notify command what changed")
    parser.add_argument("--config", default=CONFIGURATION, help=argparse.SUPPRESS)
    parser.add_argument("--memory", default=MEMORY, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        config = read_config(Path(options.config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"tribrick-health: {error}", file=sys.stderr)
        return 2
    now = time.time()
    memory = load(options.memory)
    found, first = remember(look(config), memory.get("first", {}), now)
    found = ripen(config, found, now)
    if options.timer:
        told = memory.get("told", {})
        news, over = changes(told, found)
        # Stored after telling: killed in between, it is told twice rather than never.
        if not (news or over) or tell(config, news, over, found, now):
            told = {f.key: f.severity for f in found if f.severity != "note"}
        store(options.memory, {"first": first, "told": told, "at": now})
        return 0
    state = verdict(found)
    if options.json:
        print(json.dumps({"node": config.node, "at": now, "status": state, "findings": [asdict(f) for f in found]}))
    else:
        print(page(found, now))
    return 0 if state == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
