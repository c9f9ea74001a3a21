"""Every storage x 1, 2, 3 hosts x every fault of one host: the exact state of every host afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.core.files.base import ContentFile

from tribrick.models import MediaFile
from tribrick.outbox import Worker
from tribrick.storage import ReplicationError
from tribrick.testing import TestHttpServer

pytestmark = pytest.mark.usefixtures("database")
BYTES = b"caf\xc3\xa9 \x00\xff" * 40_000  # 320 kB: more than the sockets hold

FAULTS: dict[str, dict[str, Any]] = {
    "fine": {},
    "refused": {},
    "slow": {"slow": 1.2},
    "403": {"readonly": True},
    "500": {"override_code": 500},
    "202": {"override_code": 202},
    "dies mid-body": {"dies_mid_body": True},
    "full disk": {"capacity": 0},
}
HEALTHY = {"slow": 0.0, "readonly": False, "override_code": None, "dies_mid_body": False, "capacity": None}
STORES_LATE = {"slow"}
"""Faults with which the host stores the file although the client has given up."""
LEAVES_A_TASK = {"slow", "500", "202"}
"""Faults after which nobody can know yet that the host has nothing of a failed save."""
KEEPS_A_DELETED_FILE = {"refused", "403", "500", "202"}


def break_host(server: TestHttpServer, fault: str) -> None:
    for name, value in FAULTS[fault].items():
        setattr(server, name, value)
    if fault == "refused":
        server.stop()


def heal(server: TestHttpServer, fault: str) -> None:
    server.wait_idle()
    for name, value in HEALTHY.items():
        setattr(server, name, value)
    if fault == "refused":
        server.start()


def contents(hosts: list[TestHttpServer]) -> list[dict[str, bytes]]:
    for server in hosts:
        server.wait_idle()
    return [dict(server.files) for server in hosts]


@pytest.mark.sample(16)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", ["hybrid", "distributed"])
def test_save(
    kind: str, count: int, fault: str, site: Any, servers: Any, local_files: Any, make_due: Any, waiting: Any
) -> None:
    hosts = servers(count)
    storage = site(kind, hosts)
    sick = hosts[-1]
    break_host(sick, fault)
    enough = fault == "fine" or count == 3  # a majority is 1 of 1, 2 of 2, 2 of 3

    if enough:
        name = storage.save("photos/a.bin", ContentFile(BYTES))
        healthy, rest = {name: BYTES}, {name: BYTES} if fault == "fine" or fault in STORES_LATE else {}
        assert contents(hosts) == [healthy] * (count - 1) + [rest]
        assert waiting() == ([] if fault == "fine" else [("put", sick.host)])
        assert MediaFile.objects.get().name == name
        assert local_files() == ([name] if kind == "hybrid" else [])
        with storage.open(name) as file:
            assert file.read() == BYTES
    else:
        with pytest.raises(ReplicationError) as caught:
            storage.save("photos/a.bin", ContentFile(BYTES))
        assert [outcome.ok for outcome in caught.value.results.values()] == [True] * (count - 1) + [False]
        assert list(caught.value.results) == [server.host for server in hosts]
        left = contents(hosts)
        assert left[:-1] == [{}] * (count - 1), "an undone save stays on no host that can be reached"
        assert (left[-1] != {}) == (fault in STORES_LATE)
        assert waiting() == ([("delete", sick.host)] if fault in LEAVES_A_TASK else [])
        assert local_files() == []
        assert not MediaFile.objects.exists()

    heal(sick, fault)
    for _ in range(2):  # a DELETE after a PUT that was given up is sent twice
        make_due()
        Worker().work()
    assert contents(hosts) == [{name: BYTES} if enough else {}] * count
    assert waiting() == []


@pytest.mark.sample(8)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_save_in_the_background(
    count: int, fault: str, site: Any, servers: Any, local_files: Any, make_due: Any, waiting: Any
) -> None:
    hosts = servers(count)
    storage = site("async", hosts)
    sick = hosts[-1]
    break_host(sick, fault)

    name = storage.save("photos/a.bin", ContentFile(BYTES))
    assert [server.log for server in hosts] == [[]] * count
    assert local_files() == [name]
    assert waiting() == sorted(("put", server.host) for server in hosts)

    Worker().work()
    rest = {name: BYTES} if fault == "fine" or fault in STORES_LATE else {}
    assert contents(hosts) == [{name: BYTES}] * (count - 1) + [rest]
    assert waiting() == ([] if fault == "fine" else [("put", sick.host)])

    heal(sick, fault)
    make_due()
    Worker().work()
    assert contents(hosts) == [{name: BYTES}] * count
    assert waiting() == []


@pytest.mark.sample(16)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", ["hybrid", "async", "distributed"])
def test_delete(
    kind: str, count: int, fault: str, site: Any, servers: Any, local_files: Any, make_due: Any, waiting: Any
) -> None:
    hosts = servers(count)
    storage = site(kind, hosts)
    name = storage.save("photos/a.bin", ContentFile(BYTES))
    Worker().work()
    assert contents(hosts) == [{name: BYTES}] * count
    sick = hosts[-1]
    break_host(sick, fault)

    storage.delete(name)
    if kind == "async":
        assert waiting() == sorted(("delete", server.host) for server in hosts)
        Worker().work()
    rest = {name: BYTES} if fault in KEEPS_A_DELETED_FILE else {}
    assert contents(hosts) == [{}] * (count - 1) + [rest]
    assert waiting() == ([("delete", sick.host)] if fault in {*KEEPS_A_DELETED_FILE, "slow"} else [])
    assert local_files() == []
    assert MediaFile.objects.get().state == "purged"
    assert not storage.exists(name)

    heal(sick, fault)
    for _ in range(2):
        make_due()
        Worker().work()
    assert contents(hosts) == [{}] * count
    assert waiting() == []


Hosts = Callable[[int], list[TestHttpServer]]


@pytest.mark.parametrize("kind", ["hybrid", "distributed"])
def test_without_fatal_exceptions_a_copy_is_enough(kind: str, site: Any, servers: Hosts, waiting: Any) -> None:
    hosts = servers(2)
    storage = site(kind, hosts, FATAL_EXCEPTIONS=False)
    hosts[1].readonly = True
    name = storage.save("a.bin", ContentFile(BYTES))
    assert contents(hosts) == [{name: BYTES}, {}]
    assert waiting() == [("put", hosts[1].host)]


def test_without_fatal_exceptions_no_copy_at_all_is_still_an_error(site: Any, servers: Hosts, waiting: Any) -> None:
    hosts = servers(2)
    storage = site("distributed", hosts, FATAL_EXCEPTIONS=False)
    for server in hosts:
        server.readonly = True
    with pytest.raises(ReplicationError):
        storage.save("a.bin", ContentFile(BYTES))
    assert contents(hosts) == [{}, {}]
    assert waiting() == []


@pytest.mark.parametrize(("quorum", "saved"), [(1, True), (2, False), ("all", False)])
def test_write_quorum(quorum: Any, saved: bool, site: Any, servers: Hosts) -> None:
    hosts = servers(3)
    storage = site("distributed", hosts, WRITE_QUORUM=quorum)
    hosts[0].readonly = hosts[1].override_code = 0
    hosts[0].readonly, hosts[1].override_code = True, 507
    if saved:
        name = storage.save("a.bin", ContentFile(BYTES))
        assert contents(hosts) == [{}, {}, {name: BYTES}]
    else:
        with pytest.raises(ReplicationError):
            storage.save("a.bin", ContentFile(BYTES))
        assert contents(hosts) == [{}, {}, {}]
