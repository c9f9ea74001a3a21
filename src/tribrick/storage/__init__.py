"""Django storages. Name one in ``STORAGES["default"]["BACKEND"]``."""

from tribrick.errors import StorageError, StorageFull, StorageUnavailable
from tribrick.storage.volume import StoredFile, VolumeStorage

__all__ = ["StorageError", "StorageFull", "StorageUnavailable", "StoredFile", "VolumeStorage"]
