"""The gallery app."""

from django.apps import AppConfig


class GalleryConfig(AppConfig):
    """Pictures and their versions."""

    name = "example.gallery"
    label = "gallery"
    verbose_name = "Gallery"

    def ready(self) -> None:
        """Connect the signals."""
        from example.gallery import signals  # noqa: F401  importing it connects the receivers
