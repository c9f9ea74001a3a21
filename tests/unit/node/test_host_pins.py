"""Names in /etc/hosts."""

from __future__ import annotations

import pytest
from ansible_collections.tribrick.media.plugins.modules.host_pins import BEGIN, END, pinned, satisfied

PINS = {"node1": "192.0.2.1", "node2": "192.0.2.2"}


def test_a_file_that_is_right_is_left_alone_whoever_wrote_it():
    text = "127.0.0.1 localhost\n::1 localhost node1\n192.0.2.1\tnode1 # me\n192.0.2.2 node2 other\n"
    assert pinned(text, PINS) == text


def test_missing_names_go_into_one_block_and_a_second_pass_changes_nothing():
    once = pinned("127.0.0.1 localhost\n", PINS)
    assert once == f"127.0.0.1 localhost\n{BEGIN}\n192.0.2.1\tnode1\n192.0.2.2\tnode2\n{END}\n"
    assert pinned(once, PINS) == once


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("127.0.1.1 node1", ""),
        ("127.0.1.1 node1.example node1", "127.0.1.1\tnode1.example\n"),
        ("192.0.2.9 NODE1", ""),
        ("# 192.0.2.9 node1", "# 192.0.2.9 node1\n"),
        ("fe80::1%eth0 node1", "fe80::1%eth0 node1\n"),
        ("not an address", "not an address\n"),
    ],
)
def test_only_a_wrong_address_of_a_pinned_name_is_taken_out(line, left):
    assert pinned(line + "\n", PINS).startswith(left + BEGIN)


def test_an_old_block_is_replaced():
    once = pinned("", PINS)
    again = pinned(once, {"node1": "192.0.2.7"})
    assert again.count(BEGIN) == 1
    assert "192.0.2.7\tnode1" in again
    assert "node2" not in again


def test_two_addresses_for_a_name_do_not_satisfy():
    assert not satisfied("192.0.2.1 node1\n192.0.2.9 node1\n192.0.2.2 node2\n", PINS)
