"""Tribrick for Django: media files that are acknowledged only once they cannot be lost.

``tribrick.storage.VolumeStorage`` is a Django storage for a ``MEDIA_ROOT`` on a shared mount.
Django settings are the only input: see :mod:`tribrick.conf`.
"""

__version__ = "0.1.0"
