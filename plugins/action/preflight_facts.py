# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Look at a host; whatever goes wrong becomes part of the answer, for one report on all hosts."""

from __future__ import annotations

import time

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase


def clock(sent: float, start: float, end: float, received: float) -> dict[str, float]:
    """Offset of the host's clock and its uncertainty, from four readings as NTP takes them."""
    return {
        "offset": ((start - sent) + (end - received)) / 2,
        "uncertainty": max(0.0, ((received - sent) - (end - start)) / 2),
    }


def last_words(text: str, limit: int = 300) -> str:
    """The end of an error text on one line: ssh and sudo say last what stopped them."""
    text = text.rpartition("Make sure this host can be reached over ssh:")[2]  # Ansible's own preface
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    flat = " ".join(lines[-3:])
    return flat if len(flat) <= limit else "..." + flat[-limit:]


class ActionModule(ActionBase):
    """Runs the module between two readings of the controller's clock."""

    TRANSFERS_FILES = False

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        del tmp
        task_vars = task_vars or {}
        result["changed"] = False
        prefixes = tuple(self._task.args.get("variable_prefixes") or ())
        result["variables"] = sorted(str(name) for name in task_vars if str(name).startswith(prefixes))
        sent = time.time()
        try:
            answer = self._execute_module("tribrick.media.preflight_facts", task_vars=task_vars)
        except AnsibleConnectionFailure as error:
            result["unreachable_reason"] = last_words(str(error))
            return result
        except AnsibleError as error:
            result["problem"] = last_words(str(error))
            return result
        received = time.time()
        if answer.get("unreachable"):
            result["unreachable_reason"] = last_words(str(answer.get("msg", "")))
        elif answer.get("failed") or "facts" not in answer:
            words = [answer.get(key) for key in ("msg", "module_stderr", "module_stdout")]
            result["problem"] = last_words("\n".join(str(word) for word in words if word))
        else:
            result["facts"] = answer["facts"]
            result["clock"] = clock(sent, answer["start"], answer["end"], received)
        return result
