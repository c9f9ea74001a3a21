"""The model of easy-thumbnails' part; Wagtail and django-filer bring their own."""

from django.db import models
from easy_thumbnails.fields import ThumbnailerImageField


class Picture(models.Model):
    """A picture with thumbnails."""

    image = ThumbnailerImageField(upload_to="pictures", max_length=255)

    class Meta:
        app_label = "libraries"

    def __str__(self) -> str:
        return str(self.image)
