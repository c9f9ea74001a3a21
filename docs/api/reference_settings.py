"""Django settings under which the reference is built: the app and nothing else."""

INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "tribrick"]
SECRET_KEY = "only for the reference"  # noqa: S105  signs nothing: Django wants one to be imported
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
USE_TZ = True
