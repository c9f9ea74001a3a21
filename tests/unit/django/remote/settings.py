"""The site of a process that a test starts."""

import json
import os

from example.settings import *  # noqa: F403
from example.settings import INSTALLED_APPS, STORAGES, TRIBRICK

given = json.loads(os.environ["REMOTE_TEST"])
INSTALLED_APPS = [*INSTALLED_APPS, *(["tribrick"] if "tribrick" not in INSTALLED_APPS else [])]
STORAGES = {**STORAGES, "default": given["default"]}
TRIBRICK = {**TRIBRICK, **given["tribrick"]}
