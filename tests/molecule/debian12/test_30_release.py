"""The older base: which GlusterFS runs there."""

from __future__ import annotations


def test_release_and_gluster(host):
    assert host.system_info.release == "12"
    assert host.check_output("gluster --version").split()[1].startswith("10.")
