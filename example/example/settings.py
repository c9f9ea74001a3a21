"""Settings of the example site. All of them come from the environment; see example/README.md."""

from example.environment import Environment, database

env = Environment()
# Where files are kept: the storage, and what it cannot do without.
_BACKENDS = {
    "volume": ("tribrick.storage.VolumeStorage", ["MEDIA_ROOT", "TRIBRICK_SENTINEL_ID"]),
    "hybrid": ("tribrick.storage.HybridStorage", ["MEDIA_ROOT", "TRIBRICK_MEDIA_HOSTS"]),
    "async": ("tribrick.storage.AsyncStorage", ["MEDIA_ROOT", "TRIBRICK_MEDIA_HOSTS"]),
    "distributed": ("tribrick.storage.DistributedStorage", ["TRIBRICK_MEDIA_HOSTS"]),
}
_BACKEND = env.choice("TRIBRICK_BACKEND", _BACKENDS, "volume")
_STORAGE, _NEEDED = _BACKENDS[_BACKEND]
env.require("SECRET_KEY", "DATABASE_URL", "ALLOWED_HOSTS", *_NEEDED)

DEBUG = env.flag("DEBUG")
SECRET_KEY = env.text("SECRET_KEY")
ALLOWED_HOSTS = env.words("ALLOWED_HOSTS")
CSRF_TRUSTED_ORIGINS = env.words("CSRF_TRUSTED_ORIGINS")
if env.flag("SECURE_PROXY"):
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

INSTALLED_APPS = [
    "example.gallery",
    "tribrick",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
]
MIDDLEWARE = [
    "example.gallery.health.HealthMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "example.gallery.middleware.ServiceMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "example.urls"
WSGI_APPLICATION = "example.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "example.gallery.middleware.site",
            ]
        },
    }
]

DATABASES = {"default": database(env.text("DATABASE_URL"))}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "gallery"
LOGOUT_REDIRECT_URL = "gallery"

LANGUAGE_CODE = "en-gb"
TIME_ZONE = "UTC"
USE_TZ = True

MEDIA_ROOT = env.text("MEDIA_ROOT")
MEDIA_URL = env.text("MEDIA_URL", "/media/")
STATIC_ROOT = env.text("STATIC_ROOT") or None
STATIC_URL = "/static/"
STORAGES = {
    "default": {"BACKEND": _STORAGE},
    "staticfiles": {
        "BACKEND": "django.contrib.staticfiles.storage."
        + ("StaticFilesStorage" if DEBUG else "ManifestStaticFilesStorage")
    },
}
TRIBRICK_NODE = env.text("TRIBRICK_NODE", "this node")
TRIBRICK = {
    "NODE": TRIBRICK_NODE,
    "NODES": env.words("TRIBRICK_NODES"),
    "LEDGER": env.text("TRIBRICK_LEDGER") or None,
    "COPIES": env.structure("TRIBRICK_COPIES", list),
    "SPOOL": env.text("TRIBRICK_SPOOL") or None,
    "SPOOL_COPIES": env.number("TRIBRICK_SPOOL_COPIES", 2, 1, 100),
    "SPOOL_LIMIT": env.number("TRIBRICK_SPOOL_LIMIT", 4 * 2**30, 1, 2**50),
    "SPOOL_PEERS": env.words("TRIBRICK_SPOOL_PEERS"),
    "SYNC": env.structure("TRIBRICK_SYNC", dict),
    "CLOSED": env.text("TRIBRICK_CLOSED") or None,
    "MEDIA_HOSTS": env.words("TRIBRICK_MEDIA_HOSTS"),
    "WRITE_QUORUM": env.quorum("TRIBRICK_WRITE_QUORUM"),
    "TRANSPORT": env.structure("TRIBRICK_TRANSPORT", dict),
    "SENTINEL_ID": env.text("TRIBRICK_SENTINEL_ID"),
    "HASH_LEVELS": env.number("TRIBRICK_HASH_LEVELS", 2, 0, 8),
    "HASH_WIDTH": env.number("TRIBRICK_HASH_WIDTH", 1, 1, 4),
}
TRIBRICK_MAX_UPLOAD_BYTES = env.number("TRIBRICK_MAX_UPLOAD_BYTES", 100 * 2**20, 1, 2**40)
# Where nginx serves the volume to itself only; empty: the site sends private files on its own.
TRIBRICK_ACCEL_PREFIX = env.text("TRIBRICK_ACCEL_PREFIX")
# With it the site signs for a private file, so that a standby gives it away while the volume is not there.
TRIBRICK_STANDBY_KEY = env.text("TRIBRICK_STANDBY_KEY")
PROBE_DEADLINE = 2.0

FILE_UPLOAD_HANDLERS = [
    "example.gallery.uploads.LimitHandler",
    "django.core.files.uploadhandler.MemoryFileUploadHandler",
    "django.core.files.uploadhandler.TemporaryFileUploadHandler",
]
if _BACKEND in {"hybrid", "async"}:
    # The receiver of other nodes' files writes into the same tree, as another user with the same group. No set-group-ID
    # bit: both have that group as their own, and the site's unit may not set one (RestrictSUIDSGID).
    FILE_UPLOAD_PERMISSIONS = 0o664
    FILE_UPLOAD_DIRECTORY_PERMISSIONS = 0o775
else:
    # Others may read, which nginx needs; the volume is nobody else's.
    FILE_UPLOAD_PERMISSIONS = 0o644

SECURE_REFERRER_POLICY = "same-origin"
SESSION_COOKIE_SAMESITE = "Lax"
CSRF_COOKIE_SAMESITE = "Lax"

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
}
