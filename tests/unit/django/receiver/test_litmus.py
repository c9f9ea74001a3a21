"""What litmus, the WebDAV test suite, says of the media hosts: its basic cases, one by one."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from typing import Any

CASES = (
    "init begin options put_get put_get_utf8_segment put_no_parent mkcol_over_plain delete delete_null delete_fragment"
    " mkcol mkcol_again delete_coll mkcol_no_parent mkcol_with_body finish"
).split()
METHODS = "dav_methods PUT DELETE;"
ALL_PASS = dict.fromkeys(CASES, "pass")
# No locks: nobody needs them here.
NO_LOCKS = "server does not claim Class 2 compliance"


def litmus(host: Any, program: Callable[[str, str], str]) -> tuple[dict[str, str], list[str]]:
    """Run the basic cases; return what became of each, and the warnings."""
    command = [program("basic", "litmus"), "--htdocs", "/usr/share/litmus/htdocs", f"http://{host.host}{host.base_url}"]
    said = subprocess.run(
        command,
        cwd=host.files.parent,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    ).stdout.replace("\r", "\n")
    results: dict[str, str] = {}
    case = ""
    for line in said.splitlines():
        if match := re.match(r" *\d+\. (\w+)\.*", line):
            case = match[1]
        if match := re.search(r"\.\.+ (pass|FAIL|SKIPPED|XFAIL)\b", line):
            results[case] = match[1]
    return results, re.findall(r"WARNING: ([^;\n]*)", said)


def test_nginx_as_documented(one_machine: Any, program: Any) -> None:
    # The suite wants a collection for itself; MKCOL is not among the methods that a storage needs.
    assert litmus(one_machine.nginx_dav(), program) == ({"init": "pass", "begin": "FAIL"}, [])


def test_nginx_with_all_its_methods(one_machine: Any, program: Any) -> None:
    host = one_machine.nginx_dav(changed={METHODS: "dav_methods PUT DELETE MKCOL COPY MOVE;"})
    results, warnings = litmus(host, program)
    assert results == {**ALL_PASS, "options": "FAIL"}
    assert warnings == ["DELETE removed collection resource with Request-URI including fragment"]


def test_nginx_with_the_module_dav_ext(one_machine: Any, program: Any) -> None:
    methods = f"{METHODS[:-1]} MKCOL COPY MOVE; dav_ext_methods PROPFIND OPTIONS;"
    host = one_machine.nginx_dav(modules=("ngx_http_dav_ext_module",), changed={METHODS: methods})
    results, warnings = litmus(host, program)
    assert results == ALL_PASS
    assert warnings == [NO_LOCKS, "DELETE removed collection resource with Request-URI including fragment"]


def test_lighttpd_as_documented(one_machine: Any, program: Any) -> None:
    results, warnings = litmus(one_machine.lighttpd_dav(), program)
    assert results == ALL_PASS
    assert warnings == [NO_LOCKS]
