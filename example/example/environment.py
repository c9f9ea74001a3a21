"""Reads settings from the environment; every fault is a sentence that names the variable."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from django.core.exceptions import ImproperlyConfigured

Structure = TypeVar("Structure", list[Any], dict[str, Any])
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^:\[\]]*)(?::(?P<port>[0-9]{1,5}))?")


class Environment:
    """Typed access to environment variables. An empty value counts as not set."""

    def __init__(self, values: Mapping[str, str] = os.environ) -> None:
        self._values = values

    def require(self, *names: str) -> None:
        """Refuse to start when one of *names* is not set; name all that are missing."""
        missing = [name for name in names if not self._values.get(name)]
        if missing:
            raise ImproperlyConfigured(
                f"Not set in the environment: {', '.join(missing)}. example/README.md lists what each of them means."
            )

    def text(self, name: str, default: str = "") -> str:
        """Return the value of *name*."""
        return self._values.get(name) or default

    def flag(self, name: str) -> bool:
        """Return a yes/no value; not set is no."""
        value = self.text(name, "0").lower()
        if value not in {"0", "1", "no", "yes", "false", "true"}:
            raise ImproperlyConfigured(f"{name} must be 0 or 1, not {value!r}.")
        return value in {"1", "yes", "true"}

    def number(self, name: str, default: int, least: int, most: int) -> int:
        """Return a whole number within bounds."""
        value = self.text(name, str(default))
        if not re.fullmatch(r"[0-9]{1,18}", value) or not least <= int(value) <= most:
            raise ImproperlyConfigured(f"{name} must be a whole number from {least} to {most}, not {value!r}.")
        return int(value)

    def choice(self, name: str, known: Collection[str], default: str) -> str:
        """Return one of the *known* words."""
        value = self.text(name, default)
        if value not in known:
            raise ImproperlyConfigured(f"{name} must be one of {', '.join(known)}, not {value!r}.")
        return value

    def structure(self, name: str, kind: type[Structure]) -> Structure:
        """Return a JSON value; not set is an empty one. The message does not repeat it: it may hold keys."""
        text = self.text(name)
        try:
            value = json.loads(text) if text else kind()
        except ValueError as error:
            raise ImproperlyConfigured(f"{name} is not JSON: {error}.") from error
        if not isinstance(value, kind):
            raise ImproperlyConfigured(f"{name} must be a JSON {'object' if kind is dict else 'array'}.")
        return value

    def quorum(self, name: str) -> int | str | None:
        """Return a number of hosts, ``"all"``, or None when it is not set."""
        value = self.text(name)
        if value in {"", "all"}:
            return value or None
        if not re.fullmatch(r"[1-9][0-9]{0,2}", value):
            raise ImproperlyConfigured(f'{name} must be a number of hosts or "all", not {value!r}.')
        return int(value)

    def words(self, name: str) -> list[str]:
        """Return a comma-separated list."""
        return [word.strip() for word in self.text(name).split(",") if word.strip()]


def _hosts(text: str) -> tuple[str, str]:
    """Split ``a:5432,b`` into the comma lists of hosts and ports that libpq takes."""
    hosts, ports = [], []
    for part in text.split(","):
        match = _HOST.fullmatch(part)
        if match is None:
            raise ImproperlyConfigured("DATABASE_URL has a host that cannot be read; use host:port.")
        hosts.append(unquote(match["host"]).strip("[]"))
        ports.append(match["port"] or "5432")
    return ",".join(hosts), ",".join(ports) if any(hosts) else ""


def database(url: str) -> dict[str, Any]:
    """Return the entry of ``DATABASES`` for ``postgresql://user:password@host[:port][,host]/name``.

    Query parameters are passed to libpq (``sslmode``, ``target_session_attrs``, ``host`` for a
    socket directory). ``sqlite:///path`` is for unit tests. No message ever holds the password.
    """
    parts = urlsplit(url)
    name = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "sqlite":
        if not name:
            raise ImproperlyConfigured("DATABASE_URL names no file; use sqlite:///path.")
        return {"ENGINE": "django.db.backends.sqlite3", "NAME": name}
    if parts.scheme not in {"postgresql", "postgres"}:
        raise ImproperlyConfigured(
            f"DATABASE_URL must start with postgresql:// (or sqlite:/// for unit tests), "
            f"not {parts.scheme or 'nothing'}://."
        )
    if not name:
        raise ImproperlyConfigured("DATABASE_URL names no database; end it with /NAME.")
    credentials, _, locations = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    host, port = _hosts(locations)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    host, port = query.pop("host", host), query.pop("port", port)
    options: dict[str, Any] = {
        "connect_timeout": "3",
        # A database node that vanishes silently is noticed in about ten seconds.
        "keepalives_idle": "5",
        "keepalives_interval": "2",
        "keepalives_count": "3",
        "tcp_user_timeout": "10000",
        "options": "-c statement_timeout=15000 -c lock_timeout=10000 -c idle_in_transaction_session_timeout=60000",
    }
    if "," in host:
        options["target_session_attrs"] = "read-write"
    options.update(query)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": name,
        "USER": unquote(user),
        "PASSWORD": unquote(password),
        "HOST": host,
        "PORT": port,
        "CONN_MAX_AGE": 60,
        "CONN_HEALTH_CHECKS": True,
        "OPTIONS": options,
    }
