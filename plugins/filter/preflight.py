# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Filters of the role preflight: from facts and wishes to sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.tribrick.media.plugins.module_utils import preflight
from ansible_collections.tribrick.media.plugins.plugin_utils import certificates

_NAME = re.compile(r"^(?:# )?((?:vault_)?tribrick_[a-z0-9_]+):", re.MULTILINE)


def known_variables(collection: str, more: Iterable[str] = ()) -> list[str]:
    """Names of all variables that the kit reads: from argument specs and the inventory's templates."""
    base = Path(collection)
    names = set(more)
    specs = sorted(base.glob("roles/*/meta/argument_specs.yml"))
    templates = sorted(base.glob("templates/inventory/*.j2"))
    if not specs or not templates:
        raise AnsibleFilterError(f"{base} holds no roles or no templates/inventory: is it the kit's directory?")
    for spec in specs:
        content = yaml.safe_load(spec.read_text(encoding="utf-8"))
        for entry in (content or {}).get("argument_specs", {}).values():
            names.update(entry.get("options", {}))
    for template in templates:
        names.update(_NAME.findall(template.read_text(encoding="utf-8")))
    return sorted(names)


def variable_prefixes(collection: str) -> list[str]:
    """First words of the kit's variables: its own and each role's name."""
    roles = sorted(path.name for path in Path(collection).glob("roles/*") if path.is_dir())
    return ["tribrick_", "vault_tribrick_", *(f"{role}_" for role in roles)]


class FilterModule:
    """Names as playbooks use them."""

    def filters(self) -> dict[str, Any]:
        return {
            "preflight_findings": preflight.findings,
            "preflight_report": preflight.numbered,
            "preflight_targets": preflight.targets,
            "preflight_absent_report": preflight.absent_report,
            "preflight_known_variables": known_variables,
            "preflight_variable_prefixes": variable_prefixes,
            "preflight_pair_problem": certificates.pair_problem,
        }
