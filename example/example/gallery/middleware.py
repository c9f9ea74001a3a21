"""What every request gets: limits, headers, and answers for absent storage or database."""

from __future__ import annotations

import functools
from collections.abc import Callable

from django.conf import settings
from django.http import HttpRequest, HttpResponse

from example.gallery import errors, uploads

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


def site(_request: HttpRequest) -> dict[str, object]:
    """Context of every page."""
    return {"node": settings.TRIBRICK_NODE, "max_upload": uploads.limit()}


class ServiceMiddleware:
    """See the module's text."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self._refusal(request)
        if response is None:
            request.parse_file_upload = functools.partial(uploads.receive, request)
            response = self.get_response(request)
        response.headers.setdefault("Content-Security-Policy", POLICY)
        if request.is_secure():
            # The same site may be reached by http in a lab, so this is not a fixed setting.
            for cookie in response.cookies.values():
                cookie["secure"] = True
        return response

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        """Turn the errors that a page or an API call expects into their answers."""
        return errors.answer(request, error)

    def _refusal(self, request: HttpRequest) -> HttpResponse | None:
        if request.method not in {"POST", "PUT"}:
            return None
        if uploads.announced_too_large(request):
            refused = uploads.too_large()
        elif "chunked" in request.headers.get("Transfer-Encoding", "").lower():
            if request.META.get("CONTENT_LENGTH"):
                return None
            refused = uploads.without_length()
        else:
            return None
        return errors.answer(request, refused)
