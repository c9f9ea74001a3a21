"""Captured answers of real pools (GlusterFS 10.3 and 11.1) and a gluster that replays them."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.testing import patch_module_args
from ansible_collections.tribrick.media.plugins.module_utils import gluster

CAPTURED = Path(__file__).parent / "captured"
Reply = str | tuple[int, str, str]


def read(name: str, release: str = "11.1") -> str:
    return (CAPTURED / release / f"{name}.xml").read_text()


class Outcome(Exception):
    """How the module ended."""

    def __init__(self, failed: bool, result: dict[str, Any]) -> None:
        super().__init__(str(result.get("msg", "")))
        self.failed = failed
        self.result = result


class Gluster:
    """Replays answers: each command has a list of them, the last one repeats."""

    def __init__(self, answers: dict[str, Reply | list[Reply]]) -> None:
        self.answers = {
            command: list(reply) if isinstance(reply, list) else [reply] for command, reply in answers.items()
        }
        self.answers.setdefault("--version", ["glusterfs 11.1\nRepository revision: none\n"])
        self.calls: list[str] = []

    def __call__(self, command: list[str], **keywords: Any) -> tuple[int, str, str]:
        assert command[:3] == ["timeout", "-k", "5"] and int(command[3]) > 0, "a call without time-out"
        assert keywords["environ_update"]["LC_ALL"] == "C"
        words = command[5:]
        if words[:2] == ["--mode=script", "--xml"]:
            words = words[2:]
        line = shlex.join(words)
        self.calls.append(line)
        assert line in self.answers, f"unexpected command: {line}"
        replies = self.answers[line]
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        return (0, reply, "") if isinstance(reply, str) else reply

    @property
    def changes(self) -> list[str]:
        reads = ("--version", "pool list", "volume info", "volume status", "volume heal")
        return [line for line in self.calls if not line.startswith(reads)]


class Clock:
    """Time that passes only in sleep."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


Run = Callable[..., Outcome]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(gluster, "time", clock)
    return clock


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Run:
    """run(module, gluster, check=False, **arguments) -> Outcome"""

    def end(failed: bool) -> Callable[..., None]:
        def finish(self: AnsibleModule, **result: Any) -> None:
            raise Outcome(failed, result)

        return finish

    def runner(module: ModuleType, fake: Gluster, check: bool = False, **arguments: Any) -> Outcome:
        monkeypatch.setattr(AnsibleModule, "run_command", lambda self, *a, **k: fake(*a, **k))
        monkeypatch.setattr(AnsibleModule, "exit_json", end(False))
        monkeypatch.setattr(AnsibleModule, "fail_json", end(True))
        if hasattr(module, "time"):
            monkeypatch.setattr(module, "time", clock)
        with patch_module_args({**arguments, "_ansible_check_mode": check}), pytest.raises(Outcome) as caught:
            module.main()
        return caught.value

    return runner
