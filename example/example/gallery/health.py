"""``/healthz``: the process answers. ``/readyz``: this node can serve and store.

Both are answered before any other middleware, for every host name, without session or database.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.core.files.storage import storages
from django.db import connections
from django.http import HttpRequest, HttpResponse, JsonResponse

from tribrick.probes import Probe
from tribrick.storage import VolumeStorage


def check_database() -> str:
    """Ask the database over a connection of its own; raise if it is away or cannot write."""
    connection = connections["default"]  # the probe's thread has its own
    try:
        with connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                cursor.execute("SHOW transaction_read_only")
                if cursor.fetchone()[0] == "on":
                    raise RuntimeError("the database is read-only")
            else:
                cursor.execute("SELECT 1")
                cursor.fetchone()
    finally:
        connection.close()
    return "answers and takes writes"


def check_mount() -> str:
    """Look whether the volume, or the local directory of a storage with media hosts, takes files."""
    storage: Any = storages["default"]
    said: str = storage.verify()
    if type(storage) is VolumeStorage:
        return said
    if not os.access(storage.location, os.W_OK | os.X_OK):
        raise RuntimeError(f"{storage.location} cannot be written to")
    return f"{storage.location} takes files"


MOUNT = Probe("mount", check_mount, settings.PROBE_DEADLINE)
DATABASE = Probe("database", check_database, settings.PROBE_DEADLINE)


def healthz() -> HttpResponse:
    """Liveness; touches nothing."""
    return JsonResponse({"status": "alive", "node": settings.TRIBRICK_NODE})


def needed() -> tuple[Probe, ...]:
    """Return the probes that fit the storage: one that keeps nothing here has no mount."""
    return (MOUNT, DATABASE) if isinstance(storages["default"], VolumeStorage) else (DATABASE,)


def readyz(probes: tuple[Probe, ...] | None = None) -> HttpResponse:
    """Readiness: 200, or 503 with what failed. Takes no longer than the probes' deadline."""
    probes = probes or needed()
    for probe in probes:
        probe.start()
    results = [probe.ask() for probe in probes]
    ready = all(result.ok for result in results)
    response = JsonResponse(
        {
            "status": "ready" if ready else "not ready",
            "node": settings.TRIBRICK_NODE,
            "checks": {result.name: result.as_dict() for result in results},
        },
        status=200 if ready else 503,
    )
    if not ready:
        response["Retry-After"] = "2"
    return response


class HealthMiddleware:
    """Answers the two addresses; must be the first middleware."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        answers = {"/healthz": healthz, "/readyz": readyz}
        answer = answers.get(request.path_info)
        if answer is None or request.method not in {"GET", "HEAD"}:
            return self.get_response(request)
        response = answer()
        response["Cache-Control"] = "no-store"
        return response
