"""gixy, a static analyser, finds nothing in nginx's configurations that has no reason beside it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from unit.node.test_edge import NGINX, Node, issue, shutil

from analysed import comment_above, findings, unexcused

SIMPLE = """events {{ }}
http {{
  server_tokens off;
  server {{
    listen 127.0.0.1:9;
{comment}    location /i {{ alias /srv/media/; }}
  }}
}}
"""


@pytest.fixture
def node(tmp_path: Path) -> Node:
    ca = issue(tmp_path, "ca", "Tribrick nodes")
    made, other = Node("node1", tmp_path / "1"), Node("node2", tmp_path / "2")
    issue(made.tls, "node", made.name, ca)
    shutil.copy(tmp_path / "ca.crt", made.tls / "ca.crt")
    made.configure([other], spools=True)
    return made


def dumped(work: Path, file: Path) -> Path:
    said = subprocess.run(
        [NGINX, "-T", "-q", "-p", str(work), "-e", str(work / "log"), "-c", str(file)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    dump = work / "dump"
    dump.write_text(said.stdout)
    return dump


@pytest.mark.parametrize(
    "more", [{}, {"media_web_https_redirect": True}, None], ids=["an edge", "redirect", "without an edge"]
)
def test_every_finding_has_its_reason(node: Node, more: dict[str, Any] | None) -> None:
    node.write(node.tree_alone if more is None else node.edge | more)
    assert not unexcused(dumped(node.work, node.work / "nginx.conf"))


def test_origin(node: Node) -> None:
    assert not unexcused(dumped(node.work, node.work / "origin.conf"))


@pytest.mark.parametrize(
    ("comment", "bad"),
    [
        ("", True),
        ("    # gixy alias_traversal: nobody\n    # gets here.\n", False),
        ("    # gixy alias_traversal:\n", True),
        ("    # gixy http_splitting: another one.\n", True),
        ("    # gixy alias_traversal: too far away.\n\n", True),
    ],
)
def test_what_is_found_needs_a_reason_straight_above(tmp_path: Path, comment: str, bad: bool) -> None:
    file = tmp_path / "nginx.conf"
    file.write_text(SIMPLE.format(comment=comment))
    dump = dumped(tmp_path, file)
    assert {name for name, *_ in findings(dump)} == {"alias_traversal"}
    assert bool(unexcused(dump)) is bad
    assert not unexcused(dump, {f"alias_traversal {file}": "not ours"})


def test_comment_above() -> None:
    lines = ["a;", "# one", "  # two", "b;", "c;"]
    assert comment_above(lines, 4) == "one two"
    assert comment_above(lines, 5) == comment_above(lines, 1) == ""
    assert comment_above(["# first", "a;"], 2) == "first"
