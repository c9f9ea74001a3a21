"""The spool: uploads that are accepted while the volume refuses them.

A directory on the local disk of each node, and a receiver in front of it for the other nodes. An
upload that the volume refuses is made durable here and, by their receivers, in the spools of
peers, until ``SPOOL_COPIES`` of them have it; then it gets its row, which says *spooled*. Until
:mod:`tribrick.drain` has brought it to the volume it is read from here, or from a peer.

The catalog's row decides about every copy: nobody keeps a list of what is where, and a copy that
could not be removed, because its node was away, goes when that node looks into its own spool.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar, cast

from django.core.exceptions import ImproperlyConfigured
from django.core.files import File
from django.db import DatabaseError

from tribrick.conf import setting
from tribrick.errors import StorageError, StorageUnavailable
from tribrick.ledger import Known, Ledger
from tribrick.receiver import Usage
from tribrick.storage.base_remote import (
    DELETE,
    UPLOAD,
    NotWaitedFor,
    Outcome,
    ReplicationError,
    _Calls,
)
from tribrick.storage.hybrid import HybridStorage, _size_of
from tribrick.storage.transport import Body, TransportTimeout, opener_of
from tribrick.storage.volume import StoredFile, VolumeStorage

if TYPE_CHECKING:
    from tribrick.models import MediaFile

log = logging.getLogger("tribrick.spool")
BASE_URL: Final = "/spool/"
T = TypeVar("T")


class SpoolStorage(HybridStorage):
    """The spool here and those of the peers. Not for ``STORAGES``: ``VolumeStorage`` makes it from the settings.

    *location* is the directory here, *copies* in how many spools a file must be, *limit* how many
    bytes the one here may hold.
    """

    catalogued = False  # the rows are those of the storage whose files come here

    def __init__(self, location: str, peers: Sequence[str], copies: int, limit: int) -> None:
        self.copies, self.limit = copies, limit
        # The receiver, another user of the same group, makes and removes files in the same directories.
        super().__init__(peers, BASE_URL, location=location, directory_permissions_mode=0o775)
        self.usage = Usage(location)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The receivers of the peers; there may be none."""
        return self._hosts or ()

    @property
    def quorum(self) -> int:
        """How many peers must confirm a save."""
        return self.copies - 1

    # Writing.

    def keep(self, name: str, content: File[Any], why: StorageUnavailable) -> StoredFile:
        """Store *content*, which the volume has refused, in enough spools; or raise ``StorageUnavailable``.

        *name* must be new. When it returns, ``SPOOL_COPIES`` spools have the file durably.
        """
        stored = self._keep_here(name, content, why)
        results: dict[str, Outcome] = {}
        try:
            with self._local(stored.name) as descriptor:
                body = Body(stored.size, stored.sha256, opener_of(descriptor, stored.size))
                self._bring_to_peers(stored.name, body, results)
        except BaseException:
            self._undo(stored.name, results or _interrupted(self.hosts), stored.size)
            raise
        log.warning("%s is in %d spools: %s", stored.name, self.copies, why)
        return replace(stored, spooled=True)

    def _keep_here(self, name: str, content: File[Any], why: StorageUnavailable) -> StoredFile:
        mount = self._mount()
        try:
            used = mount.call(lambda _root: self.usage.used())
            if used + (_size_of(content) or 0) > self.limit:
                raise StorageUnavailable(
                    errno.EDQUOT, f'the spool holds {used} bytes; TRIBRICK["SPOOL_LIMIT"] is {self.limit}'
                )
            stored = VolumeStorage._write(self, name, content)
            try:
                mount.call(lambda _root: self._sync_directories(stored.name))
            except BaseException:
                self._unlink(stored.name)
                raise
        except StorageError as error:
            # Full or away, it is the volume's absence that the answer is about: worth another try later.
            raise StorageUnavailable(error.errno or errno.EIO, f"{why.strerror}; nor the spool: {error}") from error
        self.usage.add(stored.size)
        return stored

    def _bring_to_peers(self, name: str, body: Body, results: dict[str, Outcome]) -> None:
        """PUT to as many peers as are needed, to others instead of those that fail; note all in *results*."""
        left = self._read_order(self.hosts)
        deadline = self.deadline()
        while (missing := self.quorum - sum(outcome.ok for outcome in results.values())) > 0 and left:
            now, left = left[:missing], left[missing:]
            try:
                part = deadline.share(1 + -(-len(left) // missing))
            except TransportTimeout:
                break
            part.allow(body.size)
            results.update(_interrupted(now))
            outcomes = _Calls({host: partial(self.transport.create, host, name, body, part) for host in now}).wait(part)
            deadline.at += part.allowed  # what the bytes may take longer is not at the other peers' expense
            results.update(outcomes)
            self._log(UPLOAD, name, outcomes)
        if missing > 0:
            raise ReplicationError("spooling", name, results, self.quorum)

    def discarded(self, name: str) -> bool:
        """Remove a failed save from the spools; return whether it was here at all."""
        try:
            if not self.has(name):
                return False
            self._unlink(name)
        except OSError as error:
            log.warning("a failed save left %s in the spool: %s", name, error)
        self.execute(DELETE, name)
        return True

    def forget(self, name: str) -> None:
        """Remove a deleted file from the spools: from here, and from the peers if its row says that they have it."""
        with contextlib.suppress(StorageUnavailable):  # then drain goes by the row
            row = self.known(name)
            self.remove(name, self.hosts if row is not None and getattr(row, "spooled", True) else ())

    def remove(self, name: str, peers: Sequence[str]) -> tuple[bool, list[str]]:
        """Remove the copy here and those of some *peers*.

        Return whether the one here is gone, and the peers that have not confirmed. What is left
        is removed by the drain of its own node.
        """
        gone = True
        try:
            self._unlink(name)
        except OSError as error:
            gone = False
            log.warning("%s is left in the spool: %s", name, error)
        deadline = self.deadline()
        outcomes = _Calls({host: partial(self.transport.delete, host, name, deadline) for host in peers}).wait(deadline)
        self._log(DELETE, name, outcomes)
        return gone, [host for host, outcome in outcomes.items() if not outcome.ok]

    # Reading.

    def known(self, name: str) -> MediaFile | Known | None:
        """Return what the catalog knows of a name; without it what the ledger knows.

        Raises ``StorageUnavailable`` when the catalog is away and the ledger does not know the name.
        """
        from tribrick.catalog import database
        from tribrick.models import MediaFile

        try:
            return MediaFile.objects.using(database()).filter(name=name).first()
        except DatabaseError as error:
            log.warning("the catalog did not answer: %s", " ".join(str(error).split()))
            path = setting("LEDGER")
            if path and Path(path).exists():
                with Ledger(path) as ledger:
                    if (known := ledger.get(name)) is not None:
                        return known
            raise StorageUnavailable(errno.EIO, f"nobody can say whether {name} is a stored file") from error

    def _living(self, name: str) -> MediaFile | None:
        found = self.known(self._canonical(name))
        if found is not None and found.state != "stored":
            raise FileNotFoundError(errno.ENOENT, f"{name} was deleted")
        return cast("MediaFile | None", found)

    def row_of(self, name: str) -> MediaFile:
        """Return the row of a living file, for what it says of it."""
        row = self._living(name)
        if row is None:
            raise FileNotFoundError(errno.ENOENT, f"the catalog does not know {name}")
        if isinstance(row, Known):
            raise StorageUnavailable(errno.EIO, f"{name} is not here, and the catalog is away")
        return row

    def has(self, name: str) -> bool:
        """Whether the file is in the spool here."""
        relative = self._relative(name)

        def there(root: int) -> bool:
            try:
                os.stat(relative, dir_fd=root, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

        return self._mount().call(there)

    def fetch(self, name: str) -> IO[bytes]:
        """Return the bytes from the spool of a peer, compared with the hash that is known."""
        if not self.hosts:
            raise FileNotFoundError(errno.ENOENT, f"no other spool could have {name}")
        return self._download(name)

    def ask(
        self,
        name: str,
        volume: VolumeStorage,
        here: Callable[[VolumeStorage], T],
        elsewhere: Callable[[SpoolStorage], T],
    ) -> T:
        """Ask the spool here, then the volume, then *elsewhere*.

        ``FileNotFoundError`` is said only of a name that the catalog does not know as stored, or knows
        as drained and the volume lacks. A name that is alive and whose holders are away is
        ``StorageUnavailable``.
        """
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # drained just now
            if self._has_safely(name):
                self._living(name)
                return here(self)
        try:
            return here(volume)
        except (FileNotFoundError, NotADirectoryError, StorageUnavailable) as error:
            first = error
        row = self._living(name)
        away = isinstance(first, StorageUnavailable)
        if row is None and not away:
            raise first  # a healthy volume does not have it, and nobody knows the name
        if row is not None and getattr(row, "spooled", True):
            try:
                return elsewhere(self)
            except FileNotFoundError as error:
                if away:
                    raise first from error
        if away:
            raise first
        try:
            return here(volume)  # it may have been drained between the looks
        except (FileNotFoundError, NotADirectoryError) as error:
            if row is None or not getattr(row, "spooled", True):
                raise
            raise StorageUnavailable(
                errno.EIO, f"{name} is stored, but neither the volume nor a spool that answers has it"
            ) from error

    def _has_safely(self, name: str) -> bool:
        try:
            return self.has(name)
        except OSError as error:
            log.warning("the spool here cannot be asked for %s: %s", name, error)
            return False


def _interrupted(hosts: Sequence[str]) -> dict[str, Outcome]:
    """Return what is to be assumed of hosts that a PUT may be on its way to."""
    return {host: Outcome(host, error=NotWaitedFor(errno.EINTR, "interrupted")) for host in hosts}


# Made once for each set of settings: it keeps connections to the peers.
_made: dict[tuple[Any, ...], SpoolStorage] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _made.clear()  # their locks may be held by threads that the child does not have


os.register_at_fork(after_in_child=_after_fork)


def spool() -> SpoolStorage:
    """Return the spool that the settings describe; raise ``ImproperlyConfigured`` if they cannot work."""
    location, peers = setting("SPOOL"), setting("SPOOL_PEERS")
    copies, limit = setting("SPOOL_COPIES"), setting("SPOOL_LIMIT")
    if not location or not isinstance(location, (str, os.PathLike)) or not os.path.isabs(location):
        raise ImproperlyConfigured(f'TRIBRICK["SPOOL"] must be the absolute path of a directory, not {location!r}.')
    if isinstance(peers, str) or len(set(peers)) != len(peers):
        raise ImproperlyConfigured('TRIBRICK["SPOOL_PEERS"] must be a list of hosts, each of them once.')
    if not isinstance(copies, int) or isinstance(copies, bool) or not 1 <= copies <= 1 + len(peers):
        raise ImproperlyConfigured(
            f'TRIBRICK["SPOOL_COPIES"] is {copies!r}; with {len(peers)} SPOOL_PEERS and the spool here it can be '
            f"1 to {1 + len(peers)}."
        )
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ImproperlyConfigured(f'TRIBRICK["SPOOL_LIMIT"] must be a number of bytes, not {limit!r}.')
    key = (os.fspath(location), tuple(peers), copies, limit)
    made = _made.get(key)
    if made is None:
        with _lock:
            made = _made.setdefault(key, SpoolStorage(*key))
    return made
