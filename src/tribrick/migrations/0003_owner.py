"""Files of one owner, newest first, without sorting."""

from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):
    """See the module's text."""

    dependencies = [migrations.swappable_dependency(settings.AUTH_USER_MODEL), ("tribrick", "0002_change_numbers")]
    operations = [
        migrations.AddIndex(
            model_name="mediafile",
            index=models.Index(condition=models.Q(("state", "stored")), fields=["owner", "-id"], name="tribrick_owner"),
        )
    ]
