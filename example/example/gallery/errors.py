"""Answers for what goes wrong: JSON for programs, a plain page for people.

The pages need no database and no session, since the missing database may be the reason.
"""

from __future__ import annotations

import logging
import sys

from django.conf import settings
from django.core.exceptions import (
    PermissionDenied,
    RequestDataTooBig,
    SuspiciousOperation,
    TooManyFieldsSent,
)
from django.db import InterfaceError, OperationalError
from django.http import HttpRequest, HttpResponse, JsonResponse, UnreadablePostError
from django.http.multipartparser import MultiPartParserError
from django.template.loader import render_to_string

from example.gallery.services import Refused
from tribrick.storage import StorageFull, StorageUnavailable

log = logging.getLogger("example.gallery")

RETRY_AFTER = "5"
UNREADABLE = (
    MultiPartParserError,
    RequestDataTooBig,
    SuspiciousOperation,  # TooManyFilesSent is one
    TooManyFieldsSent,
    UnreadablePostError,
)


def wants_json(request: HttpRequest) -> bool:
    """Whether a program asks: under ``/api/``, or with ``Accept: application/json``."""
    accept = request.headers.get("Accept", "")
    return request.path.startswith("/api/") or accept.startswith("application/json")


def respond(request: HttpRequest, status: int, code: str, detail: str) -> HttpResponse:
    """Return an error as JSON or as a page."""
    response: HttpResponse
    if wants_json(request):
        response = JsonResponse({"error": code, "detail": detail}, status=status)
    else:
        page = {"plain": True, "status": status, "detail": detail, "node": settings.TRIBRICK_NODE}
        response = HttpResponse(render_to_string("gallery/message.html", page), status=status)
    if status == 503:
        response["Retry-After"] = RETRY_AFTER
    if status == 401:
        response["WWW-Authenticate"] = "Token"
    response["Cache-Control"] = "no-store"
    return response


def answer(request: HttpRequest, error: BaseException | None) -> HttpResponse | None:
    """Return the answer to a known error; None for one that is a fault of the site."""
    if isinstance(error, Refused):
        return respond(request, error.status, error.code, error.detail)
    if isinstance(error, StorageUnavailable):
        log.warning("503: %s", error)
        detail = "The media storage is not available at the moment. Please try again."
        return respond(request, 503, "storage_unavailable", detail)
    if isinstance(error, StorageFull):
        log.error("507: %s", error)
        return respond(request, 507, "storage_full", "The media storage is full.")
    if isinstance(error, (OperationalError, InterfaceError)):
        log.warning("503: database: %s", " ".join(str(error).split()))
        detail = "The database is not available at the moment. Please try again."
        return respond(request, 503, "database_unavailable", detail)
    if isinstance(error, UNREADABLE):
        return respond(request, 400, "bad_request", "The request could not be read.")
    return None


def bad_request(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:  # noqa: ARG001  Django passes it by name
    """Answer 400."""
    return respond(request, 400, "bad_request", "The request could not be read.")


def forbidden(request: HttpRequest, exception: PermissionDenied | None = None) -> HttpResponse:  # noqa: ARG001  Django passes it by name
    """Answer 403."""
    return respond(request, 403, "forbidden", "This is not allowed.")


def not_found(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:  # noqa: ARG001  Django passes it by name
    """Answer 404."""
    return respond(request, 404, "not_found", "There is nothing at this address.")


def server_error(request: HttpRequest) -> HttpResponse:
    """Answer 500; or 503 when a middleware, such as the session's, met an absent database."""
    known = answer(request, sys.exc_info()[1])
    return known or respond(request, 500, "server_error", "Something went wrong on this node.")
