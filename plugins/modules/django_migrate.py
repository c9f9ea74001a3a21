#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Apply a site's migrations once, under a lock in the database."""

from __future__ import annotations

DOCUMENTATION = r"""
module: django_migrate
short_description: Apply a site's migrations once, under a lock in the database
description:
  - Asks the release which migrations are not applied yet. When there are some, takes a PostgreSQL advisory lock,
    asks again, and applies them. Two rollouts at a time therefore apply each migration once.
  - The lock belongs to the database session and ends with it, also when the run is killed.
  - Other databases have no such lock; there the caller must see to it that only one migrates.
options:
  release: {description: Directory of the release., type: path, required: true}
  manage: {description: Program that runs Python of a release as the site's user., type: path, required: true}
  database: {description: Django's name of the database., type: str, default: default}
  lock_timeout: {description: Seconds to wait for another one that migrates., type: int, default: 300}
  timeout: {description: Seconds for the whole work., type: int, default: 1800}
attributes:
  check_mode:
    description: Lists what would be applied. Predicts a change when the release is not installed yet.
    support: full
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Apply migrations
  tribrick.media.django_migrate:
    release: /opt/tribrick/releases/0123456789abcdef0123
    manage: /usr/local/bin/tribrick-manage
  run_once: true
"""

RETURN = r"""
applied: {description: Migrations that were (or would be) applied., type: list, elements: str, returned: always}
"""

import json
import os

from ansible.module_utils.basic import AnsibleModule

MARK = "tribrick-result:"
SCRIPT = r"""
import json, sys, time
options = json.loads(sys.argv[1])

def finish(**result):
    print(options["mark"] + json.dumps(result), flush=True)
    sys.exit(0)

import django
django.setup()
from django.core.management import call_command
from django.db import connections
from django.db.migrations.executor import MigrationExecutor
from django.db.utils import OperationalError

connection = connections[options["database"]]

def pending():
    executor = MigrationExecutor(connection)
    executor.loader.check_consistent_history(connection)
    plan = executor.migration_plan(executor.loader.graph.leaf_nodes())
    return [f"{migration.app_label}.{migration.name}" for migration, _backwards in plan]

def locked(function):
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT pg_{function}('tribrick'), hashtext('migrate'))")
        return cursor.fetchone()[0]

try:
    todo = pending()
except OperationalError as error:
    finish(error=f"The database cannot be used: {error}")
if not todo or options["check"]:
    finish(applied=todo)
if connection.vendor == "postgresql":
    deadline = time.monotonic() + options["lock_timeout"]
    while not locked("try_advisory_lock(hashtext"):
        if time.monotonic() > deadline:
            finish(error=f"Another session has been migrating the database for {options['lock_timeout']} s")
        time.sleep(0.5)
    todo = pending()
if todo:
    call_command("migrate", database=options["database"], interactive=False, verbosity=1, stdout=sys.stderr)
    left = pending()
    if left:
        finish(error=f"After the migration these are still not applied: {', '.join(left)}")
finish(applied=todo)
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "release": {"type": "path", "required": True},
            "manage": {"type": "path", "required": True},
            "database": {"type": "str", "default": "default"},
            "lock_timeout": {"type": "int", "default": 300},
            "timeout": {"type": "int", "default": 1800},
        },
        supports_check_mode=True,
    )
    params = module.params
    if module.check_mode and not (
        os.path.exists(params["manage"]) and os.path.exists(os.path.join(params["release"], ".complete"))
    ):
        module.exit_json(
            changed=True, applied=[], msg="The release is not installed yet, so its migrations are not known."
        )
    options = {
        "mark": MARK,
        "check": module.check_mode,
        "database": params["database"],
        "lock_timeout": params["lock_timeout"],
    }
    command = [
        "timeout",
        str(params["timeout"]),
        params["manage"],
        "--release",
        params["release"],
        "--python",
        "-",
        json.dumps(options),
    ]
    code, out, err = module.run_command(command, data=SCRIPT, binary_data=False)
    results = [line.removeprefix(MARK) for line in out.splitlines() if line.startswith(MARK)]
    if code == 124:
        module.fail_json(msg=f"The migrations did not end within {params['timeout']} s", stdout=out, stderr=err)
    if code != 0 or len(results) != 1:
        lines = (err or out).strip().splitlines()
        module.fail_json(
            msg=f"The migrations failed: {lines[-1] if lines else 'no output'}", rc=code, stdout=out, stderr=err
        )
    result = json.loads(results[0])
    if "error" in result:
        module.fail_json(msg=result["error"], stderr=err)
    module.exit_json(changed=bool(result["applied"]), applied=result["applied"])


if __name__ == "__main__":
    main()
