"""Django storages. Name one in ``STORAGES["default"]["BACKEND"]``."""

from tribrick.errors import StorageError, StorageFull, StorageUnavailable
from tribrick.storage.asynchronous import AsyncStorage
from tribrick.storage.base_remote import Outcome, ReplicationError
from tribrick.storage.derived import DerivedStorage
from tribrick.storage.distributed import DistributedStorage
from tribrick.storage.hybrid import HybridStorage
from tribrick.storage.transport import DefaultTransport, TransportError, UnexpectedStatusCode
from tribrick.storage.volume import StoredFile, VolumeStorage

__all__ = [
    "AsyncStorage",
    "DefaultTransport",
    "DerivedStorage",
    "DistributedStorage",
    "HybridStorage",
    "Outcome",
    "ReplicationError",
    "StorageError",
    "StorageFull",
    "StorageUnavailable",
    "StoredFile",
    "TransportError",
    "UnexpectedStatusCode",
    "VolumeStorage",
]
