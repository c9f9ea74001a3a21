"""The storage that keeps a file here and brings it to the media hosts in the background."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.files import File
from django.db import transaction
from django.utils.deconstruct import deconstructible

from tribrick.storage.base_remote import DELETE, UPLOAD, Outcome, log
from tribrick.storage.catalogued import Commit
from tribrick.storage.hybrid import HybridStorage
from tribrick.storage.transport import Body
from tribrick.storage.volume import StoredFile


@deconstructible(path="tribrick.storage.AsyncStorage")
class AsyncStorage(HybridStorage):
    """Local first, and replication later, by ``tribrick replicate``.

    A save returns when the local copy is durable and the work for every host stands in the outbox,
    in the same transaction as the caller's own rows. So a rollback takes the work back, and a
    killed worker loses none.
    """

    works_later = True

    def execute(self, operation: str, name: str, body: Body | None = None) -> dict[str, Outcome]:
        """Write the work into the outbox, in the caller's transaction.

        To have a task queue do it sooner, call this first and then queue
        ``tribrick.outbox.Worker().work(name=name)`` with ``transaction.on_commit``.
        """
        if not self.has_outbox:
            raise ImproperlyConfigured(
                'AsyncStorage keeps its work in the database: add "tribrick" to INSTALLED_APPS and name the '
                "storage in STORAGES."
            )
        from tribrick import outbox

        if operation == UPLOAD:
            if body is None:
                raise ValueError("an upload needs its body")
            outbox.add_put(StoredFile(name, body.sha256, body.size), self.hosts, storage=self.alias or "")
        else:
            outbox.add_delete(name, self.hosts, storage=self.alias or "")
        return {host: Outcome(host, queued=True) for host in self.hosts}

    def _intend(self, name: str, size: int | None = None) -> None:
        """Nothing: until the commit no byte is anywhere but here, where ``sweep`` finds it."""

    def _forget(self, name: str) -> None:
        """Nothing: there is no intent."""

    def _replicate(self, stored: StoredFile, body: Body, content: File[Any] | None, *, local: bool) -> None:  # noqa: ARG002
        commit = Commit()
        try:
            with commit.watched():
                self.execute(UPLOAD, stored.name, body)
                if content is not None:
                    self._record(stored, content)
        except BaseException:
            if commit.unknown:
                log.error("unknown whether the rows were committed; kept %s", stored.name)
            else:
                self._unlink(stored.name)
            raise

    def _bury(self, row: Any) -> None:
        from tribrick.catalog import database

        with transaction.atomic(using=database()):
            self.execute(DELETE, row.name)
            super()._bury(row)

    def _delete_remotely(self, name: str, *, catalogued: bool) -> None:  # noqa: ARG002
        self.execute(DELETE, name)
