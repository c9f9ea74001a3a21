"""Settings of a site with Wagtail, easy-thumbnails and django-filer, on the volume of the node it runs on.

What concerns files is not written here but read from docs/volume-storage.md, whose code the test brings along.
"""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

MEDIA_ROOT, MEDIA_URL = os.environ["LIBRARIES_ROOT"], "/media/"
_url = urlsplit(os.environ["DATABASE_URL"])

exec(compile((Path(__file__).parent / "documented.txt").read_text(), "docs/volume-storage.md", "exec"))  # noqa: S102

STORAGES["staticfiles"] = {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}  # noqa: F821
TRIBRICK["SENTINEL_ID"] = os.environ["LIBRARIES_SENTINEL"]  # noqa: F821

SECRET_KEY = "proof"
USE_TZ = True
ROOT_URLCONF = "libraries.urls"
STATIC_URL = "/static/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ["LIBRARIES_DATABASE"],
        "USER": unquote(_url.username or ""),
        "PASSWORD": unquote(_url.password or ""),
        "HOST": _url.hostname,
        "PORT": _url.port or 5432,
    }
}
INSTALLED_APPS = [
    "libraries",
    "tribrick",
    "easy_thumbnails",
    "filer",
    "wagtail.images",
    "wagtail.documents",
    "wagtail.users",
    "wagtail.admin",
    "wagtail.search",
    "wagtail",
    "taggit",
    "modelcluster",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]


class _NoMigrations(dict[str, None]):
    """Tables are made from the models at once: a minute less, and migrations are not what is tested."""

    def __missing__(self, app: str) -> None:
        return None

    def __contains__(self, app: object) -> bool:
        return True


MIGRATION_MODULES = _NoMigrations()
WAGTAIL_SITE_NAME = "proof"
WAGTAILADMIN_BASE_URL = "http://proof.example"
