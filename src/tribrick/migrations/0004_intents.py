"""The outbox knows the storage of each row, and the saves that have begun."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("tribrick", "0003_owner")]
    operations = [
        migrations.AddField("outbox", "storage", models.CharField(blank=True, default="", max_length=64)),
        migrations.AlterField(
            "outbox",
            "operation",
            models.CharField(choices=[("put", "Put"), ("delete", "Delete"), ("intent", "Intent")], max_length=6),
        ),
        migrations.AddIndex(
            "outbox",
            models.Index(condition=models.Q(("operation", "intent")), fields=["not_before"], name="tribrick_intents"),
        ),
    ]
