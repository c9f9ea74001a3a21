"""Addresses of the site."""

from django.conf import settings
from django.contrib import admin
from django.urls import include, path, re_path

urlpatterns = [
    path("admin/", admin.site.urls),
    path("", include("example.gallery.urls")),
]

if settings.DEBUG:  # nginx does both in production
    from django.contrib.staticfiles.urls import staticfiles_urlpatterns
    from django.views.static import serve

    urlpatterns += staticfiles_urlpatterns()
    urlpatterns += [
        re_path(
            rf"^{settings.MEDIA_URL.strip('/')}/(?P<path>photos/.*)$",
            serve,
            {"document_root": settings.MEDIA_ROOT},
        )
    ]

handler400 = "example.gallery.errors.bad_request"
handler403 = "example.gallery.errors.forbidden"
handler404 = "example.gallery.errors.not_found"
handler500 = "example.gallery.errors.server_error"
