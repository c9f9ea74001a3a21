"""The catalog knows which files are in the spools."""

from typing import Any

from django.db import migrations, models


def _set_default(_apps: Any, schema_editor: Any) -> None:
    """Let nodes that still run the release before insert rows while the others are upgraded."""
    if schema_editor.connection.vendor == "postgresql":
        schema_editor.execute("ALTER TABLE tribrick_mediafile ALTER COLUMN spooled SET DEFAULT false")


class Migration(migrations.Migration):
    dependencies = [("tribrick", "0004_intents")]
    operations = [
        migrations.AddField(
            "mediafile",
            "spooled",
            models.BooleanField(
                default=False,
                help_text="The bytes are in the spools of some nodes, and not yet known to be on the volume.",
            ),
        ),
        migrations.RunPython(_set_default, migrations.RunPython.noop),
        migrations.AddIndex(
            "mediafile",
            models.Index(condition=models.Q(("spooled", True)), fields=["id"], name="tribrick_spooled"),
        ),
    ]
