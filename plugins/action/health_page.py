# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Put what tribrick-health said on all hosts on one page, and fail when something is wrong."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.tribrick.media.plugins.module_utils import health


class ActionModule(ActionBase):
    """Merges the hosts' reports, prints them as text or JSON, writes them to a file, and judges.

    Printed as it is, not as a task's result, so that the page can be read and the JSON parsed.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("answers", "format", "file"))

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        del tmp
        style = self._task.args.get("format") or "text"
        if style not in ("text", "json"):
            raise AnsibleActionFail(f"format is {style!r}; it is text or json")
        found = health.merge(self._task.args["answers"])
        now = time.time()
        state = health.verdict(found)
        report = {"at": now, "status": state, "findings": [asdict(finding) for finding in found]}
        text = json.dumps(report, indent=1, sort_keys=True) if style == "json" else health.page(found, now)
        if self._task.args.get("file"):
            path = os.path.abspath(os.path.expanduser(self._task.args["file"]))
            with open(path, "w", encoding="utf-8") as stream:
                stream.write(text + "\n")
        Display().display(f"\n{text}\n")
        result.update(changed=False, status=state, failed=state == "error")
        if result["failed"]:
            count = sum(finding.severity == "error" for finding in found)
            result["msg"] = f"{count} error{'s' if count > 1 else ''}; each line names what to run"
        return result
