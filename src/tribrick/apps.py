"""The Django app: the catalog and its commands."""

from django.apps import AppConfig


class TribrickConfig(AppConfig):
    """Name it in ``INSTALLED_APPS`` as ``"tribrick"``."""

    name = "tribrick"
    label = "tribrick"
    verbose_name = "Tribrick media"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the system checks, and refuse what would store nothing: a web server runs no checks."""
        from tribrick import checks

        checks.refuse_storages_without_hosts()
