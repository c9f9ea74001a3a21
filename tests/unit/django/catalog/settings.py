"""The example site's settings with the catalog installed and a short list of nodes."""

from example.settings import *  # noqa: F403
from example.settings import INSTALLED_APPS as _APPS
from example.settings import TRIBRICK as _TRIBRICK

INSTALLED_APPS = [*_APPS, *(["tribrick"] if "tribrick" not in _APPS else [])]
TRIBRICK = {**_TRIBRICK, "NODE": "node7"}
