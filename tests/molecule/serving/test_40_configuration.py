"""nginx's configuration on a node: taken by nginx, and without a finding of a static analyser that has no reason."""

from __future__ import annotations

import pytest

from analysed import findings, unexcused
from helpers import NODES

# Debian's own file; the unit of nginx has LimitNOFILE, and a worker needs two descriptors a connection.
DEBIANS = {"worker_rlimit_nofile_vs_connections /etc/nginx/nginx.conf": "Debian's"}
FILES = {"edge": ("/etc/nginx/nginx.conf", DEBIANS), "origin": ("/etc/tribrick/origin.conf", {})}


@pytest.mark.parametrize("node", NODES)
def test_nginx_takes_it(rig, node):
    for file, _ in FILES.values():
        done = rig.run_root(node, f"nginx -t -e stderr -c {file}")
        assert done.returncode == 0, done.stderr
        assert "[warn]" not in done.stderr, done.stderr
    assert rig.root(node, "haproxy -c -f /etc/tribrick/haproxy.cfg 2>&1").count("[WARNING]") == 0


@pytest.mark.parametrize("which", FILES)
def test_analyser_finds_nothing_without_a_reason(rig, which, tmp_path):
    file, foreign = FILES[which]
    dump = tmp_path / "dump.conf"
    dump.write_text(rig.root("node1", f"nginx -T -q -e stderr -c {file}"), encoding="utf-8")
    assert not unexcused(dump, foreign)
    # It does look: what everybody knows to be wrong is found.
    dump.write_text(dump.read_text().replace("http {", "http { server { listen 9; location /i { alias /srv/; } }", 1))
    assert "alias_traversal" in {name for name, *_ in findings(dump)}
