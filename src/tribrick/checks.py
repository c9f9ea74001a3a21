"""System checks: storages that could store nothing, and settings of older packages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, register
from django.core.exceptions import ImproperlyConfigured
from django.core.files.storage import storages
from django.utils.module_loading import import_string

_KEY: Final = 'TRIBRICK = {{"{key}": {value!r}}}'
_RENAMED: Final = {
    "RESTO_MEDIA_HOSTS": "MEDIA_HOSTS",
    "RESTO_FATAL_EXCEPTIONS": "FATAL_EXCEPTIONS",
    "RESTO_SHOW_TRACEBACK": "SHOW_TRACEBACK",
    "RESTO_TIMEOUT": "TIMEOUT",
    "DUST_MEDIA_HOSTS": "MEDIA_HOSTS",
    "DUST_HOSTS": "MEDIA_HOSTS",
    "DUST_FATAL_EXCEPTIONS": "FATAL_EXCEPTIONS",
    "DUST_TIMEOUT": "TIMEOUT",
}
_GONE: Final = {
    "DUST_USE_LOCAL_FS": (
        "Remove it. A storage that reads locally is tribrick.storage.HybridStorage, one that does not is "
        "tribrick.storage.DistributedStorage; name it in STORAGES."
    ),
    "DUST_RETRY_STORAGE_BACKEND": (
        'Remove it. What a host has missed stands in the outbox: put "tribrick" into INSTALLED_APPS and run '
        "manage.py tribrick replicate."
    ),
}
_BACKENDS: Final = {
    "django_resto.storage.AsyncStorage": "tribrick.storage.AsyncStorage",
    "django_resto.storage.DistributedStorage": "tribrick.storage.DistributedStorage",
    "django_resto.storage.HybridStorage": "tribrick.storage.HybridStorage",
    "django_dust.backends.DistributedStorage": "tribrick.storage.DistributedStorage",
    "django_dust.storage.DistributedStorage": "tribrick.storage.DistributedStorage",
    "django_dust.storage.HybridStorage": "tribrick.storage.HybridStorage",
}


@register("tribrick")
def check_leftovers(**_: Any) -> list[CheckMessage]:
    """Find settings of django-resto and django_dust, and say what to write instead."""
    found: list[CheckMessage] = []
    given = getattr(settings, "TRIBRICK", {})
    for name in sorted({*_RENAMED, *_GONE, *_others()}):
        if not hasattr(settings, name):
            continue
        key = _RENAMED.get(name)
        if key is None:
            hint = _GONE.get(name, "Remove it: nothing reads it.")
        elif key in given:
            hint = f'Remove it: TRIBRICK["{key}"] is used instead.'
        else:
            hint = f"It is still understood. Write {_KEY.format(key=key, value=getattr(settings, name))} instead."
        found.append(Warning(f"{name} is a setting of an older package.", hint=hint, id="tribrick.W001"))
    older = str(getattr(settings, "DEFAULT_FILE_STORAGE", ""))
    if older in _BACKENDS:  # Django 5.1 and later do not read it
        hint = f'Remove it, and write STORAGES["default"]["BACKEND"] = "{_BACKENDS[older]}".'
        text = f"DEFAULT_FILE_STORAGE is {older}, a storage of an older package."
        found.append(Error(text, hint=hint, id="tribrick.E003"))
    for alias, options in _configured().items():
        instead = _BACKENDS.get(str(options.get("BACKEND")))
        if instead:
            hint = f'Write STORAGES["{alias}"]["BACKEND"] = "{instead}".'
            found.append(
                Error(f"{options['BACKEND']} is a storage of an older package.", hint=hint, id="tribrick.E003")
            )
    return found


def _others() -> Iterable[str]:
    return (name for name in dir(settings) if name.startswith(("RESTO_", "DUST_")))


def _configured() -> dict[str, Any]:
    return getattr(settings, "STORAGES", {})


@register("tribrick")
def check_storages(**_: Any) -> list[CheckMessage]:
    """Refuse storages without hosts, and AsyncStorage without the database it lives on."""
    from tribrick.storage.asynchronous import AsyncStorage

    found: list[CheckMessage] = []
    for alias, kind in _remote().items():
        try:
            storage: Any = storages[alias]
            storage.quorum, storage.transport  # noqa: B018  both are made when they are read
        except (ImproperlyConfigured, ValueError) as error:
            hint = 'See TRIBRICK["MEDIA_HOSTS"], ["WRITE_QUORUM"] and ["TRANSPORT"] in docs/storages.md.'
            found.append(Error(f'STORAGES["{alias}"]: {error}', hint=hint, id="tribrick.E001"))
        if not apps.is_installed("tribrick"):
            hint = 'Put "tribrick" into INSTALLED_APPS and run migrate.'
            if issubclass(kind, AsyncStorage):
                text = f'STORAGES["{alias}"]: AsyncStorage keeps its work in the database.'
                found.append(Error(text, hint=hint, id="tribrick.E002"))
            else:
                text = f'STORAGES["{alias}"]: without the outbox all media hosts must confirm every save.'
                found.append(Warning(text, hint=hint, id="tribrick.W002"))
    return found


@register("tribrick")
def check_settings(**_: Any) -> list[CheckMessage]:
    """Find settings that the first upload, or the first audit, would stumble over."""
    from tribrick.copies import copies
    from tribrick.storage import VolumeStorage

    found: list[CheckMessage] = []
    for alias in _of_kind(VolumeStorage):
        try:
            storage: Any = storages[alias]
            storage.check_settings()
            if apps.is_installed("tribrick"):
                copies(alias)
        except (ImproperlyConfigured, ValueError) as error:
            if alias not in _remote():  # E001 says it
                hint = "See the table of the settings in docs/volume-storage.md."
                found.append(Error(f'STORAGES["{alias}"]: {error}', hint=hint, id="tribrick.E004"))
    return found


@register("tribrick")
def check_spool(**_: Any) -> list[CheckMessage]:
    """Refuse a spool that nobody would keep rows of, and say what a single copy means."""
    from tribrick.storage import VolumeStorage

    found: list[CheckMessage] = []
    given = getattr(settings, "TRIBRICK", {})  # an unknown key in it is E004's matter
    if not isinstance(given, Mapping) or not given.get("SPOOL"):
        return found
    spooling = [alias for alias, kind in _of_kind(VolumeStorage).items() if getattr(kind, "spools", False)]
    if not spooling:
        hint = "Only VolumeStorage has a spool. Remove it, or name that storage in STORAGES."
        found.append(Warning('TRIBRICK["SPOOL"] is set, and no storage uses it.', hint=hint, id="tribrick.W004"))
    elif not apps.is_installed("tribrick"):
        hint = 'Put "tribrick" into INSTALLED_APPS and run migrate.'
        text = 'TRIBRICK["SPOOL"]: without the catalog nobody would know what is in the spool, so it is not used.'
        found.append(Error(text, hint=hint, id="tribrick.E005"))
    if spooling and str(given.get("SPOOL_COPIES")) == "1":
        text = (
            'TRIBRICK["SPOOL_COPIES"] is 1: while the volume is away an upload is acknowledged when one disk has it. '
            "If that disk is lost before the file is drained, an acknowledged upload is lost."
        )
        hint = "With 2, the default, such an upload is on two nodes or refused with 503. See docs/spool.md."
        found.append(Warning(text, hint=hint, id="tribrick.W003"))
    return found


def refuse_storages_without_hosts() -> None:
    """Raise ``ImproperlyConfigured`` if a storage has no media hosts, so that the site does not start."""
    for alias in _remote():
        storages[alias]


def _remote() -> dict[str, type]:
    """Return the classes of the storages with media hosts, by their key in ``STORAGES``."""
    from tribrick.storage.base_remote import RemoteStorage

    return _of_kind(RemoteStorage)


def _of_kind(wanted: type) -> dict[str, type]:
    """Return the classes of the storages of a kind, by their key in ``STORAGES``."""
    found: dict[str, type] = {}
    for alias, options in _configured().items():
        backend = str(options.get("BACKEND"))
        if backend in _BACKENDS:
            continue
        try:
            kind = import_string(backend)
        except ImportError:
            continue  # Django says so itself
        if isinstance(kind, type) and issubclass(kind, wanted):
            found[alias] = kind
    return found
