"""Number the changes in the order of their commits.

A plain sequence gives a number when a row is inserted, and a transaction with a smaller number can
commit after one with a larger: a reader who goes on from the largest number he saw would miss it.
So the number is given by a deferred trigger, which PostgreSQL runs at COMMIT, under a lock that is
released only after the commit can be seen. The lock is held for the length of one commit, whatever
else the transaction did before, and does not depend on the isolation level.

The trigger fires twice: the first time it only queues itself again, behind the deferred checks of
foreign keys. So a transaction that holds the lock waits for nobody's row.
"""

from collections.abc import Callable
from typing import Any

from django.db import migrations

FORWARD = """
CREATE SEQUENCE tribrick_change_number;
CREATE FUNCTION tribrick_number_change() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        UPDATE tribrick_change SET number = NULL WHERE id = NEW.id;
    ELSE
        PERFORM pg_advisory_xact_lock(7381205816);
        UPDATE tribrick_change SET number = nextval('tribrick_change_number')
        WHERE id = NEW.id AND number IS NULL;
    END IF;
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER tribrick_number_change AFTER INSERT OR UPDATE ON tribrick_change
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.number IS NULL)
EXECUTE FUNCTION tribrick_number_change();
"""
BACKWARD = """
DROP TRIGGER tribrick_number_change ON tribrick_change;
DROP FUNCTION tribrick_number_change();
DROP SEQUENCE tribrick_change_number;
"""


def _run(sql: str) -> Callable[[Any, Any], None]:
    def run(_apps: Any, schema_editor: Any) -> None:
        if schema_editor.connection.vendor == "postgresql":
            schema_editor.execute(sql, params=None)

    return run


class Migration(migrations.Migration):
    """See the module's text."""

    dependencies = [("tribrick", "0001_initial")]
    operations = [migrations.RunPython(_run(FORWARD), _run(BACKWARD))]
