"""The catalog takes over, step 3 of 3: the gallery's own rows go."""

from django.db import migrations, models


class Migration(migrations.Migration):
    """See the module's text."""

    dependencies = [("gallery", "0003_carry_over")]
    operations = [
        migrations.RemoveField(model_name="picture", name="old"),
        migrations.RemoveField(model_name="requestkey", name="old"),
        migrations.DeleteModel(name="StoredMedia"),
        migrations.AddIndex(
            model_name="picture",
            index=models.Index(
                condition=models.Q(("current__isnull", False), ("private", False)),
                fields=["-id"],
                name="gallery_public",
            ),
        ),
        migrations.AddIndex(
            model_name="picture",
            index=models.Index(
                condition=models.Q(("current__isnull", False), ("private", True)),
                fields=["owner", "-id"],
                name="gallery_private",
            ),
        ),
    ]
