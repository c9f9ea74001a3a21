# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Render a set of templates on the controller and bring them to the host in one call."""

from __future__ import annotations

import os

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template


class ActionModule(ActionBase):
    """Replaces each entry's ``src`` by its rendered ``content`` and hands all to the module ``files``.

    One round trip for a whole role's files instead of two or three for each: the number of tasks is
    what a rollout's time is made of.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("files", "directories", "links", "absent", "owner", "group"))

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        del tmp
        task_vars = task_vars or {}
        args = dict(self._task.args)
        files = []
        for entry in args.get("files") or []:
            entry = dict(entry)
            source = entry.pop("src", None)
            if (source is None) == ("content" not in entry):
                raise AnsibleActionFail(f"each entry of 'files' needs either src or content: {entry.get('dest')}")
            if source is not None:
                entry["content"] = self._render(source, task_vars)
            files.append(entry)
        args["files"] = files
        result.update(self._execute_module("tribrick.media.files", module_args=args, task_vars=task_vars))
        return result

    def _render(self, source, task_vars):
        """The text of the template ``source`` (searched as the template module does)."""
        try:
            path = self._find_needle("templates", source)
        except AnsibleError as error:
            raise AnsibleActionFail(str(error)) from error
        text = trust_as_template(self._loader.get_text_file_contents(path))
        folders = [*(task_vars.get("ansible_search_path") or []), os.path.dirname(path)]
        searchpath = [place for folder in folders for place in (os.path.join(folder, "templates"), folder)]
        variables = {"ansible_managed": "Written by Tribrick; changes made here are lost", **task_vars}
        templar = self._templar.copy_with_new_env(searchpath=searchpath, available_variables=variables)
        try:
            rendered = templar.template(text, escape_backslashes=False, overrides={"trim_blocks": True})
        except AnsibleError as error:
            raise AnsibleActionFail(f"{source}: {error}") from error
        return "" if rendered is None else str(rendered)
