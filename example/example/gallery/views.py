"""The pages."""

from __future__ import annotations

import uuid
from typing import Any
from urllib.parse import quote

from django.conf import settings
from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.files.storage import default_storage
from django.db.models import QuerySet
from django.http import FileResponse, Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils.http import content_disposition_header
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from example.gallery import api, errors, links, services, uploads
from example.gallery.models import Picture, Version
from example.gallery.services import Refused
from tribrick.models import State
from tribrick.signature import sign

PAGE = 24


def _page(request: HttpRequest, pictures: QuerySet[Picture], context: dict[str, Any]) -> Any:
    """Render one page of *pictures*, newest first, found by key and not by counting."""
    before = request.GET.get("before", "")
    if before:
        if not (before.isascii() and before.isdigit() and len(before) <= 18):
            raise Http404
        pictures = pictures.filter(id__lt=int(before))
    chosen = list(pictures.select_related("current__file", "current__thumbnail").order_by("-id")[: PAGE + 1])
    older = chosen[PAGE - 1].pk if len(chosen) > PAGE else None
    return render(
        request,
        "gallery/gallery.html",
        context | {"pictures": chosen[:PAGE], "older": older, "first": not before},
    )


@require_safe
def gallery(request: HttpRequest) -> HttpResponse:
    """Show the public pictures."""
    pictures = Picture.objects.filter(private=False, current__isnull=False)
    return _page(request, pictures, {"section": "gallery", "title": "Gallery"})


@require_safe
@login_required
def album(request: HttpRequest) -> HttpResponse:
    """Show the private pictures of the user."""
    pictures = Picture.objects.filter(owner=request.user, private=True, current__isnull=False)
    return _page(request, pictures, {"section": "album", "title": "Private album"})


def _picture(request: HttpRequest, pk: int) -> Picture:
    pictures = Picture.objects.select_related("current__file", "current__thumbnail", "owner")
    found = get_object_or_404(pictures, pk=pk, current__isnull=False)
    if found.private and found.owner_id != request.user.pk:
        raise Http404
    return found


@require_safe
def picture(request: HttpRequest, pk: int) -> HttpResponse:
    """Show one picture, what is known of it, and its versions."""
    found = _picture(request, pk)
    context = {
        "picture": found,
        "shown": found.current,
        "link": f"{found.current.url}?{links.query(found.current.file.name, 86400)}" if found.private else "",
        "versions": found.versions.filter(file__state=State.STORED).select_related("file").order_by("-file__version"),
        "may_change": request.user.is_authenticated
        and (found.owner_id == request.user.pk or request.user.is_superuser),
        "key": uuid.uuid4().hex,
    }
    return render(request, "gallery/picture.html", context)


@require_http_methods(["GET", "HEAD", "POST"])
@never_cache
@login_required
def upload(request: HttpRequest) -> HttpResponse:
    """Upload a picture: by the script with progress, or as a plain form."""
    error = None
    if request.method == "POST":
        try:
            return _receive(request)
        except Refused as refused:
            if errors.wants_json(request):
                raise
            error = refused
            if refused.code == "key_reused":  # an old page from the browser's history
                error = Refused(422, refused.code, "This form was sent before. Please try again.")
    context = {
        "section": "upload",
        "error": error,
        "key": uuid.uuid4().hex,
        "private": request.GET.get("private") == "1",
    }
    return render(request, "gallery/upload.html", context, status=error.status if error else 200)


def _receive(request: HttpRequest) -> HttpResponse:
    with uploads.uploaded(request) as (content, original):
        replaces = None
        if request.POST.get("picture", "").isdecimal():
            current = _picture(request, int(request.POST["picture"][:18])).current
            replaces = current.file.name if current else None
        version = services.save_upload(
            request.user,
            content,
            original,
            private=request.POST.get("private") == "1",
            replaces=replaces,
            key=f"form-{request.POST.get('key', '')[:64]}" if request.POST.get("key") else "",
        )
    page = version.picture.get_absolute_url()
    if errors.wants_json(request):
        return JsonResponse(api.created(version) | {"page": page}, status=201)
    messages.success(request, f"“{version.file.original}” is stored.")
    return redirect(page)


@require_POST
@login_required
def delete(request: HttpRequest, pk: int) -> HttpResponse:
    """Delete a picture with all its versions."""
    found = _picture(request, pk)
    services.delete_picture(request.user, found)
    messages.success(request, "The picture is deleted.")
    return redirect("album" if found.private else "gallery")


@require_safe
def private_file(request: HttpRequest, name: str) -> HttpResponse:
    """Check who asks for a private file, then let nginx send it."""
    name = f"private/{name}"
    if "\0" in name:
        raise Http404
    versions = Version.objects.filter(file__state=State.STORED).select_related("file")
    if not links.allows(request, name):
        user = api.user_of(request) or request.user
        if not user.pk:
            raise Http404
        versions = versions.filter(file__owner=user.pk)
    version = versions.filter(file__name=name).first()
    content_type = version.file.content_type if version else "image/jpeg"
    version = version or versions.filter(thumbnail__name=name).first()
    if version is None:
        raise Http404
    response: Any
    if settings.TRIBRICK_ACCEL_PREFIX:
        response = HttpResponse()
        response["X-Accel-Redirect"] = settings.TRIBRICK_ACCEL_PREFIX + quote(name)
        if settings.TRIBRICK_STANDBY_KEY:
            response["X-Tribrick-Signed"] = sign(settings.TRIBRICK_STANDBY_KEY, "GET", name, key_id="site")
    else:
        response = FileResponse(default_storage.open(name))
    response["Content-Type"] = content_type
    inline = content_type.startswith(("image/", "audio/", "video/"))
    disposition = content_disposition_header(not inline, version.file.original)
    if disposition:
        response["Content-Disposition"] = disposition
    response["Cache-Control"] = "private, max-age=3600"
    response["X-Content-Type-Options"] = "nosniff"
    response["Content-Security-Policy"] = "sandbox; default-src 'none'"
    return response
