"""The gallery app."""

from django.apps import AppConfig


class GalleryConfig(AppConfig):
    """Pictures and their versions."""

    name = "example.gallery"
    label = "gallery"
    verbose_name = "Gallery"
