"""Settings from the environment."""

from __future__ import annotations

import pytest
from django.core.exceptions import ImproperlyConfigured
from example.environment import Environment, database


def test_missing_variables_are_all_named() -> None:
    with pytest.raises(ImproperlyConfigured, match=r"B, C\. example/README"):
        Environment({"A": "1", "B": ""}).require("A", "B", "C")


@pytest.mark.parametrize("value", ["", "x", "-1", "0", "9", "1.5", "٣"])
def test_numbers_out_of_bounds(value: str) -> None:
    env = Environment({"N": value})
    if value == "":
        assert env.number("N", 3, 1, 8) == 3
    else:
        with pytest.raises(ImproperlyConfigured, match="N must be a whole number from 1 to 8"):
            env.number("N", 3, 1, 8)


def test_flags_and_words() -> None:
    env = Environment({"Y": "1", "N": "no", "X": "maybe", "W": " a, b,,c "})
    assert (env.flag("Y"), env.flag("N"), env.flag("Z")) == (True, False, False)
    assert env.words("W") == ["a", "b", "c"]
    with pytest.raises(ImproperlyConfigured, match="X must be 0 or 1"):
        env.flag("X")


def test_one_of_several_words() -> None:
    env = Environment({"B": "hybrid"})
    assert env.choice("B", {"volume": 1, "hybrid": 2}, "volume") == "hybrid"
    assert env.choice("C", {"volume": 1, "hybrid": 2}, "volume") == "volume"
    with pytest.raises(ImproperlyConfigured, match="B must be one of volume, async, not 'hybrid'"):
        env.choice("B", ["volume", "async"], "volume")


def test_structures() -> None:
    env = Environment({"L": '[{"name": "node1"}]', "D": '{"ca": "/x"}', "X": '{"hmac_key": "secret"'})
    assert env.structure("L", list) == [{"name": "node1"}]
    assert env.structure("D", dict) == {"ca": "/x"}
    assert (env.structure("N", list), env.structure("N", dict)) == ([], {})
    with pytest.raises(ImproperlyConfigured, match="L must be a JSON object"):
        env.structure("L", dict)
    with pytest.raises(ImproperlyConfigured, match="X is not JSON") as caught:
        env.structure("X", dict)
    assert "secret" not in str(caught.value)


def test_quorums() -> None:
    env = Environment({"A": "all", "N": "2", "X": "most", "Z": "0"})
    assert [env.quorum(name) for name in "ANM"] == ["all", 2, None]
    for bad in "XZ":
        with pytest.raises(ImproperlyConfigured, match=f'{bad} must be a number of hosts or "all"'):
            env.quorum(bad)


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("postgresql://u:p%40ss@db1/site", "db1", "5432"),
        ("postgres://u:p%40ss@db1:5433,db2/site", "db1,db2", "5433,5432"),
        ("postgresql://u:p%40ss@[fd00::1]:5433,db2:1/site", "fd00::1,db2", "5433,1"),
        ("postgresql://u:p%40ss@/site?host=/run/postgresql", "/run/postgresql", ""),
    ],
)
def test_database_urls(url: str, host: str, port: str) -> None:
    made = database(url)
    assert (made["HOST"], made["PORT"]) == (host, port)
    assert (made["USER"], made["PASSWORD"], made["NAME"]) == ("u", "p@ss", "site")
    assert made["OPTIONS"]["connect_timeout"] == "3"
    assert "statement_timeout=15000" in made["OPTIONS"]["options"]
    assert ("target_session_attrs" in made["OPTIONS"]) == ("," in host)
    assert made["CONN_HEALTH_CHECKS"]


def test_parameters_go_to_the_driver() -> None:
    made = database("postgresql://u@h/n?sslmode=verify-full&connect_timeout=9")
    assert made["OPTIONS"]["sslmode"] == "verify-full"
    assert made["OPTIONS"]["connect_timeout"] == "9"


def test_sqlite_for_tests() -> None:
    assert database("sqlite:////tmp/x")["NAME"] == "/tmp/x"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("mysql://u:secret@h/n", "must start with postgresql://"),
        ("nonsense", "must start with postgresql://"),
        ("postgresql://u:secret@h", "names no database"),
        ("postgresql://u:secret@h:port/n", "a host that cannot be read"),
        ("sqlite://", "names no file"),
    ],
)
def test_bad_urls_say_what_is_wrong_and_not_the_password(url: str, sentence: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=sentence) as caught:
        database(url)
    assert "secret" not in str(caught.value)
