"""An nginx of the bench's own on a node, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from kit.faults import inside
from kit.lab import Lab

HERE: Final = "/var/lib/tribrick-bench"  # removed in the end, with all that a part has put there
PORT: Final = 18_088
_PID: Final = "/run/tribrick-bench.pid"
_CONFIGURATION: Final = """
pid PID;
error_log stderr;
user www-data;
worker_processes auto;
events { worker_connections 1024; }
http {
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 100000;
    server {
        listen PORT reuseport;
LOCATIONS
    }
}
"""


def clear(lab: Lab, node: str) -> None:
    """End it and remove its files, also those of a run that was killed."""
    script = f"test ! -s {_PID} || kill $(cat {_PID}); while test -s {_PID}; do sleep 0.1; done; rm -rf {HERE}"
    inside(lab, node, script, deadline=300)


@contextlib.contextmanager
def nginx(lab: Lab, node: str, locations: str) -> Iterator[str]:
    """Run it with these locations; gives its address."""
    text = _CONFIGURATION.replace("PID", _PID).replace("PORT", str(PORT)).replace("LOCATIONS", locations)
    clear(lab, node)
    try:
        inside(lab, node, f"mkdir -p {HERE} && cat >{HERE}/nginx.conf <<'END'\n{text}\nEND")
        inside(lab, node, f"nginx -c {HERE}/nginx.conf")
        yield f"http://{lab.addresses[node]}:{PORT}"
    finally:
        clear(lab, node)
