"""Django storages. Name one in ``STORAGES["default"]["BACKEND"]``."""

from tribrick.errors import StorageError, StorageFull, StorageUnavailable
from tribrick.storage.derived import DerivedStorage
from tribrick.storage.volume import StoredFile, VolumeStorage

__all__ = ["DerivedStorage", "StorageError", "StorageFull", "StorageUnavailable", "StoredFile", "VolumeStorage"]
