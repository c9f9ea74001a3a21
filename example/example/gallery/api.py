"""The API: ``/api/media/`` with ``Authorization: Token T``.

=======  ====================  ===========================================================
method   address               answer
=======  ====================  ===========================================================
POST     ``/api/media/``       201 ``{"url", "name", "sha256", "size", "node"}``
GET      ``/api/media/``       200 the caller's files, newest first: ``limit``, ``before``
GET      ``/api/media/NAME``   200 the row; of a private file with ``link=SECONDS`` also ``link``, an
                               address that shows it to everybody for so long
PUT      ``/api/media/NAME``   201 as POST, a new version under a new name; the old stays;
                               409 if NAME was deleted
DELETE   ``/api/media/NAME``   204, also when it was deleted before; 404 for an unknown name
=======  ====================  ===========================================================

POST takes ``private=1`` for the private album. POST and PUT take ``Idempotency-Key``: a repeated
request gives the answer of the first; the same key with other content is refused with 422.
Errors are ``{"error": word, "detail": sentence}``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_exempt

from example.gallery import links, services, uploads
from example.gallery.models import Token, Version
from example.gallery.services import Refused
from tribrick.models import MediaFile, State

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_ROOT = "/api/media/"
View = Callable[..., HttpResponse]


def user_of(request: HttpRequest) -> Any:
    """Return the user of the request's token, or None."""
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "token" or not secret.strip():
        return None
    digest = Token.hash(secret.strip())
    token = Token.objects.select_related("user").filter(digest=digest).first()
    return token.user if token is not None and token.user.is_active else None


def endpoint(*methods: str) -> Callable[[View], View]:
    """Check method and token, in this order and before the body is read."""

    def decorate(view: View) -> View:
        @csrf_exempt  # no cookie is looked at, so no other site can use one
        @never_cache
        @functools.wraps(view)
        def wrapper(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
            if request.method not in methods:
                detail = f"{request.method} is not possible here."
                response = JsonResponse({"error": "method_not_allowed", "detail": detail})
                response.status_code = 405
                response["Allow"] = ", ".join(methods)
                return response
            user = user_of(request)
            if user is None:
                detail = "Send “Authorization: Token T” with a valid token."
                raise Refused(401, "unauthorized", detail)
            return view(request, user, *args, **kwargs)

        return wrapper

    return decorate


def created(version: Version) -> dict[str, Any]:
    """Return the answer to an upload."""
    file = version.file
    return {"url": version.url, "name": file.name, "sha256": file.sha256, "size": file.size, "node": file.node}


def row(version: Version) -> dict[str, Any]:
    """Return all that is told of a file."""
    file = version.file
    return created(version) | {
        "id": file.pk,
        "original": file.original,
        "content_type": file.content_type,
        "width": version.width,
        "height": version.height,
        "thumbnail": version.thumbnail_url,
        "private": version.private,
        "picture": version.picture_id,
        "version": file.version,
        "created": file.created.isoformat(),
    }


def _created(version: Version) -> HttpResponse:
    response = JsonResponse(created(version), status=201)
    response["Location"] = _ROOT + quote(version.file.name)
    return response


def _key(request: HttpRequest) -> str:
    key = request.headers.get("Idempotency-Key", "")
    if key and not _KEY.fullmatch(key):
        detail = "Idempotency-Key must be 1 to 255 printable ASCII characters without spaces."
        raise Refused(400, "bad_key", detail)
    return key


def _number(request: HttpRequest, name: str, default: int | None, most: int) -> int | None:
    text = request.GET.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,18}", text) or not 1 <= int(text) <= most:
        raise Refused(400, "bad_request", f"{name} must be a number from 1 to {most}.")
    return int(text)


@endpoint("GET", "HEAD", "POST")
def collection(request: HttpRequest, user: Any) -> HttpResponse:
    """List the caller's files, or store a new one."""
    if request.method == "POST":
        key = _key(request)
        with uploads.uploaded(request) as (content, original):
            private = request.POST.get("private", "") in {"1", "true", "on"}
            return _created(services.save_upload(user, content, original, private=private, key=key))
    limit = _number(request, "limit", 50, 200) or 50
    before = _number(request, "before", None, 10**18)
    files = MediaFile.objects.filter(owner=user, state=State.STORED, gallery__isnull=False).order_by("-id")
    if before is not None:
        files = files.filter(id__lt=before)
    page = list(files.select_related("gallery__thumbnail")[: limit + 1])
    following = f"{_ROOT}?limit={limit}&before={page[limit - 1].pk}" if len(page) > limit else None
    return JsonResponse({"results": [row(file.gallery) for file in page[:limit]], "next": following})


@endpoint("GET", "HEAD", "PUT", "DELETE")
def item(request: HttpRequest, user: Any, name: str) -> HttpResponse:
    """Show, replace or delete one file."""
    if request.method == "DELETE":
        services.delete_version(user, name)
        return HttpResponse(status=204)
    if request.method == "PUT":
        key = _key(request)
        services.check_replaceable(user, name)
        with uploads.uploaded(request) as (content, original):
            return _created(services.save_upload(user, content, original, replaces=name, key=key))
    version = services.find(user, name)
    if version.deleted:
        raise Refused(404, "deleted", "This file was deleted.")
    seconds = _number(request, "link", None, links.LONGEST)
    link = {"link": f"{version.url}?{links.query(version.file.name, seconds)}"} if seconds and version.private else {}
    return JsonResponse(row(version) | link)
