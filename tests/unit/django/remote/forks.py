"""A site that has started already and forks a process for each piece of code on its input.

Each line of input is ``{"storage", "tribrick", "code"}`` in JSON, each line of output
``{"code", "said"}``: how the process ended, and its standard error.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from typing import Any

import django

django.setup()

from django.conf import settings  # noqa: E402
from django.core.files.storage import storages  # noqa: E402

# What a process would import for itself, each time.
import tribrick.catalog  # noqa: E402
import tribrick.outbox  # noqa: E402, F401


def run(asked: dict[str, Any]) -> None:
    settings.STORAGES = {**settings.STORAGES, "default": asked["storage"]}
    settings.TRIBRICK = asked["tribrick"]
    vars(storages).update(backends=settings.STORAGES, _storages={})
    exec(asked["code"], {"__name__": "forked"})  # noqa: S102  the tests' own code


for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as complaints:
        pid = os.fork()
        if pid == 0:
            os.dup2(complaints.fileno(), 2)
            try:
                run(json.loads(line))
            except BaseException:  # noqa: BLE001  it must not go on as the parent
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        complaints.seek(0)
        answer = {"code": os.waitstatus_to_exitcode(status), "said": complaints.read()}
    print(json.dumps(answer), flush=True)
