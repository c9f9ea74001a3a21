"""The ``TRIBRICK`` setting, a dictionary that is read when a value is needed, never at import.

======================  =======================  ==================================================
key                     default                  meaning
======================  =======================  ==================================================
``SENTINEL_ID``         none: must be given      the id in the sentinel file of the volume; ``False``
                                                 says that ``MEDIA_ROOT`` is a plain directory, for
                                                 which no sentinel is asked
``SENTINEL_NAME``       ``.tribrick-volume``     the sentinel's name in the root of the volume
``HASH_LEVELS``         2                        hash directories between directory and file
``HASH_WIDTH``          1                        hexadecimal digits of each hash directory's name
``DEADLINE``            10                       seconds that a call on the volume may take; for a large
                                                 file, each piece of it
``OUTSTANDING``         8                        calls on the volume that one process has outstanding
                                                 at a time, at most
``RESERVE``             64 MiB                   bytes that a save leaves free on the volume, and in the
                                                 spool; who would go below gets ``StorageFull``
``SPOOL``               none                     a directory on the local disk that takes uploads while
                                                 the volume refuses them, see docs/spool.md
``SPOOL_COPIES``        2                        in how many spools an upload must be before it is
                                                 acknowledged, the one here included
``SPOOL_LIMIT``         4 GiB                    bytes that the spool here may hold
``SPOOL_PEERS``         none                     receivers (``address`` or ``address:port``) of the other
                                                 nodes' spools; ``TRANSPORT`` has their path
``CLOSED``              none                     while a file of this path is there, uploads are refused with
                                                 ``StorageUnavailable``, see docs/runbooks/fallback.md
``NODE``                the host's name          the name of this node, noted in the catalog
``NODES``               none                     the names of all nodes; a tombstone expires when
                                                 the ledgers of all of them hold it
``COPIES``              none                     copies outside the storage: dictionaries with
                                                 ``name``, ``kind`` (``path``, ``http``, ``hashes``
                                                 or ``ssh``), ``address`` and options of the kind,
                                                 see docs/catalog.md
``LEDGER``              none                     the path of this node's ledger (SQLite)
``MEDIA_HOSTS``         none                     hosts (``address`` or ``address:port``) of the
                                                 storages with media hosts, see docs/storages.md
``WRITE_QUORUM``        a majority               how many of them must confirm a save: a number or
                                                 ``"all"``
``FATAL_EXCEPTIONS``    ``True``                 a save without quorum is undone and raises;
                                                 ``False``: it is logged and completed later
``SHOW_TRACEBACK``      ``False``                log the traceback of each host's failure
``TIMEOUT``             2                        seconds for one whole operation on all hosts, ...
``MINIMUM_RATE``        1 MiB                    ... and more for the bytes it moves, at this rate a
                                                 second
``SYNC``                none                     reconciliation of directories: ``state``, ``peers``,
                                                 ``storage``, ``strategy``, ``linked``, ``quiet``,
                                                 see docs/sync.md
``TRANSPORT``           none                     arguments for the transport: ``ca``,
                                                 ``certificate``, ``key``, ``hmac_key``, ...
======================  =======================  ==================================================
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any, Final

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

DEFAULTS: Final[Mapping[str, Any]] = {
    "SENTINEL_ID": None,
    "SENTINEL_NAME": ".tribrick-volume",
    "HASH_LEVELS": 2,
    "HASH_WIDTH": 1,
    "DEADLINE": 10.0,
    "OUTSTANDING": 8,
    "RESERVE": 64 * 1024 * 1024,
    "SPOOL": None,
    "SPOOL_COPIES": 2,
    "SPOOL_LIMIT": 4 * 1024**3,
    "SPOOL_PEERS": (),
    "CLOSED": None,
    "NODE": socket.gethostname(),
    "NODES": (),
    "COPIES": (),
    "LEDGER": None,
    "MEDIA_HOSTS": (),
    "WRITE_QUORUM": None,
    "FATAL_EXCEPTIONS": True,
    "SHOW_TRACEBACK": False,
    "TIMEOUT": 2.0,
    "MINIMUM_RATE": 1024 * 1024,
    "SYNC": {},
    "TRANSPORT": {},
}


def setting(key: str) -> Any:
    """Return ``settings.TRIBRICK[key]`` or its default; an unknown key in the setting is refused."""
    given = getattr(settings, "TRIBRICK", {})
    if not isinstance(given, Mapping):
        raise ImproperlyConfigured(f"TRIBRICK must be a dictionary, not {type(given).__name__}.")
    unknown = sorted(str(name) for name in given if name not in DEFAULTS)
    if unknown:
        raise ImproperlyConfigured(f"TRIBRICK has unknown keys: {', '.join(unknown)}. Known: {', '.join(DEFAULTS)}.")
    return given.get(key, DEFAULTS[key])
