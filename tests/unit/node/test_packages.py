"""What dpkg says, what is missing, and the index of a directory."""

from __future__ import annotations

import os

import pytest
from ansible_collections.tribrick.media.plugins.modules import debian_packages as packages
from ansible_collections.tribrick.media.plugins.modules.package_index import parse_index

STATUS = """\
a\tinstall\tinstalled\t1.0
b\thold\tinstalled\t2.0
c\tdeinstall\tconfig-files\t3.0
d\tinstall\thalf-configured\t4.0
e\tunknown\tnot-installed\t
libx\tinstall\tinstalled\t5
libx\tunknown\tnot-installed\t
"""


def test_missing_broken_and_unheld():
    state = packages.parse_status(STATUS)
    missing, broken, unheld = packages.plan(state, ["a", "b", "c", "d", "e", "libx", "never-heard"], ["a", "b"])
    assert missing == ["c", "d", "e", "never-heard"]
    assert broken == ["d"]
    assert unheld == ["a"]


def test_a_package_waiting_for_triggers_is_installed():
    state = packages.parse_status("a\tinstall\ttriggers-pending\t1\n")
    assert packages.plan(state, ["a"], [])[0] == []


@pytest.mark.parametrize("line", ["no tabs here", "a\tb\tc", "dpkg-query: error"])
def test_unknown_output_is_an_error(line):
    with pytest.raises(ValueError, match="not understood"):
        packages.parse_status(line)


@pytest.mark.parametrize(
    ("name", "good"), [("g++", True), ("python3.11", True), ("-y", False), ("a=1", False), ("A", False)]
)
def test_names_of_packages(name, good):
    assert bool(packages.PACKAGE_NAME.match(name)) is good


def test_the_newest_source_counts(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x").write_text("")
    os.utime(tmp_path / "d/x", (5000, 5000))
    os.utime(tmp_path / "d", (1000, 1000))
    assert packages.newest([str(tmp_path / "d"), str(tmp_path / "absent")]) == 5000
    assert packages.newest([str(tmp_path / "absent")]) == 0


def test_an_index_is_read():
    text = "Package: a\nDescription: x\n Filename: not this\nFilename: ./a.deb\nSize: 10\n\n"
    text += "Package: b\nFilename: pool/b.deb\nSize: 7\n"
    assert parse_index(text) == {"a.deb": 10, "pool/b.deb": 7}
    assert parse_index("") == {}
