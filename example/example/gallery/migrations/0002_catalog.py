"""The catalog takes over, step 1 of 3: room for its rows beside the gallery's own."""

import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    """See the module's text."""

    dependencies = [("gallery", "0001_initial"), ("tribrick", "0003_owner")]
    operations = [
        migrations.RemoveIndex(model_name="picture", name="gallery_public"),
        migrations.RemoveIndex(model_name="picture", name="gallery_private"),
        # Its index has the name of the new table.
        migrations.RemoveConstraint(model_name="storedmedia", name="gallery_version"),
        migrations.RenameField(model_name="picture", old_name="current", new_name="old"),
        migrations.RenameField(model_name="requestkey", old_name="media", new_name="old"),
        migrations.AlterField(
            model_name="storedmedia",
            name="picture",
            field=models.ForeignKey(
                on_delete=django.db.models.deletion.CASCADE, related_name="+", to="gallery.picture"
            ),
        ),
        migrations.CreateModel(
            name="Version",
            fields=[
                (
                    "file",
                    models.OneToOneField(
                        on_delete=django.db.models.deletion.CASCADE,
                        primary_key=True,
                        related_name="gallery",
                        serialize=False,
                        to="tribrick.mediafile",
                    ),
                ),
                ("width", models.PositiveIntegerField(blank=True, null=True)),
                ("height", models.PositiveIntegerField(blank=True, null=True)),
                (
                    "picture",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE, related_name="versions", to="gallery.picture"
                    ),
                ),
                (
                    "thumbnail",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="+",
                        to="tribrick.mediafile",
                    ),
                ),
            ],
        ),
        migrations.AddField(
            model_name="picture",
            name="current",
            field=models.OneToOneField(
                blank=True,
                null=True,
                on_delete=django.db.models.deletion.SET_NULL,
                related_name="+",
                to="gallery.version",
            ),
        ),
        migrations.AddField(
            model_name="requestkey",
            name="version",
            field=models.ForeignKey(
                null=True, on_delete=django.db.models.deletion.CASCADE, related_name="+", to="gallery.version"
            ),
        ),
    ]
